"""A trusted bundle's own pipeline, from preprocessing to postprocessing, around medseg's reader and writer.

The scan, whatever it was read from, is given to the pipeline as NIfTI files in a private temporary folder; the
prediction is brought to the scan's grid by the nearest voxel where the pipeline has not done it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from medseg.bundles.load import Bundle
from medseg.bundles.zoo import overlapping
from medseg.bundles.zoo_trust import OwnCode
from medseg.errors import BundleError
from medseg.inference.export import paint_regions
from medseg.inference.segment import Segmentation
from medseg.io.volume import Volume

_SAME_MM = 1e-3


class OwnPipeline:
    """The pipeline of a bundle whose `OwnCode.pipeline` is set.

    Args:
        bundle: the bundle.
        code: its own code.
        device: where its network runs.

    Attributes:
        name: the bundle's.
        network: with its weights.
        labels: value to name, of the last segmentation.

    Raises:
        BundleError: its code failed.
    """

    def __init__(self, bundle: Bundle, code: OwnCode, device: torch.device) -> None:
        self._bundle, self._code, self._device = bundle, code, device
        self.name = bundle.name
        self.labels: Mapping[int, str] = bundle.spec.labels
        self.network = bundle.network().to(device)
        parts = code.parts(str(device), "preprocessing", "inferer", "postprocessing")
        self._before, self._inferer, self._after = parts
        saving = {"SaveImaged", "SaveImage"}
        steps = [step for step in self._after.transforms if type(step).__name__ not in saving]
        self._after = type(self._after)(steps)

    def segment(self, volume: Volume) -> Segmentation:
        """Run the pipeline over a scan.

        Raises:
            BundleError: its code failed, or gave nothing that is a label map.
        """
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="medseg-") as folder, self._code.imports(), torch.inference_mode():
            try:
                found, affine = self._run(_saved(volume, Path(folder)))
            except Exception as err:  # whatever code of others raises
                raise self._code.failed(err) from err
        labels = _on_grid(self._label_map(found), affine, volume)
        known = self._bundle.spec.labels if len(found) == 1 else self.labels
        unknown = {int(value): f"label {value}" for value in np.unique(labels) if int(value) not in known}
        self.labels = dict(sorted({**known, **unknown}.items()))
        return Segmentation(labels, None, 0, time.perf_counter() - begin)

    def _run(self, files: Sequence[str]) -> tuple[torch.Tensor, NDArray[np.float64]]:
        """The prediction (K, X', Y', Z') and its affine."""
        from monai.data import decollate_batch, list_data_collate

        keys = self._before.transforms[0].keys
        data: dict[str, Any]
        if len(keys) == len(files):
            data = dict(zip(keys, files, strict=True))
        else:
            data = dict.fromkeys(keys, files if len(files) > 1 else files[0])
        batch = list_data_collate([self._before(data)])
        batch["pred"] = self._inferer(batch["image"].to(self._device), self.network)
        pred = self._after(decollate_batch(batch)[0])["pred"]
        affine = np.asarray(getattr(pred, "affine", batch["image"].affine[0]), dtype=np.float64)
        return torch.as_tensor(np.asarray(pred.cpu())).float(), affine

    def _label_map(self, found: torch.Tensor) -> NDArray[np.integer]:
        """One label map of a prediction: of overlapping channels painted, of classes the strongest."""
        if found.ndim != 4:
            raise BundleError(self._bundle.name, f"gave an array of shape {tuple(found.shape)}", "see its docs")
        if len(found) == 1:
            values = found[0].round().numpy()
            if not (np.isfinite(values).all() and values.min() >= 0 and values.max() < 65536):
                raise BundleError(self._bundle.name, "gave values that are no labels", "see its docs")
            return values.astype(np.uint8 if values.max() < 256 else np.uint16)
        outputs = dict(enumerate(self._bundle.spec.labels.values()))
        if bool(((found == 0) | (found == 1)).all()):
            regions, self.labels = overlapping(outputs)
            labels = np.zeros(found.shape[1:], dtype=np.uint8)
            paint_regions(found, regions, labels)
            return labels
        self.labels = self._bundle.spec.labels
        return found.argmax(dim=0).numpy().astype(np.uint8 if len(found) < 256 else np.uint16)


def own_pipeline(bundles: Sequence[Bundle], device: torch.device) -> OwnPipeline | None:
    """The pipeline of a bundle that has to run its own; None where medseg's engine does the work.

    Raises:
        BundleError: it is one of several bundles, or its code failed.
    """
    own = [(one, one.own_code) for one in bundles if one.own_code is not None and one.own_code.pipeline]
    if not own:
        return None
    bundle, code = own[0]
    if len(bundles) > 1:
        raise BundleError(bundle.name, "runs its own pipeline and gives no probabilities to average", "run it alone")
    return OwnPipeline(bundle, code, device)


def _saved(volume: Volume, folder: Path) -> list[str]:
    """One uncompressed NIfTI file for each channel."""
    import nibabel as nib

    found = []
    for number, channel in enumerate(volume.data):
        path = folder / f"channel_{number}.nii"
        image = nib.Nifti1Image(  # type: ignore[no-untyped-call]
            np.asarray(channel, dtype=np.float32), volume.affine
        )
        nib.save(image, path)
        found.append(str(path))
    return found


def _on_grid(labels: NDArray[np.integer], affine: NDArray[np.float64], volume: Volume) -> NDArray[np.integer]:
    """Labels (X', Y', Z') on the scan's grid, by the nearest voxel; outside 0."""
    if labels.shape == volume.shape and np.allclose(affine, volume.affine, atol=_SAME_MM):
        return labels
    there = np.linalg.inv(affine) @ volume.affine
    found: NDArray[np.integer] = ndimage.affine_transform(
        labels, there[:3, :3], there[:3, 3], output_shape=volume.shape, order=0
    )
    return found
