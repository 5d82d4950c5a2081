"""Which image to label next: the first one, any, or the one of which a bundle is least sure."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy

from medseg.errors import InputError, MedsegError
from medseg.inference.backends.host import Backend
from medseg.inference.run import infer
from medseg.label.catalogue import Catalogue
from medseg.label.parameters import device, number

log = logging.getLogger(__name__)

SERVED_S = 15 * 60
"""An image that was given out is not given to another client for so long."""

SCORES = "medseg_uncertainty"
"""Entry of an image's information: SHA-256 of a model's weights to what it found."""


class UncertaintyScoring(ScoringMethod):  # type: ignore[misc]
    """How unsure a bundle is of each image that has no final label: 1 - the score of ``medseg infer --uncertainty``."""

    def __init__(self, catalogue: Catalogue, *, backend: Backend = "auto") -> None:
        self._catalogue, self._backend = catalogue, backend
        super().__init__("Segments each image without a final label and keeps how unsure the newest version is of it")

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score the images that this version has not scored yet.

        Args:
            request: ``model``, a bundle's name (default: the first one served), whose newest version is asked;
                ``max_images``; ``device``.
            datastore: holds the images and the scores.

        Returns:
            The model, its SHA-256, and how many images were scored and how many failed.
        """
        served = self._catalogue.newest(str(request.get("model") or ""))
        sha256, limit = served.ensemble.sha256, int(number(request, "max_images", 100_000, 1, 100_000))
        open_ = [one for one in sorted(datastore.get_unlabeled_images()) if sha256 not in _scores(datastore, one)]
        failed = 0
        for done, image in enumerate(open_[:limit]):
            try:
                result = infer(
                    datastore.get_image_uri(image),
                    bundle=self._catalogue.ready(served.name),
                    device=device(request),
                    uncertainty=True,
                    backend=self._backend,
                )
            except MedsegError as err:
                failed += 1
                log.warning("image %d of %d not scored: %s", done + 1, len(open_), err.problem)
                continue
            sure = result.record.uncertainty
            if sure is not None:
                found = {
                    "uncertainty": round(1 - sure.score, 6),
                    "mean_entropy": sure.mean_entropy,
                    "model": served.name,
                    "ts": int(time.time()),
                }
                datastore.update_image_info(image, {SCORES: {**_scores(datastore, image), sha256: found}})
            log.info("scored %d of %d", done + 1, min(len(open_), limit))
        return {
            "model": served.name,
            "weights_sha256": sha256,
            "scored": min(len(open_), limit) - failed,
            "failed": failed,
        }


class FirstImage(Strategy):  # type: ignore[misc]
    """The first image without a final label, by name."""

    def __init__(self) -> None:
        super().__init__("The first image without a final label, by name")

    def __call__(
        self,
        request: Mapping[str, Any],  # noqa: ARG002 - MONAI Label's signature
        datastore: Datastore,
    ) -> dict[str, Any] | None:
        """The image's identifier; None when all are labelled."""
        images = _waiting(datastore)
        return {"id": images[0]} if images else None


class RandomImage(Strategy):  # type: ignore[misc]
    """Any image without a final label."""

    def __init__(self) -> None:
        super().__init__("Any image without a final label")

    def __call__(
        self,
        request: Mapping[str, Any],  # noqa: ARG002 - MONAI Label's signature
        datastore: Datastore,
    ) -> dict[str, Any] | None:
        """The image's identifier; None when all are labelled."""
        images = _waiting(datastore)
        return {"id": random.choice(images)} if images else None  # noqa: S311 - no secret depends on it


class UncertainImage(Strategy):  # type: ignore[misc]
    """The image without a final label of which the newest version of a bundle is least sure."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        super().__init__("The image without a final label of which the model is least sure; run scoring first")

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """The image's identifier with its score; None when all are labelled. Scores of other weights do not count.

        Raises:
            InputError: images wait, and none of them was scored.
        """
        images = _waiting(datastore)
        if not images:
            return None
        served = self._catalogue.newest(str(request.get("model") or ""))
        sha256 = served.ensemble.sha256
        scored = {one: found for one in images if (found := _scores(datastore, one).get(sha256))}
        if not scored:
            problem = f"{served.name} has scored none of the {len(images)} images that wait"
            raise InputError("uncertainty", problem, "run the scoring method 'uncertainty', or serve with --score")
        image = max(sorted(scored), key=lambda one: float(scored[one]["uncertainty"]))
        return {"id": image, "uncertainty": scored[image]["uncertainty"], "model": served.name, "model_sha256": sha256}


def _waiting(datastore: Datastore) -> list[str]:
    """Images without a final label by name; those that were given out a moment ago only if there are no others."""
    images = sorted(datastore.get_unlabeled_images())
    now = time.time()
    free = [one for one in images if now - _given_out(datastore.get_image_info(one)) > SERVED_S]
    return free or images


def _given_out(info: Mapping[str, Any]) -> float:
    """When the server last gave an image out, seconds since 1970; the server keeps it for each strategy."""
    return max((float(one.get("ts", 0)) for one in info.get("strategy", {}).values()), default=0.0)


def _scores(datastore: Datastore, image: str) -> dict[str, Any]:
    found = datastore.get_image_info(image).get(SCORES, {})
    return found if isinstance(found, dict) else {}
