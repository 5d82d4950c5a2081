"""Training of a bundle as a task of the server, which runs it in a process of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from medseg.bundles.load import load_bundle
from medseg.errors import BundleError
from medseg.label.catalogue import Catalogue
from medseg.label.parameters import TrainParameters, devices
from medseg.label.versions import Submitted, default_parameters, fine_tune, read_names
from medseg.training.loop import Progress

log = logging.getLogger(__name__)

_LINES = 20


class BundleTraining(TrainTask):  # type: ignore[misc]
    """Training of one bundle on the final labels of the store."""

    def __init__(self, catalogue: Catalogue, name: str) -> None:
        bundle = catalogue.served[name].bundle
        if bundle is None:
            raise BundleError(name, "is an ensemble", "train its members")
        self._catalogue, self._name, self._bundle = catalogue, name, bundle
        self._defaults = default_parameters(bundle)
        super().__init__(f"Trains {name} on with the submitted labels; the result is a new version beside it")

    def config(self) -> dict[str, Any]:
        """What a client may set."""
        return {**asdict(self._defaults), "device": devices()}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, and make a new version of the bundle.

        Returns:
            Its name, version and SHA-256 of its weights.
        """
        settings = TrainParameters.read({**asdict(self._defaults), **request})
        cases = [
            Submitted(
                Path(datastore.get_image_uri(image)),
                Path(datastore.get_label_uri(image, "final")),
                read_names(datastore.get_label_info(image, "final").get("label_info")),
            )
            for image in sorted(datastore.get_labeled_images())
        ]
        told = -1

        def report(progress: Progress, share: float) -> None:
            nonlocal told
            if int(_LINES * share) > told:
                told = int(_LINES * share)
                log.info("%3.0f %%  step %d  loss %.3f", 100 * share, progress.step, progress.loss)

        name = self._catalogue.next_name(self._name)
        new = load_bundle(fine_tune(self._bundle, cases, self._catalogue.trained, name, settings, report))
        log.info("new version: %s %s, weights %s", new.name, new.version, new.sha256[:12])
        return {"model": new.name, "version": new.version, "weights_sha256": new.sha256}
