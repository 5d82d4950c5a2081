"""Rigid registration of two phases of one examination, and resampling from one grid to another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.io.geometry import Affine, spacing

AIR_HU = -1024.0
"""What a resampled phase holds where it was not scanned."""

_WINDOW_HU = (-200.0, 300.0)  # fat, organs, vessels and the surface of bones
_GRID_MM = 3.0
_BINS = 32
_SAMPLES = 150_000
_SEED = 20230302
_STEPS_MM = (4.0, 0.005)
_ITERATIONS = 100
_COARSE_TO_FINE = ((4, 2.0), (2, 1.0), (1, 0.0))  # shrink factor, smoothing in voxels


@dataclass(frozen=True)
class Rigid:
    """A rigid motion, from places in the reference to the same places in the other scan.

    Attributes:
        matrix: (4, 4), RAS mm.
        shift_mm: what moves the middle of the reference's field of view, RAS mm.
        degrees: angle of the rotation.
    """

    matrix: NDArray[np.float64]
    shift_mm: tuple[float, float, float]
    degrees: float

    @property
    def distance_mm(self) -> float:
        """Length of the shift."""
        return math.hypot(*self.shift_mm)


def register(fixed: NDArray[np.float32], fixed_affine: Affine, moving: NDArray[np.float32], affine: Affine) -> Rigid:
    """Find the rigid motion that lays one CT onto another of the same patient.

    Mattes' mutual information, which is not misled by contrast medium, on voxels of up to 3 mm, from coarse to fine,
    beginning with the scanner's own coordinates. The same scans give the same motion on one machine.

    Args:
        fixed: (X, Y, Z) in HU.
        fixed_affine: of its grid.
        moving: (X', Y', Z') in HU.
        affine: of its grid.

    Raises:
        ValueError: the scans overlap too little for it.
    """
    sitk = _sitk()

    low, high = _WINDOW_HU
    still, moved = (
        _coarsened(sitk.Clamp(as_image(data, grid), sitk.sitkFloat32, low, high))
        for data, grid in ((fixed, fixed_affine), (moving, affine))
    )
    middle = still.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in still.GetSize()])
    motion = sitk.Euler3DTransform()
    motion.SetCenter(middle)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(min(1.0, _SAMPLES / math.prod(still.GetSize())), _SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(*_STEPS_MM, _ITERATIONS)
    method.SetOptimizerScalesFromPhysicalShift()
    shrink, smooth = zip(*_COARSE_TO_FINE, strict=True)
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel(smooth)
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetInitialTransform(motion, inPlace=True)
    # Sums of several threads differ in the last digits from run to run; the metric takes their number from here only.
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        method.Execute(still, moved)
    except RuntimeError as err:
        raise ValueError("registration found too little overlap") from err
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    centre = np.array(middle)
    lps = np.eye(4)
    lps[:3, :3] = np.array(motion.GetMatrix()).reshape(3, 3)
    lps[:3, 3] = np.array(motion.TransformPoint(middle)) - lps[:3, :3] @ centre
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    x, y, z = (float(value) for value in flip[:3, :3] @ np.array(motion.GetTranslation()))
    turn = math.degrees(math.acos(min(1.0, max(-1.0, (float(np.trace(lps[:3, :3])) - 1) / 2))))
    return Rigid(flip @ lps @ flip, (x, y, z), turn)


def resample_to(
    moving: NDArray[np.float32],
    affine: Affine,
    shape: tuple[int, int, int],
    wanted: Affine,
    rigid: Rigid | None = None,
    *,
    outside: float = AIR_HU,
) -> NDArray[np.float32]:
    """A scan on another grid, linear.

    Args:
        moving: (X', Y', Z').
        affine: of its grid.
        shape: of the wanted grid.
        wanted: affine of the wanted grid.
        rigid: from places on the wanted grid to the same places in the scan; None: the scanner's coordinates agree.
        outside: value where it was not scanned.

    Returns:
        `shape`, float32.
    """
    sitk = _sitk()

    transform = sitk.AffineTransform(3)
    if rigid is not None:
        flip = np.diag([-1.0, -1.0, 1.0, 1.0])
        lps = flip @ rigid.matrix @ flip
        transform.SetMatrix(lps[:3, :3].ravel().tolist())
        transform.SetTranslation(lps[:3, 3].tolist())
    method = sitk.ResampleImageFilter()
    method.SetSize([int(n) for n in shape])
    size, direction, origin = _itk_grid(wanted)
    method.SetOutputSpacing(size)
    method.SetOutputDirection(direction)
    method.SetOutputOrigin(origin)
    method.SetTransform(transform)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetDefaultPixelValue(outside)
    found = method.Execute(as_image(moving, affine))
    return np.ascontiguousarray(sitk.GetArrayFromImage(found).T, dtype=np.float32)


def as_image(data: NDArray[np.float32], affine: Affine) -> Any:
    """A SimpleITK image of voxels (X, Y, Z) on a grid."""
    sitk = _sitk()

    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T, dtype=np.float32))
    size, direction, origin = _itk_grid(affine)
    image.SetSpacing(size)
    image.SetDirection(direction)
    image.SetOrigin(origin)
    return image


def _sitk() -> Any:
    """SimpleITK, whose functions have no types."""
    import SimpleITK

    return SimpleITK


def _itk_grid(affine: Affine) -> tuple[list[float], list[float], list[float]]:
    """Spacing, direction (row by row) and origin of a grid, as ITK has them: LPS mm."""
    size = spacing(affine)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return size.tolist(), (lps[:3, :3] / size).ravel().tolist(), lps[:3, 3].tolist()


def _coarsened(image: Any) -> Any:
    """The image with voxels of up to `_GRID_MM`, each the mean of those it is made of."""
    sitk = _sitk()

    steps = [
        max(1, min(n // 16, math.floor(_GRID_MM / size)))
        for size, n in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    return sitk.BinShrink(image, steps)
