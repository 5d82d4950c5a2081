"""What a volume must fulfil whatever its format: axes, channels, a plausible grid, finite voxels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, UsageError
from medseg.io import geometry

SMALLEST_SPACING_MM = 0.01
LARGEST_SPACING_MM = 50.0
LARGEST_EXTENT_MM = 4000.0
LARGEST_COORDINATE_MM = 1e7


def volume_shape(path: Path, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape (X, Y, Z) or (X, Y, Z, C) of a file's array, trailing axes of one voxel removed.

    Raises:
        InputError: fewer than three axes, more than four, or an empty axis.
    """
    axes = tuple(int(n) for n in shape)
    if any(n < 1 for n in axes):
        raise InputError(path, f"shape {axes}: every axis needs at least one voxel", "export the scan again")
    if len(axes) < 3:
        count = {0: "no dimensions", 1: "one dimension", 2: "two dimensions"}[len(axes)]
        raise InputError(path, f"{count} {axes}; medseg reads volumes", "give the whole series as one file")
    while len(axes) > 3 and axes[-1] == 1:
        axes = axes[:-1]
    if len(axes) > 4:
        raise InputError(path, f"shape {axes}: {len(axes)} axes; medseg reads (x, y, z) and (x, y, z, channels)")
    return axes


def wanted_volumes(path: Path, shape: Sequence[int], channels: int | None, volume_index: int | None) -> list[int]:
    """Which volumes of a file (X, Y, Z[, C]) become channels.

    Args:
        path: for the message.
        shape: of the file's array.
        channels: how many the bundle takes; None accepts what is there.
        volume_index: the one volume to take, counted from 0.

    Raises:
        UsageError: `volume_index` is out of range.
        InputError: the file holds another number of channels.
    """
    there = shape[3] if len(shape) == 4 else 1
    if volume_index is not None:
        if not 0 <= volume_index < there:
            raise UsageError("--volume", f"{volume_index} is out of range", f"{path} holds volumes 0 to {there - 1}")
        wanted = [volume_index]
    else:
        wanted = list(range(there))
    if channels is None or len(wanted) == channels:
        return wanted
    size = tuple(shape)
    takes = f"the bundle takes {channels} channel{'s' if channels > 1 else ''}"
    if channels == 1 and shape[2] == 1:
        raise InputError(path, f"shape {size}: slices lie on the fourth axis", "save them as (x, y, z)")
    if channels == 1:
        remedy = f"choose one with --volume N, 0 to {there - 1}"
        raise InputError(path, f"shape {size}: {there} volumes; {takes}", remedy)
    remedy = f"give {channels} files, or one of shape (x, y, z, {channels})"
    raise InputError(path, f"shape {size}: {len(wanted)} of {channels} channels; {takes}", remedy)


def check_grid(path: Path, shape: Sequence[int], affine: geometry.Affine) -> list[str]:
    """Refuse a grid that cannot be a scan's.

    Args:
        path: for the message.
        shape: (X, Y, Z).
        affine: in millimetres.

    Returns:
        Warnings.

    Raises:
        InputError: singular affine, or a voxel size or extent that no scanner has.
    """
    if not np.isfinite(affine).all():
        raise InputError(path, "the affine holds NaN or infinite values", "export the scan again")
    if np.abs(affine).max() > LARGEST_COORDINATE_MM:
        raise InputError(path, "implausible position or voxel size, kilometres off", "export the scan again")
    if geometry.is_singular(affine):
        raise InputError(path, "the affine is singular: its axes do not span space", "export the scan again")
    size = geometry.spacing(affine)
    extent = geometry.extent_mm(shape, affine)
    if size.min() < SMALLEST_SPACING_MM or size.max() > LARGEST_SPACING_MM or extent.max() > LARGEST_EXTENT_MM:
        found = " x ".join(f"{n:.4g}" for n in size)
        raise InputError(
            path,
            f"implausible voxel size {found} mm for shape {tuple(shape)}; are the units right?",
            f"expected {SMALLEST_SPACING_MM} to {LARGEST_SPACING_MM:g} mm and at most {LARGEST_EXTENT_MM / 1000:g} m",
        )
    if not geometry.is_orthogonal(affine):
        angle = geometry.shear_degrees(affine)
        return [f"the voxel axes are {angle:.1f} degrees off a right angle; results may be worse, resample first"]
    return []


def make_finite(path: Path, data: NDArray[np.float32]) -> list[str]:
    """Replace NaN and infinite voxels in place: NaN and -Inf by the smallest finite value, +Inf by the largest.

    Args:
        path: for the message.
        data: voxels (C, X, Y, Z); each channel is treated alone.

    Returns:
        Warnings, which count the voxels.

    Raises:
        InputError: a channel has no finite voxel.
    """
    replaced = 0
    for channel in data:
        finite = np.isfinite(channel)
        missing = finite.size - int(np.count_nonzero(finite))
        if not missing:
            continue
        if missing == finite.size:
            raise InputError(path, "no voxel has a finite value", "export the scan again")
        values = channel[finite]
        low, high = values.min(), values.max()
        np.nan_to_num(channel, copy=False, nan=low, posinf=high, neginf=low)
        replaced += missing
    if not replaced:
        return []
    share = 100.0 * replaced / data.size
    return [f"{replaced} voxels ({share:.3g} %) are NaN or infinite and were replaced"]


def to_integers(path: Path, data: NDArray[np.generic]) -> NDArray[np.integer]:
    """Integer labels of an array of any real type; whole numbers held as floats are accepted.

    Raises:
        InputError: values that are not whole numbers, or too large for 32 bits.
    """
    if np.issubdtype(data.dtype, np.integer):
        whole: NDArray[np.integer] = data  # type: ignore[assignment]
        return whole
    values: NDArray[np.floating] = data  # type: ignore[assignment]
    if not np.isfinite(values).all() or (values != np.rint(values)).any():
        raise InputError(path, "not a label map: values that are not whole numbers", "give the map of labels")
    if np.abs(values).max() >= 2**31:
        raise InputError(path, "not a label map: values beyond 32 bits", "give the map of labels")
    return values.astype(np.int32)
