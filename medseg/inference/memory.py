"""How much memory a case will take, worked out before any of it is allocated."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.bundles.spec import BundleSpec
from medseg.inference.preprocess import model_grid
from medseg.inference.segment import in_lockstep, plane_axis

# Feature maps of the window's size that a network holds at once; what it really needs is its own affair.
_FEATURE_MAPS = 64


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of host memory that a case takes beside the scan itself.

    Attributes:
        image: the network's input on the model grid, with a copy for the intensity steps or the padding.
        sums: weighted sums of logits, and of weights, for the planes that windows reach; for several flips also what
            holds their probabilities.
        windows: logits of a batch of windows and of a constant window, and an allowance for the network's features.
        planes: two planes of the model grid with all their classes, and the plane between them where it is kept.
        outputs: labels and, when kept, probabilities on the scan's grid.
    """

    image: int
    sums: int
    windows: int
    planes: int
    outputs: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))


def memory_plan(
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
    spec: BundleSpec,
    *,
    flips: int = 1,
    probabilities: bool = False,
) -> MemoryPlan:
    """Plan the memory of a case.

    Args:
        shape: of the scan.
        affine: of the scan.
        spec: the bundle's.
        flips: passes over the volume.
        probabilities: whether the probabilities are kept.
    """
    grid = model_grid(shape, affine, spec).shape
    padded = [max(size, roi) for size, roi in zip(grid, spec.roi_size, strict=True)]
    axis = plane_axis(grid, spec)
    plane = math.prod(padded) // padded[axis]
    classes, window = spec.out_channels, math.prod(spec.roi_size)
    passes = flips if in_lockstep(grid, spec, flips) else 1
    held = 0 if passes == flips else classes * math.prod(grid)
    channels = spec.in_channels + (spec.network_channels if spec.slices is not None else 0)
    maps = 2 if probabilities or spec.regions or flips > 1 else 0
    largest_plane = math.prod(sorted(shape)[1:])
    return MemoryPlan(
        image=4 * 3 * channels * math.prod(padded),
        sums=4 * (passes * (classes + 1) * spec.roi_size[axis] * plane + held),
        windows=4 * window * (spec.sw_batch_size * (_FEATURE_MAPS + spec.network_channels + 2 * classes) + classes),
        planes=4 * classes * ((4 + maps) * plane + (2 * largest_plane if maps else 0)),
        outputs=math.prod(shape) * (2 + (4 * classes if probabilities else 0)),
    )
