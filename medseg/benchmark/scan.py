"""A CT-like scan of any size, the same one each time, for timing where no scan is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ORGANS = 13


def phantom_ct(shape: tuple[int, int, int]) -> NDArray[np.int16]:
    """An elliptic body in air, organs, a table, noise.

    Args:
        shape: voxels (X, Y, Z).

    Returns:
        HU, (X, Y, Z) int16, -1024 to 3071; the same for the same shape.
    """
    random = np.random.default_rng(0)
    x, y, z = (
        np.linspace(-1, 1, size, dtype=np.float32).reshape([-1 if other == axis else 1 for other in range(3)])
        for axis, size in enumerate(shape)
    )
    body = (x / 0.8) ** 2 + (y / 0.55) ** 2 < 1 + 0.1 * np.cos(3 * z)
    scan = np.where(body, np.float32(40), np.float32(-1000))
    for _ in range(_ORGANS):
        centre, radius = random.uniform(-0.4, 0.4, 3) * (1, 0.7, 1.6), random.uniform(0.08, 0.26, 3)
        parts = [((axis - c) / r) ** 2 for axis, c, r in zip((x, y, z), centre, radius, strict=True)]
        scan[(parts[0] + parts[1] + parts[2] < 1) & body] = random.uniform(-100, 250)
    scan[:, int(0.86 * shape[1]) : int(0.88 * shape[1])] = 120
    for plane in scan:  # plane by plane: the noise of a large scan would be several times the scan
        plane += random.normal(0, 15, plane.shape).astype(np.float32)
    return np.clip(np.rint(scan), -1024, 3071).astype(np.int16)


def save_phantom_ct(path: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    """Write `phantom_ct` as NIfTI with axes to the right, front and top (RAS).

    Args:
        path: ``.nii.gz`` or ``.nii``.
        shape: voxels (X, Y, Z).
        spacing: voxel size in mm.
    """
    import nibabel as nib

    image: Any = nib.Nifti1Image(phantom_ct(shape), np.diag([*spacing, 1.0]))  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
