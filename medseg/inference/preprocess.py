"""From a volume to the network's input, and the way back to the volume's own grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundles.spec import BundleSpec
from medseg.inference.intensity import apply_intensity
from medseg.inference.resample import resample_cubic, resample_linear
from medseg.io import geometry
from medseg.io.volume import Volume

# Voxel sizes that agree to this fraction are one grid; it also absorbs float32 headers.
_SAME_SPACING = 1e-3


@dataclass(frozen=True)
class ModelGrid:
    """How a scan's voxels become the model's: axes turned, then resampled.

    Attributes:
        order: the turn of the axes.
        turned_shape: the scan's shape after the turn.
        shape: the model grid's shape.
        step: distance of two model voxels in turned scan voxels, for each axis.
        affine: of the model grid, voxel index to RAS mm.
    """

    order: geometry.AxisOrder
    turned_shape: tuple[int, int, int]
    shape: tuple[int, int, int]
    step: tuple[float, float, float]
    affine: NDArray[np.float64]

    @property
    def resampled(self) -> bool:
        """Whether the model grid has other voxels than the scan."""
        return self.shape != self.turned_shape or self.step != (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Case:
    """A scan on its way through the network.

    Attributes:
        image: (C, X', Y', Z') float32 on the model grid, intensity steps applied.
        grid: how to go back.
    """

    image: Tensor
    grid: ModelGrid


def model_grid(shape: tuple[int, int, int], affine: NDArray[np.float64], spec: BundleSpec) -> ModelGrid:
    """The grid on which the network sees a scan.

    Args:
        shape: the scan's spatial shape.
        affine: the scan's affine.
        spec: orientation and spacing of the bundle; None keeps the scan's.
    """
    order = geometry.AxisOrder.to_canonical(affine, spec.orientation or geometry.orientation(affine))
    turned_affine, turned_shape = order.affine(affine, shape), order.shape(shape)
    spacing = geometry.spacing(turned_affine)
    if spec.spacing is None or np.allclose(spacing, spec.spacing, rtol=_SAME_SPACING, atol=0):
        return ModelGrid(order, turned_shape, turned_shape, (1.0, 1.0, 1.0), turned_affine)
    sx, sy, sz = (float(new / old) for new, old in zip(spec.spacing, spacing, strict=True))
    return ModelGrid(
        order,
        turned_shape,
        geometry.resampled_shape(turned_shape, spacing, spec.spacing),
        (sx, sy, sz),
        geometry.resampled_affine(turned_affine, spec.spacing),
    )


def preprocess(volume: Volume, spec: BundleSpec) -> Case:
    """Turn, resample and normalise a volume as the bundle was trained.

    Returns:
        The case; its image is (C, X', Y', Z') float32.
    """
    grid = model_grid(volume.shape, volume.affine, spec)
    turned = grid.order.apply(volume.data)
    if grid.resampled:
        resample = resample_cubic if spec.interpolation == "cubic" else resample_linear
        image = resample(turned, grid.shape, grid.step)
    else:
        image = torch.from_numpy(np.ascontiguousarray(turned, dtype=np.float32))
    for step in spec.intensity:
        image = apply_intensity(image, step)
    return Case(image, grid)


def to_model_grid(labels: NDArray[np.integer], affine: NDArray[np.float64], spec: BundleSpec) -> Tensor:
    """A label map (X, Y, Z) on the model grid, uint8, for training.

    Each label is resampled linearly and the strongest wins, as in inference on the way back.
    """
    x, y, z = labels.shape
    grid = model_grid((x, y, z), affine, spec)
    turned = torch.from_numpy(np.ascontiguousarray(grid.order.apply(labels))).to(torch.uint8)
    if not grid.resampled:
        return turned
    planes = (resample_linear((turned == value).float()[None], grid.shape, grid.step)[0] for value in spec.labels)
    return strongest(planes)


def strongest(planes: Iterator[Tensor]) -> Tensor:
    """Index of the largest of several maps at each voxel, the first where two are equal; uint8 below 256 maps.

    Args:
        planes: maps of one shape, one after the other, so that no more than two are alive.
    """
    best = next(planes)
    winner = torch.zeros(best.shape, dtype=torch.int16)
    for index, plane in enumerate(planes, start=1):
        better = plane > best
        winner[better] = index
        best = torch.where(better, plane, best)
    return winner.to(torch.uint8) if int(winner.max()) < 256 else winner
