"""Cubic B-spline interpolation along an axis as one matrix, the prefilter folded in."""

from __future__ import annotations

import torch
from torch import Tensor

_EDGE = 12  # voxels that SciPy repeats beyond each end before it filters; what lies further has no weight


def mirrored_spline(coordinates: Tensor, size: int) -> Tensor:
    """The matrix (len(coordinates), size) float64 that interpolates `size` > 1 samples, mirrored at the ends.

    It is the cubic B-spline at the coordinates, times the inverse of the spline at the samples' own (the prefilter); it
    is what `scipy.ndimage` does with ``order=3, mode="mirror"``.

    Args:
        coordinates: float64, in [0, size - 1].
        size: samples on the axis.
    """
    at_samples = _spline_weights(torch.arange(size, dtype=torch.float64), size)
    matrix: Tensor = torch.linalg.solve(at_samples, _spline_weights(coordinates, size), left=False)
    return matrix


def repeated_spline(coordinates: Tensor, size: int) -> Tensor:
    """As `mirrored_spline`, but with the first and last sample repeated beyond the ends (SciPy's ``mode="nearest"``).

    Args:
        coordinates: float64; beyond the ends too, in front by no more than a few samples.
        size: samples on the axis, at least 1.
    """
    padded = mirrored_spline(coordinates.clamp(max=size - 1 + _EDGE) + _EDGE, size + 2 * _EDGE)
    matrix = padded[:, _EDGE : _EDGE + size].clone()
    matrix[:, 0] += padded[:, :_EDGE].sum(dim=1)
    matrix[:, -1] += padded[:, _EDGE + size :].sum(dim=1)
    return matrix


def _spline_weights(coordinates: Tensor, size: int) -> Tensor:
    """Cubic B-spline weights (len(coordinates), size) of `size` > 1 coefficients at coordinates in [0, size - 1]."""
    base = coordinates.floor()
    t = coordinates - base
    weights = [(1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3]
    matrix = torch.zeros(len(coordinates), size, dtype=torch.float64)
    for offset, weight in zip(range(-1, 3), weights, strict=True):
        index = (base.long() + offset).abs() % (2 * size - 2)
        mirrored = torch.minimum(index, 2 * size - 2 - index)
        matrix.scatter_add_(1, mirrored[:, None], weight[:, None] / 6)
    return matrix
