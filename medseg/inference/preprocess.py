"""From a volume to the network's input, and the way back to the volume's own grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundles.nnunet import NNUNetScheme
from medseg.bundles.spec import BundleSpec, CropForeground, WayBack
from medseg.inference import nnunet
from medseg.inference.intensity import apply_intensity
from medseg.inference.nnunet import Box
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
        way_back: how the scan's voxels take their values from the model's.
        box: the part of the turned scan that the model grid covers; None: all of it.
        centred: the edges of the two grids coincide, and not their first voxels.
        apart: with a linear way back, the axis along which the nearest model voxel counts; None: no axis.
    """

    order: geometry.AxisOrder
    turned_shape: tuple[int, int, int]
    shape: tuple[int, int, int]
    step: tuple[float, float, float]
    affine: NDArray[np.float64]
    way_back: WayBack = "linear"
    box: Box | None = None
    centred: bool = False
    apart: int | None = None

    @property
    def inside(self) -> Box:
        """The part of the turned scan that the model grid covers."""
        x, y, z = (slice(0, size) for size in self.turned_shape)
        return (x, y, z) if self.box is None else self.box

    @property
    def covered(self) -> tuple[int, int, int]:
        """Shape of that part."""
        x, y, z = (part.stop - part.start for part in self.inside)
        return x, y, z

    @property
    def step_back(self) -> tuple[float, float, float]:
        """Distance of two turned scan voxels in model voxels, for each axis."""
        if self.centred:  # exactly this quotient: where a scan's voxel lies midway between two, it decides
            x, y, z = (model / scan for model, scan in zip(self.shape, self.covered, strict=True))
        else:
            x, y, z = (1 / step for step in self.step)
        return x, y, z

    @property
    def nearest(self) -> tuple[bool, bool, bool]:
        """Along which axes the way back takes the nearest model voxel."""
        x, y, z = (self.way_back == "nearest" or axis == self.apart for axis in range(3))
        return x, y, z

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
        crop: the part of the model grid that the image covers; None: all of it.
    """

    image: Tensor
    grid: ModelGrid
    crop: Box | None = None


def model_grid(
    shape: tuple[int, int, int], affine: NDArray[np.float64], spec: BundleSpec, *, box: Box | None = None
) -> ModelGrid:
    """The grid on which the network sees a scan.

    Args:
        shape: the scan's spatial shape.
        affine: the scan's affine.
        spec: orientation and spacing of the bundle; None keeps the scan's.
        box: for a bundle of nnU-Net, what of the turned scan is not zero; None: all of it.
    """
    order = turn(affine, spec)
    turned_affine, turned_shape = order.affine(affine, shape), order.shape(shape)
    if spec.nnunet is not None:
        return _edge_to_edge(order, turned_affine, turned_shape, spec.nnunet, box)
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
        spec.way_back,
    )


def turn(affine: NDArray[np.float64], spec: BundleSpec) -> geometry.AxisOrder:
    """How a scan's axes become the model's."""
    axes = spec.orientation or geometry.orientation(affine)
    if spec.nnunet is not None:
        axes = "".join(axes[axis] for axis in spec.nnunet.axes)
    return geometry.AxisOrder.to_canonical(affine, axes)


def _edge_to_edge(
    order: geometry.AxisOrder,
    affine: NDArray[np.float64],
    shape: tuple[int, int, int],
    scheme: NNUNetScheme,
    box: Box | None,
) -> ModelGrid:
    """The grid of nnU-Net: the covered part has a whole number of voxels near the wanted spacing."""
    # An affine of single precision gives an edge of 0.8 mm a few units off in the last place; nnU-Net's readers do not.
    x, y, z = (float(np.float32(edge)) for edge in geometry.spacing(affine))
    target = scheme.target((x, y, z))
    grid = ModelGrid(order, shape, shape, (1.0, 1.0, 1.0), affine, box=box, centred=True)
    first, second, third = (
        max(1, round(old / new * size)) for old, new, size in zip((x, y, z), target, grid.covered, strict=True)
    )
    step = [size / model for size, model in zip(grid.covered, (first, second, third), strict=True)]
    placed = geometry.resampled_affine(affine, geometry.spacing(affine) * step)
    placed[:3, 3] = geometry.world(
        affine, [part.start + (one - 1) / 2 for part, one in zip(grid.inside, step, strict=True)]
    )
    apart = scheme.back.axis_apart(target, (x, y, z)) if scheme.back.order_z == 0 else None
    return replace(grid, shape=(first, second, third), step=(step[0], step[1], step[2]), affine=placed, apart=apart)


def preprocess(volume: Volume, spec: BundleSpec) -> Case:
    """Turn, resample and normalise a volume as the bundle was trained.

    Returns:
        The case; its image is (C, X', Y', Z') float32.
    """
    if spec.nnunet is not None:
        return _preprocess_nnunet(volume, spec, spec.nnunet)
    grid = model_grid(volume.shape, volume.affine, spec)
    turned = grid.order.apply(volume.data)
    if grid.resampled:
        resample = resample_cubic if spec.interpolation == "cubic" else resample_linear
        image = resample(turned, grid.shape, grid.step)
    else:
        image = torch.from_numpy(np.ascontiguousarray(turned, dtype=np.float32))
    crop: Box | None = None
    for step in spec.intensity:
        if isinstance(step, CropForeground):
            inner = foreground_box(image, step)
            image = image[(slice(None), *inner)]
            x, y, z = inner if crop is None else map(_within, crop, inner)
            crop = (x, y, z)
        else:
            image = apply_intensity(image, step)
    return Case(image.contiguous(), grid, crop)


def foreground_box(image: Tensor, step: CropForeground) -> Box:
    """The box of what `step` keeps of an image (C, X, Y, Z); all of it where nothing is above 0."""
    above = (image > 0).any(dim=0)
    found = []
    for axis, margin in enumerate(step.margin):
        others = [other for other in range(3) if other != axis]
        places = above.any(dim=others[1]).any(dim=others[0]).nonzero()
        if not len(places):
            return slice(0, image.shape[1]), slice(0, image.shape[2]), slice(0, image.shape[3])
        low, high = int(places[0]) - margin, int(places[-1]) + 1 + margin
        found.append(slice(max(low, 0), min(high, image.shape[1 + axis])))
    x, y, z = found
    return x, y, z


def _within(outer: slice, inner: slice) -> slice:
    """A part of a part."""
    return slice(outer.start + inner.start, outer.start + inner.stop)


def _preprocess_nnunet(volume: Volume, spec: BundleSpec, scheme: NNUNetScheme) -> Case:
    turned = turn(volume.affine, spec).apply(volume.data)
    grid = model_grid(volume.shape, volume.affine, spec, box=nnunet.nonzero_box(turned))
    image = nnunet.normalize(turned[(slice(None), *grid.inside)], scheme.normalization, name=volume.source.path.name)
    x, y, z = (float(np.float32(edge)) for edge in geometry.spacing(grid.order.affine(volume.affine, volume.shape)))
    how = scheme.resampling
    apart = how.axis_apart((x, y, z), scheme.target((x, y, z)))
    return Case(nnunet.resample(image, grid.shape, order=how.order, order_z=how.order_z, apart=apart), grid)


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
