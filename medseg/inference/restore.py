"""From probabilities on the model grid to labels on the scan's own grid."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.inference.preprocess import ModelGrid, strongest
from medseg.inference.resample import resample_linear


def restore_labels(probabilities: Tensor, grid: ModelGrid) -> NDArray[np.integer]:
    """Labels on the scan's grid: each class is resampled linearly and the most probable one wins.

    Args:
        probabilities: (K, X', Y', Z') float32 on the model grid.
        grid: how the scan became the model grid.

    Returns:
        Labels (X, Y, Z), uint8 below 256 classes; where two classes are equal, the lower value.
    """
    labels: NDArray[np.integer] = grid.order.invert(strongest(_planes(probabilities, grid)).numpy())
    return np.ascontiguousarray(labels)


def restore_probabilities(probabilities: Tensor, grid: ModelGrid) -> NDArray[np.float32]:
    """Probabilities (K, X, Y, Z) float32 on the scan's grid."""
    turned = torch.stack(list(_planes(probabilities, grid))).numpy()
    return np.ascontiguousarray(grid.order.invert(turned))


def _planes(probabilities: Tensor, grid: ModelGrid) -> Iterator[Tensor]:
    """Each class on the turned grid of the scan, one after the other."""
    back = tuple(1.0 / step for step in grid.step)
    for plane in probabilities:
        yield resample_linear(plane[None], grid.turned_shape, back)[0] if grid.resampled else plane
