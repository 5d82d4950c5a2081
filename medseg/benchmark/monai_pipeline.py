"""What a MONAI user would run with a bundle's weights and settings: MONAI's transforms, inferer and inverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai import transforms
from monai.inferers import SlidingWindowInferer
from numpy.typing import NDArray

from medseg.benchmark.cost import windows_of
from medseg.benchmark.meter import Meter, NetworkClock
from medseg.bundles.load import Bundle
from medseg.bundles.spec import BundleSpec, config_of
from medseg.inference.slice_inferer import SliceInferer
from medseg.networks.registry import names


def run_monai(
    bundle: Bundle, scans: Sequence[Path], output: Path, device: torch.device, meter: Meter, clock: NetworkClock
) -> int:
    """Segment a scan with MONAI; arguments and result as those of `run_medseg`.

    Each class is brought back to the scan's grid with linear interpolation before the strongest wins, as bundles of
    medseg are defined. A 2D network goes over the slices by the inferer that its bundle names.
    """
    spec = bundle.spec
    forward = _preprocessing(spec)
    preprocessing = transforms.Compose(forward)
    back = transforms.Compose(
        [
            transforms.Activationsd("pred", sigmoid=spec.activation == "sigmoid", softmax=spec.activation == "softmax"),
            transforms.Invertd(
                "pred", transform=preprocessing, orig_keys="image", nearest_interp=False, to_tensor=True
            ),
        ]
    )
    network = clock.attach(bundle.network().to(device))

    meter.begin("read")
    data: Any = {"image": [str(scan) for scan in scans] if len(scans) > 1 else str(scans[0])}
    for transform in forward[:2]:
        data = transform(data)
    meter.begin("preprocess")
    for transform in forward[2:]:
        data = transform(data)
    meter.begin("network")
    image = data["image"].to(device)
    with torch.inference_mode():
        data["pred"] = _inferer(spec)(image[None], network)[0] / spec.calibration.temperature
    meter.begin("restore")
    restored = back(data)["pred"]
    labels = _labels(restored, spec)
    meter.begin("write")
    written: Any = nib.Nifti1Image(labels, np.asarray(restored.affine))  # type: ignore[no-untyped-call]
    nib.save(written, output)
    meter.end()
    return windows_of(spec, image.shape[1:])


def _preprocessing(spec: BundleSpec) -> list[Any]:
    """The transforms that a bundle's inference.json names; the first two read the scan."""
    config = config_of(
        replace(spec, network=names()[0])
    )  # `quant` has no entry there, and the network is not looked at
    return [
        getattr(transforms, entry["_target_"])(**{key: value for key, value in entry.items() if key != "_target_"})
        for entry in config["preprocessing"]["transforms"]
    ]


def _inferer(spec: BundleSpec) -> Any:
    if spec.slices is not None:
        return SliceInferer.of(spec)
    return SlidingWindowInferer(
        spec.roi_size,
        sw_batch_size=spec.sw_batch_size,
        overlap=spec.overlap,
        mode=spec.blend,
        padding_mode=spec.padding,
        cval=spec.padding_value,
    )


def _labels(probabilities: torch.Tensor, spec: BundleSpec) -> NDArray[np.unsignedinteger[Any]]:
    """Label map (X, Y, Z) from probabilities (K, X, Y, Z)."""
    kind = np.uint8 if max(spec.labels) < 256 else np.uint16
    if not spec.regions:
        return np.asarray(transforms.AsDiscrete(argmax=True)(probabilities)[0].cpu()).astype(kind)
    labels = np.zeros(probabilities.shape[1:], dtype=kind)
    for region in spec.regions:
        labels[np.asarray(probabilities[region.channel].cpu()) > 0.5] = region.label
    return labels
