"""From probabilities on the model grid to labels on the scan's own grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundles.spec import Region
from medseg.inference.preprocess import ModelGrid, strongest
from medseg.inference.resample import resample_linear


def restore_labels(probabilities: Tensor, grid: ModelGrid, regions: Sequence[Region] = ()) -> NDArray[np.integer]:
    """Labels on the scan's grid: each class is resampled linearly and the most probable one wins.

    Args:
        probabilities: (K, X', Y', Z') float32 on the model grid.
        grid: how the scan became the model grid.
        regions: for classes that overlap: each in turn paints its label where it is above one half.

    Returns:
        Labels (X, Y, Z), uint8 where the values allow it; where two classes are equal, the lower value.
    """
    planes = _planes(probabilities, grid)
    turned = (painted(list(planes), regions) if regions else strongest(planes)).numpy()
    labels: NDArray[np.integer] = grid.order.invert(turned)
    return np.ascontiguousarray(labels)


def painted(probabilities: Sequence[Tensor], regions: Sequence[Region]) -> Tensor:
    """Labels (X, Y, Z) from the probabilities of overlapping regions, one map (X, Y, Z) for each output channel."""
    highest = max(region.label for region in regions)
    labels = torch.zeros(probabilities[0].shape, dtype=torch.uint8 if highest < 256 else torch.int16)
    for region in regions:
        labels[probabilities[region.channel] > 0.5] = region.label
    return labels


def restore_probabilities(probabilities: Tensor, grid: ModelGrid) -> NDArray[np.float32]:
    """Probabilities (K, X, Y, Z) float32 on the scan's grid."""
    turned = torch.stack(list(_planes(probabilities, grid))).numpy()
    return np.ascontiguousarray(grid.order.invert(turned))


def _planes(probabilities: Tensor, grid: ModelGrid) -> Iterator[Tensor]:
    """Each class on the turned grid of the scan, one after the other."""
    back = tuple(1.0 / step for step in grid.step)
    for plane in probabilities:
        yield resample_linear(plane[None], grid.turned_shape, back)[0] if grid.resampled else plane
