"""Is this scan what the bundle was trained on?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.bundles.spec import BundleSpec
from medseg.io import geometry
from medseg.io.volume import Volume

# Air is -1000 HU. No MR scanner stores magnitudes far below 0, and CT almost always holds some air.
_AIR_HU = -500.0
_SAMPLES = 1_000_000
_MOST_LABELS = 128
_THINNED = 100


def unsuitable(volume: Volume, spec: BundleSpec) -> list[str]:
    """Compare a scan with the ranges a bundle was trained on.

    Args:
        volume: the scan.
        spec: with `suitability`; a range that is not stated is not checked.

    Returns:
        One sentence for each thing that lies outside; empty when the scan is suitable.
    """
    suitable = spec.suitability
    found = []
    order = geometry.AxisOrder.to_canonical(volume.affine)
    turned, shape = order.affine(volume.affine, volume.shape), order.shape(volume.shape)
    if suitable.extent_mm is not None:
        found += _outside("field of view", geometry.extent_mm(shape, turned), suitable.extent_mm, suitable.tolerance)
    if suitable.spacing_mm is not None:
        found += _outside("voxel size", geometry.spacing(turned), suitable.spacing_mm, suitable.tolerance)
    if looks_like_labels(volume.data):
        found.append("looks like a label map, not like a scan")
    stated = volume.source.dicom.modality if volume.source.dicom is not None else ""
    if stated and suitable.modality and stated != suitable.modality:
        return [*found, f"modality {stated} instead of {suitable.modality}"]
    lowest = float(volume.data.min())
    if suitable.modality == "MR" and lowest < _AIR_HU:
        found.append(f"intensities down to {lowest:.0f} look like CT instead of MR")
    if suitable.modality == "CT" and lowest >= 0 and float(volume.data.max()) > 0:
        found.append("no intensity below 0, so no Hounsfield units of CT")
    return found


def looks_like_labels(data: NDArray[np.float32]) -> bool:
    """Whether an image (C, X, Y, Z) holds few whole numbers from 0, more than one, that stay together."""
    sample = sample_of(data)
    if np.unique(sample[::_THINNED]).size > _MOST_LABELS:  # a scan shows by a few of its voxels, without a long sort
        return False
    values = np.unique(sample)
    if not 2 <= values.size <= _MOST_LABELS or values[0] < 0 or values[-1] > np.iinfo(np.uint16).max:
        return False
    # Neighbours in a label map are mostly equal; in a coarse image they are not.
    return bool((values == np.rint(values)).all() and (data[..., 1:] == data[..., :-1]).mean() > 0.8)


def sample_of(data: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most about a million voxels, spread evenly."""
    flat = data.reshape(-1)
    return flat[:: max(1, flat.size // _SAMPLES)]


def _outside(
    what: str,
    values: np.ndarray,
    bounds: tuple[tuple[float, float, float], tuple[float, float, float]],
    tolerance: float,
) -> list[str]:
    """One sentence when a value lies outside its bounds, with all three axes: left-right, front-back, head-foot."""
    lows, highs = bounds
    if all(
        low / tolerance <= value <= high * tolerance
        for value, low, high in zip(values.tolist(), lows, highs, strict=True)
    ):
        return []
    found = " x ".join(f"{value:.4g}" for value in values.tolist())
    ranges = (f"{low:.4g}" if low == high else f"{low:.4g}-{high:.4g}" for low, high in zip(lows, highs, strict=True))
    return [f"{what} {found} mm instead of {' x '.join(ranges)} mm"]
