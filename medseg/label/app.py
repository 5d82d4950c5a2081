"""The app that MONAI Label's server runs: medseg's bundles, its training and its uncertainty."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.utils.async_tasks.task import AsyncTask

import medseg
from medseg.errors import InputError, UsageError
from medseg.label.catalogue import Catalogue
from medseg.label.dicomweb import DicomWeb
from medseg.label.infer import BundleInfer
from medseg.label.parameters import is_session
from medseg.label.sampling import FirstImage, RandomImage, UncertainImage, UncertaintyScoring
from medseg.label.serve import is_address, login
from medseg.label.store import StudyStore
from medseg.label.train import BundleTraining
from medseg.label.webstore import WebStore

log = logging.getLogger(__name__)

_TAKEN = (
    "model",
    "image",
    "device",
    "overlap",
    "tta",
    "force",
    "result_extension",
    "result_dtype",
    "result_compress",
    "save_label",
    "label_tag",
)
"""What of a client's request for a segmentation reaches MONAI Label."""


class MedsegLabelApp(MONAILabelApp):  # type: ignore[misc]
    """Bundles as models; the server and its training and scoring processes each build one.

    Args:
        app_dir: folder of the app, private to the server.
        studies: folder of the images, or address of a DICOMweb server.
        conf: ``bundles`` (JSON list of folders), ``trained`` (folder of new versions), ``backend``, ``score``
            ("true": score all images at the start and after each training), and ``fetched`` (folder for what comes
            from a DICOMweb server).
    """

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]) -> None:
        # MONAI Label's own lines repeat what a client sent, and names of files, which may be patients'.
        logging.getLogger("monailabel").setLevel(logging.ERROR)
        logging.getLogger("medseg").setLevel(logging.WARNING)
        logging.getLogger("medseg.label").setLevel(logging.INFO)
        logging.getLogger("timeloop").disabled = True
        self._backend: Any = conf.get("backend", "auto")
        self._score = conf.get("score") == "true"
        self._catalogue = Catalogue([Path(one) for one in json.loads(conf["bundles"])], Path(conf["trained"]))
        super().__init__(
            app_dir,
            studies,
            dict(conf),
            name="medseg",
            description="Bundles of medseg. Research use only; not a medical device.",
            version=medseg.__version__,
        )

    def init_datastore(self) -> StudyStore:
        """The store of the studies folder, or of a DICOMweb server."""
        reload = settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD
        if is_address(self.studies):
            server = DicomWeb(self.studies, login(settings.model_dump()))
            return WebStore(server, self.conf["fetched"], auto_reload=reload)
        return StudyStore(self.studies, auto_reload=reload)

    def init_infers(self) -> dict[str, BundleInfer]:
        """A model for each bundle."""
        return {name: BundleInfer(self._catalogue, name, backend=self._backend) for name in self._catalogue.served}

    def init_trainers(self) -> dict[str, BundleTraining]:
        """A training for each bundle that is no ensemble."""
        served = self._catalogue.served.values()
        return {one.name: BundleTraining(self._catalogue, one.name) for one in served if one.bundle is not None}

    def init_strategies(self) -> dict[str, Any]:
        """First, random, uncertainty."""
        return {"first": FirstImage(), "random": RandomImage(), "uncertainty": UncertainImage(self._catalogue)}

    def init_scoring_methods(self) -> dict[str, UncertaintyScoring]:
        """Uncertainty."""
        return {"uncertainty": UncertaintyScoring(self._catalogue, backend=self._backend)}

    def init_batch_infer(self) -> Callable[..., Any]:
        """One image after the other."""
        return _InOrder()

    def on_init_complete(self) -> None:
        """The server is up."""
        super().on_init_complete()
        log.info("%d models, %d images", len(self._infers), len(self.datastore().list_images()))
        self._score_all()

    def info(self) -> dict[str, Any]:
        """What the server offers, with the versions that were trained since it started."""
        fresh = self._catalogue.refresh()
        for one in fresh:
            self._infers[one.name] = BundleInfer(self._catalogue, one.name, backend=self._backend)
            self._trainers[one.name] = BundleTraining(self._catalogue, one.name)
            log.info("new version: %s %s", one.name, one.ensemble.version)
        if fresh:
            self._score_all()
        found: dict[str, Any] = super().info()
        return found

    def infer(self, request: Mapping[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Segment an image of the store, of a session, or one that came with the request.

        Raises:
            UsageError: a tag that cannot be one. InputError: none of these.
        """
        taken = {key: request[key] for key in _TAKEN if key in request}
        found: dict[str, Any] = super().infer({**taken, "image": self._source(request)}, datastore)
        return found

    def bundle_path(self, model: str) -> str:  # noqa: ARG002 - MONAI Label's signature
        """A folder for the Python path of training processes: always this one, never one that a client names."""
        return str(self.app_dir)

    def on_save_label(self, image_id: str, label_id: str) -> None:  # noqa: ARG002 - MONAI Label's signature
        """A label came in; who sent what is in the store's index."""
        log.info("label saved; %d of %d images done", *self._done())

    def _done(self) -> tuple[int, int]:
        store = self.datastore()
        return len(store.get_labeled_images()), len(store.list_images())

    def _source(self, request: Mapping[str, Any]) -> str:
        """Identifier in the store, or path of a session's or an uploaded image; no other path is taken."""
        session = request.get("session")
        if isinstance(session, dict) and is_session(str(session.get("name"))):
            known = self.sessions().get_session(session["name"])
            if known is not None:
                return str(known.image)
        image = request.get("image")
        if not isinstance(image, str) or not image:
            raise UsageError("image", "none given", "send an image's identifier, a session, or a file")
        if self.datastore().get_image_uri(image):
            return image
        path = Path(image)
        if path.parent == Path(tempfile.gettempdir()) and path.is_file():  # the server's own folder of uploads
            return image
        raise InputError("image", "no such image or session", "see GET /datastore/?output=all")

    def _score_all(self) -> None:
        if self._score and self._server_mode:
            AsyncTask.run("scoring", request={"method": "uncertainty"}, enqueue=True)


class _InOrder(BatchInferTask):  # type: ignore[misc]
    """Batches without MONAI Label's pool of devices, which has no place for a machine without CUDA."""

    def __call__(self, request: Mapping[str, Any], datastore: Any, infer: Callable[..., Any]) -> dict[str, Any]:
        """Segment the images that a request names; each label map is saved with the request's tag."""
        single = {**request, "multi_gpu": False, "max_workers": 1}
        found: dict[str, Any] = super().__call__(single, datastore, infer)
        return found
