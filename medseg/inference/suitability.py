"""Is this scan what the bundle was trained on?"""

from __future__ import annotations

import numpy as np

from medseg.bundles.spec import BundleSpec
from medseg.io import geometry
from medseg.io.volume import Volume

_AXES = ("left-right", "posterior-anterior", "inferior-superior")
# Air is -1000 HU. No MR scanner stores magnitudes far below 0, and CT almost always holds some air.
_AIR_HU = -500.0


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
    lowest = float(volume.data.min())
    if suitable.modality == "MR" and lowest < _AIR_HU:
        found.append(f"intensities down to {lowest:.0f} look like CT; the bundle was trained on MR")
    if suitable.modality == "CT" and lowest >= 0 and float(volume.data.max()) > 0:
        found.append("no intensity below 0, so not Hounsfield units; the bundle was trained on CT")
    return found


def _outside(
    what: str,
    values: np.ndarray,
    bounds: tuple[tuple[float, float, float], tuple[float, float, float]],
    tolerance: float,
) -> list[str]:
    return [
        f"{what} {axis} is {value:.4g} mm; the bundle was trained on {low:.4g} to {high:.4g} mm"
        for axis, value, low, high in zip(_AXES, values.tolist(), *bounds, strict=True)
        if not low / tolerance <= value <= high * tolerance
    ]
