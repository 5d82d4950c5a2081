"""Distance between the surfaces of two masks: HD95 and NSD, by MONAI's metrics.

The masks are cropped to the box around both before any distance is computed, so the cost follows the size of the
structure and not the size of the scan.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

# MONAI's distances are float32: without this a distance of exactly 0.3 mm would miss a tolerance of 0.3 mm.
_SLACK_MM = 1e-4


def hausdorff_95(prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Sequence[float]) -> float:
    """95th percentile of the Hausdorff distance in millimetres.

    A surface is the set of voxels of a mask that have a face neighbour outside it (outside the array counts as outside
    the mask). From each surface voxel of one mask the distance to the nearest surface voxel of the other is taken,
    centre to centre; the result is the larger of the two directions' 95th percentiles.

    Args:
        prediction: mask (X, Y, Z).
        reference: mask (X, Y, Z).
        spacing: voxel size in mm along each array axis.

    Returns:
        Millimetres; infinity when just one mask is empty, NaN (not applicable) when both are.

    Raises:
        ValueError: the shapes differ.
    """
    cropped = _crop_to_union(prediction, reference)
    if cropped is None:
        return _when_empty(prediction, reference, one_empty=math.inf)
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    p, r = (torch.from_numpy(mask)[None, None] for mask in cropped)
    with _monai_quiet():
        distance = compute_hausdorff_distance(p, r, include_background=True, percentile=95, spacing=list(spacing))
    return float(distance[0, 0])


def surface_dice(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing: Sequence[float],
    *,
    tolerance_mm: float = 1.0,
) -> float:
    """Normalised surface Dice (NSD): the share of both surfaces that lies within a tolerance of the other one.

    The surface is the polygonal one of DeepMind's `surface-distance` (marching cubes between the voxels' centres), and
    each of its elements counts with its area in mm2, so that anisotropic voxels are weighted rightly. A distance that
    equals the tolerance counts as within.

    Args:
        prediction: mask (X, Y, Z).
        reference: mask (X, Y, Z).
        spacing: voxel size in mm along each array axis.
        tolerance_mm: largest distance in mm that counts as agreement, 0 or more.

    Returns:
        0 to 1; 0 when just one mask is empty, NaN (not applicable) when both are.

    Raises:
        ValueError: the shapes differ, or the tolerance is negative or not finite.
    """
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise ValueError(f"tolerance_mm must be a finite number, 0 or more, got {tolerance_mm}")
    cropped = _crop_to_union(prediction, reference)
    if cropped is None:
        return _when_empty(prediction, reference, one_empty=0.0)
    import torch
    from monai.metrics.surface_dice import compute_surface_dice

    p, r = (torch.from_numpy(mask)[None, None] for mask in cropped)
    with _monai_quiet():
        score = compute_surface_dice(
            p,
            r,
            class_thresholds=[tolerance_mm + _SLACK_MM],
            include_background=True,
            spacing=list(spacing),
            use_subvoxels=True,
        )
    return float(score[0, 0])


def _crop_to_union(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """Both masks in the box around both, with an empty voxel on every side; None when a mask is empty."""
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(f"masks must have one shape (X, Y, Z), got {prediction.shape} and {reference.shape}")
    if not prediction.any() or not reference.any():
        return None
    union = prediction | reference
    box = []
    for axis in range(3):
        used = np.flatnonzero(union.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    region = tuple(box)
    return np.pad(prediction[region], 1), np.pad(reference[region], 1)


def _when_empty(prediction: NDArray[np.bool_], reference: NDArray[np.bool_], *, one_empty: float) -> float:
    """The value of a metric when at least one mask is empty."""
    return one_empty if prediction.any() or reference.any() else math.nan


@contextmanager
def _monai_quiet() -> Iterator[None]:
    """Hide MONAI's warnings about deprecated arguments that MONAI itself passes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*get_mask_edges")
        yield
