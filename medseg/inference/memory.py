"""How much memory a case will take, worked out before any of it is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.bundles.spec import BundleSpec
from medseg.inference.ensemble import lay_out, ring_voxels
from medseg.inference.preprocess import model_grid

# Feature maps of the window's size that a network holds at once; what it really needs is its own affair.
_FEATURE_MAPS = 64


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of host memory that a case takes beside the scan itself.

    Attributes:
        image: the networks' inputs on their model grids, with a copy for the intensity steps or the padding.
        sums: weighted sums of logits, and of weights, for the planes that windows reach; for several passes one after
            the other also what holds their probabilities.
        windows: logits of a batch of windows and of a constant window, and an allowance for the network's features.
        planes: two planes of the model grid with all their classes, and the plane between them where it is kept.
        outputs: labels and, when kept, probabilities and maps of uncertainty on the scan's grid.
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
    *specs: BundleSpec,
    flips: int | Sequence[int] = 1,
    probabilities: bool = False,
    uncertainty: bool = False,
    evidence: bool = False,
) -> MemoryPlan:
    """Plan the memory of a case.

    Args:
        shape: of the scan.
        affine: of the scan.
        specs: the bundle's, or those of an ensemble's members.
        flips: passes over the volume; for several members, of each.
        probabilities: whether the probabilities are kept.
        uncertainty: whether maps of uncertainty are made.
        evidence: whether an evidence map is made, of which there are three copies while it is resampled.
    """
    counts = [flips] * len(specs) if isinstance(flips, int) else list(flips)
    several = sum(counts) > 1
    grids = [model_grid(shape, affine, spec) for spec in specs]
    layout = lay_out(grids, specs, passes=counts, apart=uncertainty and several)
    maps = 2 if probabilities or uncertainty or specs[0].regions or several else 0
    # A bundle alone is labelled at temperature 1, while its probabilities are at its own.
    alone = len(specs) == 1 and specs[0].calibration.temperature != 1 and (probabilities or uncertainty)
    classes, voxels = specs[0].out_channels, math.prod(shape)
    inputs: dict[object, int] = {}
    sums, windows, features, planes = [], [], [], []
    for grid, spec, count, axis in zip(grids, specs, counts, layout.axes, strict=True):
        padded = math.prod(max(size, roi) for size, roi in zip(grid.shape, spec.roi_size, strict=True))
        ring = ring_voxels(grid.shape, spec, axis)
        plane, window = ring // spec.roi_size[axis], math.prod(spec.roi_size)
        running = count if layout.lockstep else 1
        channels = spec.in_channels + (spec.network_channels if spec.slices is not None else 0)
        prepared = (spec.orientation, spec.spacing, spec.interpolation, spec.intensity, spec.nnunet)
        inputs[prepared] = max(inputs.get(prepared, 0), 4 * 3 * channels * padded)
        sums.append(4 * running * (classes + 1) * ring)
        features.append(4 * window * spec.sw_batch_size * (_FEATURE_MAPS + spec.network_channels))
        windows.append(4 * window * running * classes * (2 * spec.sw_batch_size + 1))
        shown = 4 * classes * (2 if alone else 1)
        planes.append(running * shown * ((4 + maps) * plane + maps * voxels // grid.turned_shape[axis]))
    total = sum if layout.lockstep else max
    held = 0
    if not layout.lockstep:
        held = math.prod(grids[0].shape) if layout.on_model_grid else voxels
        held *= 4 * (classes * (2 if alone else 1) + (uncertainty and not layout.on_model_grid))
    return MemoryPlan(
        image=sum(inputs.values()),
        sums=total(sums) + held,
        windows=total(windows) + max(features),
        planes=total(planes),
        outputs=voxels * (2 + 4 * (classes * probabilities + uncertainty + (uncertainty and several) + 3 * evidence)),
    )
