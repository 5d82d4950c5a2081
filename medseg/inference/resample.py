"""Linear resampling between grids that share axes and first voxel: one interpolation along each axis in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def resample_linear(image: Tensor, shape: Sequence[int], step: Sequence[float]) -> Tensor:
    """Sample an image on another grid, linear inside, border value outside.

    Args:
        image: (C, X, Y, Z) float32.
        shape: spatial shape of the wanted grid.
        step: distance of two wanted samples along each axis in voxels of `image`; the first samples coincide.

    Returns:
        (C, *shape) float32.
    """
    for axis, (size, stride) in enumerate(zip(shape, step, strict=True), start=1):
        image = _along(image, axis, size, stride)
    return image


def _along(image: Tensor, axis: int, size: int, stride: float) -> Tensor:
    last = image.shape[axis] - 1
    if stride == 1.0 and size == last + 1:
        return image
    position = (torch.arange(size, dtype=torch.float64) * stride).clamp(max=last)
    lower = position.floor().to(torch.int64).clamp(max=max(last - 1, 0))
    weight = (position - lower).to(torch.float32)
    view = [1] * image.ndim
    view[axis] = size
    below = image.index_select(axis, lower.to(image.device))
    above = image.index_select(axis, (lower + 1).clamp(max=last).to(image.device))
    return torch.lerp(below, above, weight.to(image.device).reshape(view))
