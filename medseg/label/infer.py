"""A bundle as a model of the server: medseg's engine, so that the label map is that of ``medseg infer``."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from numpy.typing import NDArray

from medseg.errors import MedsegError
from medseg.inference.backends.host import Backend
from medseg.inference.run import Result, infer
from medseg.io.write import Target, write_labels
from medseg.label.catalogue import Catalogue
from medseg.label.parameters import SUFFIXES, InferParameters, devices

log = logging.getLogger(__name__)


class BundleInfer(InferTask):  # type: ignore[misc]
    """One bundle.

    Args:
        catalogue: holds the bundle.
        name: its name there.
        backend: what computes the network on the CPU, as for ``medseg infer``.
    """

    def __init__(self, catalogue: Catalogue, name: str, *, backend: Backend = "auto") -> None:
        served = catalogue.served[name]
        spec = served.ensemble.spec
        self._catalogue, self._name, self._spec, self._backend = catalogue, name, spec, backend
        about = str(served.ensemble.metadata.get("task", "")) or "Segmentation"
        super().__init__(
            type=InferType.SEGMENTATION,
            labels={label: value for value, label in spec.labels.items() if value},
            dimension=3,
            description=f"{about}; {name} {served.ensemble.version}. Research use only.",
            config={
                "device": devices(),
                "overlap": spec.overlap,
                **({"tta": False} if spec.mirror_axes else {}),
                "force": False,
                "result_extension": list(SUFFIXES),
            },
        )

    def is_valid(self) -> bool:
        """A bundle is checked before it is served."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Segment the image of a request.

        Args:
            request: ``image`` is a path; for the rest see `InferParameters`.

        Returns:
            The label map's file, and what is to be said of it: the names of the labels that were found, with their
            values, and the record.

        Raises:
            MedsegError: what ``medseg infer`` would refuse; the image is not named by its path.
        """
        wanted = InferParameters.read(request, self._spec)
        try:
            result = infer(
                request["image"],
                bundle=self._catalogue.ready(self._name),
                device=wanted.device,
                overlap=wanted.overlap,
                tta=wanted.tta,
                force=wanted.force,
                backend=self._backend,
            )
        except MedsegError as err:
            subject = "image" if err.subject == str(request["image"]) else Path(err.subject).name
            remedy = err.remedy.replace("use --force", 'send "force": true')
            raise type(err)(subject, err.problem, remedy) from None
        path = _write(result, wanted)
        log.info("%s: %d windows, %.1f s", self._name, result.record.windows, sum(result.record.seconds.values()))
        found = {one.name: one.value for one in result.statistics if one.voxels}
        return str(path), {"label_names": found, "record": result.record.model_dump(mode="json")}


def _write(result: Result, wanted: InferParameters) -> Path:
    """The label map in a file of its own among the server's temporary files."""
    with tempfile.NamedTemporaryFile(prefix="labels-", suffix=wanted.suffix, delete=False) as file:
        path = Path(file.name)
    if wanted.suffix == ".nrrd":
        dtype = wanted.dtype or np.min_scalar_type(max(result.labels)).name
        _write_nrrd(path, result.label_map.astype(dtype), result.affine, compress=wanted.compress)
        return path
    write_labels(Target(path, overwrite=True), result.label_map, result.volume, names=result.labels)
    return path


def _write_nrrd(path: Path, labels: NDArray[Any], affine: NDArray[np.float64], *, compress: bool) -> None:
    """Write labels (X, Y, Z) as NRRD, raw voxels unless packed; the viewer in a browser reads nothing else."""
    import nrrd

    header = {
        "space": "right-anterior-superior",
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
        "encoding": "gzip" if compress else "raw",
    }
    nrrd.write(str(path), labels, header, index_order="F")
