"""Resampling between grids that share axes and first voxel: one interpolation along each axis in turn.

A volume is worked through in slabs of a few planes, which stay in the processor's cache and need no further copy of the
volume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.inference.spline import repeated_spline

# Planes read at once from a source of any layout: a cache line of 64 bytes holds 16 float32 values.
_SLAB = 16
# Samples for each small matrix of a cubic spline: more of them read fewer voxels twice, and multiply more zeros.
_BLOCK = 32
# Weights of a spline fall by a factor of 0.27 a voxel; below this they do not show in float32.
_NEGLIGIBLE = 1e-8


@dataclass(frozen=True)
class Positions:
    """Where the samples of an axis lie between the samples of another: sample i is a + weight (b - a).

    Attributes:
        lower: index of a for each sample, int64.
        upper: index of b; that of a where the sample lies on it.
        weight: float32 in [0, 1).
    """

    lower: Tensor
    upper: Tensor
    weight: Tensor

    @classmethod
    def along(
        cls, size_in: int, size_out: int, stride: float, *, centred: bool = False, nearest: bool = False
    ) -> Positions:
        """Positions of `size_out` samples, `stride` voxels apart, on an axis of `size_in`.

        The first ones coincide, or with `centred` the edges do. What lies past an end takes the last voxel there.
        With `nearest` a sample is the voxel next to it, the later of two.
        """
        position = _coordinates(size_out, stride, centred=centred).clamp(0, size_in - 1)
        position = (position + 0.5).floor() if nearest else position
        lower = position.floor().to(torch.int64)
        weight = (position - lower).to(torch.float32)
        rounded_up = weight == 1
        lower, weight = lower + rounded_up, weight.masked_fill(rounded_up, 0)
        return cls(lower, torch.where(weight > 0, lower + 1, lower), weight)

    @property
    def identity(self) -> bool:
        """Whether the samples are the voxels themselves, up to those past the last sample."""
        return bool((self.lower == torch.arange(len(self.lower))).all()) and not bool(self.weight.any())

    def sample(self, image: Tensor, axis: int) -> Tensor:
        """Interpolate an image of floats along one of its axes."""
        if self.identity:
            return image.narrow(axis, 0, len(self.lower))
        view = [1] * image.ndim
        view[axis] = -1
        below, above = image.index_select(axis, self.lower), image.index_select(axis, self.upper)
        return torch.lerp(below, above, self.weight.reshape(view), out=below)


def _coordinates(size: int, stride: float, *, centred: bool) -> Tensor:
    """Where samples lie in voxels, (size,) float64: first ones coincide, or edges."""
    index = torch.arange(size, dtype=torch.float64)
    return stride * (index + 0.5) - 0.5 if centred else index * stride


def resample_linear(
    image: Tensor | NDArray[Any], shape: Sequence[int], step: Sequence[float], *, centred: bool = False
) -> Tensor:
    """Sample an image on another grid, linear inside, border value outside.

    Args:
        image: (C, X, Y, Z) of any real type and any layout, a view with flipped axes included.
        shape: spatial shape of the wanted grid.
        step: distance of two wanted samples along each axis in voxels of `image`; the first samples coincide.
        centred: the edges of the grids coincide instead, as voxels are squares and not points.

    Returns:
        (C, *shape) float32.
    """
    source = image.numpy() if isinstance(image, Tensor) else image
    planes, rows, columns = (
        Positions.along(size_in, size_out, stride, centred=centred)
        for size_in, size_out, stride in zip(source.shape[1:], shape, step, strict=True)
    )
    result = torch.empty((source.shape[0], *shape), dtype=torch.float32)
    for channel, target in zip(source, result, strict=True):
        slab, begin = np.empty((0, 0, 0), dtype=np.float32), 0
        for index, (low, high, weight) in enumerate(
            zip(planes.lower.tolist(), planes.upper.tolist(), planes.weight.tolist(), strict=True)
        ):
            if high >= begin + len(slab):
                begin = low
                slab = _contiguous(channel[begin : max(begin + _SLAB, high + 1)])
            below = torch.from_numpy(slab[low - begin])
            plane = torch.lerp(below, torch.from_numpy(slab[high - begin]), weight) if weight else below
            target[index] = columns.sample(rows.sample(plane, 0), 1)
    return result


class CubicAxis:
    """A cubic spline along one axis, as small dense matrices on a band: a wanted sample needs about 30 voxels.

    Args:
        size_in: voxels on the axis.
        size_out: wanted samples; the first coincides with the first voxel.
        stride: distance of two samples in voxels.
        centred: the edges coincide instead.

    Attributes:
        blocks: (samples from, to, voxels from, to, weights float32 (to - from, to - from)), in order.
    """

    def __init__(self, size_in: int, size_out: int, stride: float, *, centred: bool = False) -> None:
        matrix = repeated_spline(_coordinates(size_out, stride, centred=centred), size_in)
        used = matrix.abs() > _NEGLIGIBLE
        self.identity = size_in == size_out and stride == 1.0
        self.blocks: list[tuple[int, int, int, int, Tensor]] = []
        for first in range(0, size_out, _BLOCK):
            last = min(first + _BLOCK, size_out)
            voxels = used[first:last].any(dim=0).nonzero()
            low, high = int(voxels[0]), int(voxels[-1]) + 1
            self.blocks.append((first, last, low, high, matrix[first:last, low:high].to(torch.float32).contiguous()))

    def rows(self, plane: Tensor) -> Tensor:
        """Sample a plane (n, m) along its first axis."""
        if self.identity:
            return plane
        return torch.cat([weights @ plane[low:high] for _, _, low, high, weights in self.blocks])

    def columns(self, plane: Tensor) -> Tensor:
        """Sample a plane (n, m) along its second axis."""
        if self.identity:
            return plane
        return torch.cat([plane[:, low:high] @ weights.T for _, _, low, high, weights in self.blocks], dim=1)


def resample_cubic(
    image: Tensor | NDArray[Any], shape: Sequence[int], step: Sequence[float], *, centred: bool = False
) -> Tensor:
    """Sample an image on another grid with a cubic spline, the border voxels repeated outside.

    What `scipy.ndimage.map_coordinates(order=3, mode="nearest")` gives, and so MONAI's `Spacing` with ``mode=3``.

    Args:
        image: (C, X, Y, Z) of any real type and any layout, a view with flipped axes included.
        shape: spatial shape of the wanted grid.
        step: distance of two wanted samples along each axis in voxels of `image`; the first samples coincide.
        centred: the edges of the grids coincide instead.

    Returns:
        (C, *shape) float32.
    """
    source = image.numpy() if isinstance(image, Tensor) else image
    planes, rows, columns = (
        CubicAxis(size_in, size_out, stride, centred=centred)
        for size_in, size_out, stride in zip(source.shape[1:], shape, step, strict=True)
    )
    result = torch.empty((source.shape[0], *shape), dtype=torch.float32)
    for channel, target in zip(source, result, strict=True):
        held: deque[Tensor] = deque()  # planes sampled within, of the voxels that the next blocks need
        begin = end = 0
        for first, last, low, high, weights in planes.blocks:
            while begin < low:
                held.popleft()
                begin += 1
            while end < high:
                slab = torch.from_numpy(_contiguous(channel[end : end + _SLAB]))
                held.extend(columns.columns(rows.rows(plane)) for plane in slab)
                end += len(slab)
            needed = torch.stack([held[index] for index in range(high - low)])
            torch.mm(weights, needed.flatten(1), out=target[first:last].view(last - first, -1))
    return result


def _contiguous(slab: NDArray[Any]) -> NDArray[np.float32]:
    """A slab (n, Y, Z) of any type and layout as float32 in C order."""
    if abs(slab.strides[0]) >= abs(slab.strides[2]):
        return np.ascontiguousarray(slab, dtype=np.float32)
    # Voxels along the first axis lie next to each other: by planes of the last one, each cache line is read once.
    result = np.empty(slab.shape, dtype=np.float32)
    for index in range(slab.shape[2]):
        result[:, :, index] = slab[:, :, index]
    return result
