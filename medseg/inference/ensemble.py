"""Several passes over a scan, made one: flips of one bundle, members of an ensemble, or both.

Each pass gives planes of logits on its own model grid. They are averaged on that grid where all passes share it, so
that the scan's grid is reached once, and else on the scan's grid. The passes run side by side, a few planes each,
wherever their planes follow one direction of the scan and that takes less memory than sums of all classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundles.spec import Activation, BundleSpec
from medseg.inference.device import Predictor
from medseg.inference.export import export_maps
from medseg.inference.nnunet import Box
from medseg.inference.preprocess import Case, ModelGrid
from medseg.inference.sliding_window import stream_axis


@dataclass(frozen=True)
class Model:
    """A member with its case, ready to run.

    Attributes:
        case: the scan as this member's bundle prepares it.
        network: the bundle's, on the device; in eval mode.
        spec: window, overlap, blending, padding, slices, activation, regions.
        weight: share in the mean.
        temperature: its logits are divided by it before they become probabilities.
        flips: sets of spatial axes of the model grid; there is a pass for each, with the volume flipped along the set.
    """

    case: Case
    network: Predictor
    spec: BundleSpec
    weight: float = 1.0
    temperature: float = 1.0
    flips: tuple[tuple[int, ...], ...] = ((),)


@dataclass(frozen=True)
class Layout:
    """How the passes of several models come together.

    Attributes:
        axes: for each model, the axis of its grid along which its planes come.
        on_model_grid: the passes are averaged on the grid that all models share, before the way to the scan's.
        lockstep: the passes run side by side; else one after the other, into sums of all planes.
    """

    axes: tuple[int, ...]
    on_model_grid: bool
    lockstep: bool


def plane_axis(shape: Sequence[int], spec: BundleSpec) -> int:
    """The axis of a model grid of this shape along which planes of logits become final."""
    return stream_axis(shape, spec.roi_size) if spec.slices is None else spec.slices.axis


def plane_order(axis: int) -> tuple[int, int, int]:
    """The axes of a grid in the order of its planes: the one along which they come, then the other two."""
    first, second = (other for other in range(3) if other != axis)
    return axis, first, second


def lay_out(
    grids: Sequence[ModelGrid], specs: Sequence[BundleSpec], *, passes: Sequence[int], apart: bool = False
) -> Layout:
    """Choose how the passes come together.

    Args:
        grids: of each model.
        specs: of each model.
        passes: how many passes each model makes.
        apart: each pass is wanted on the scan's grid by itself.
    """
    axes = _common_axes(grids, specs)
    along = axes or tuple(plane_axis(grid.shape, spec) for grid, spec in zip(grids, specs, strict=True))
    shared = axes is not None and all(_same(grid, grids[0]) for grid in grids[1:])
    on_model_grid = shared and not apart
    rings = [ring_voxels(grid.shape, spec, axis) for grid, spec, axis in zip(grids, specs, along, strict=True)]
    held = math.prod(grids[0].shape if on_model_grid else grids[0].turned_shape)
    together = sum(count * ring for count, ring in zip(passes, rings, strict=True))
    return Layout(along, on_model_grid, axes is not None and together <= max(rings) + held)


def ring_voxels(shape: Sequence[int], spec: BundleSpec, axis: int) -> int:
    """Voxels of the planes that windows running along an axis of a model grid still reach."""
    padded = [max(size, roi) for size, roi in zip(shape, spec.roi_size, strict=True)]
    return spec.roi_size[axis] * math.prod(padded) // padded[axis]


def _same(one: ModelGrid, other: ModelGrid) -> bool:
    def kind(grid: ModelGrid) -> tuple[object, ...]:
        return grid.order, grid.shape, grid.step, grid.nearest, grid.inside, grid.centred

    return kind(one) == kind(other)


def _direction(grid: ModelGrid, axis: int) -> tuple[int, bool]:
    """The axis of the scan that an axis of the model grid runs along, and whether backwards."""
    return grid.order.axes[axis], grid.order.flips[axis]


def _common_axes(grids: Sequence[ModelGrid], specs: Sequence[BundleSpec]) -> tuple[int, ...] | None:
    """For each grid the axis along which all models can give their planes in one direction of the scan, or None.

    Of several such directions the first model's own choice counts, else the one with the smallest rings.
    """
    own = [plane_axis(grid.shape, spec) for grid, spec in zip(grids, specs, strict=True)]
    found: list[tuple[int, ...]] = []
    for first in (own[0], 0, 1, 2):
        wanted = _direction(grids[0], first)
        axes = [next((axis for axis in range(3) if _direction(grid, axis) == wanted), None) for grid in grids]
        possible = tuple(
            axis
            for axis, spec in zip(axes, specs, strict=True)
            if axis is not None and (spec.slices is None or spec.slices.axis == axis)
        )
        if len(possible) == len(grids):
            found.append(possible)
    if not found or found[0][0] == own[0]:
        return found[0] if found else None
    return min(
        found, key=lambda axes: sum(ring_voxels(g.shape, s, a) for g, s, a in zip(grids, specs, axes, strict=True))
    )


def to_scan(
    planes: Iterator[Tensor], grid: ModelGrid, axis: int, *, outside: Callable[[int], Tensor]
) -> Iterator[Tensor]:
    """Planes of a model grid on the scan's grid, in the scan's own axes.

    Args:
        planes: (K, A, B) float32 along `axis` of the model grid, in order.
        grid: that grid.
        axis: its axis along which the planes come.
        outside: gives the K values of voxels that the model grid does not cover.

    Yields:
        (K, P, Q), P and Q the other two axes of the scan in order; one for each voxel of the scan along the axis that
        `axis` is there, from the last to the first where it runs backwards.
    """
    i, j, k = plane_order(axis)
    size, covered = ((of[i], of[j], of[k]) for of in (grid.shape, grid.covered))
    step = (grid.step_back[i], grid.step_back[j], grid.step_back[k])
    near = (grid.nearest[i], grid.nearest[j], grid.nearest[k])
    backwards = [1 + place for place, other in enumerate((j, k)) if grid.order.flips[other]]
    swapped = grid.order.axes[j] > grid.order.axes[k]
    maps = export_maps(planes, size=size, step=step, shape=covered, nearest=near, centred=grid.centred)
    if grid.covered != grid.turned_shape:
        shape = (grid.turned_shape[i], grid.turned_shape[j], grid.turned_shape[k])
        maps = filled_up(maps, shape, (grid.inside[i], grid.inside[j], grid.inside[k]), outside)
    for plane in maps:
        turned = plane.flip(backwards) if backwards else plane
        yield turned.transpose(1, 2) if swapped else turned


def filled_up(
    planes: Iterator[Tensor], shape: tuple[int, int, int], box: Box, outside: Callable[[int], Tensor]
) -> Iterator[Tensor]:
    """Planes (K, a, b) of a box as planes (K, A, B) of all that is around it."""
    along, rows, columns = box
    empty = torch.empty(0)
    for index, plane in enumerate(planes):
        if index == 0:
            empty = outside(len(plane))[:, None, None].expand(len(plane), *shape[1:])
            yield from [empty] * along.start
        full = empty.clone()
        full[:, rows, columns] = plane
        yield full
    yield from [empty] * (shape[0] - along.stop)


def scan_view(array: NDArray[Any], grid: ModelGrid, axis: int) -> NDArray[Any]:
    """An array (..., X, Y, Z) of the scan's grid as a view (..., N, P, Q) in the order of `to_scan`."""
    along, backwards = _direction(grid, axis)
    lead = array.ndim - 3
    view = np.moveaxis(array, lead + along, lead)
    return view[(slice(None),) * lead + (slice(None, None, -1),)] if backwards else view


def mean_planes(passes: Sequence[Iterator[Tensor]], weights: Sequence[float], *, lockstep: bool) -> Iterator[Tensor]:
    """Weighted mean of passes whose planes come in one order, (K, A, B) float32 each."""
    if lockstep:
        for together in zip(*passes, strict=True):
            yield _weighted(together, weights)
        return
    totals = [plane.mul(weights[0]) for plane in passes[0]]
    for planes, weight in zip(passes[1:], weights[1:], strict=True):
        for total, plane in zip(totals, planes, strict=True):
            total.add_(plane, alpha=weight)
    totals.reverse()
    while totals:
        yield totals.pop()


def mean_and_entropy(
    passes: Sequence[Iterator[Tensor]],
    weights: Sequence[float],
    views: Sequence[Callable[[NDArray[Any]], NDArray[Any]]],
    *,
    entropy: Callable[[Tensor], Tensor] | None,
    shape: tuple[int, int, int],
    channels: int,
    lockstep: bool,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weighted mean of passes on the scan's grid, and of their entropies where those are wanted.

    Args:
        passes: planes of probabilities (K, P, Q) of the scan's grid, each in its own order where not in lockstep.
        weights: of each pass; they add up to 1.
        views: for each pass, an array of the scan's grid in the order of its planes.
        entropy: of a plane (K, P, Q): (P, Q); None when it is not wanted.
        shape: of the scan.
        channels: K.
        lockstep: whether the passes run side by side.

    Yields:
        Mean (K, P, Q) and entropy (P, Q) in the order of the first pass.
    """
    if lockstep:
        for together in zip(*passes, strict=True):
            inside = None if entropy is None else _weighted([entropy(plane) for plane in together], weights)
            yield _weighted(together, weights), inside
        return
    total = np.zeros((channels, *shape), dtype=np.float32)
    entropies = None if entropy is None else np.zeros(shape, dtype=np.float32)
    for planes, weight, view in zip(passes, weights, views, strict=True):
        sums, inside_sums = view(total), None if entropies is None else view(entropies)
        for index, plane in enumerate(planes):
            sums[:, index] += weight * plane.numpy()
            if entropy is not None and inside_sums is not None:
                inside_sums[index] += weight * entropy(plane).numpy()
    sums, inside_sums = views[0](total), None if entropies is None else views[0](entropies)
    for index in range(sums.shape[1]):
        mean = torch.from_numpy(np.ascontiguousarray(sums[:, index]))
        yield mean, None if inside_sums is None else torch.from_numpy(np.ascontiguousarray(inside_sums[index]))


def activated(
    planes: Iterator[Tensor], activation: Activation | None, temperatures: Sequence[float]
) -> Iterator[Tensor]:
    """Probabilities of planes of logits (K, A, B) at each temperature, one below the other: (T K, A, B).

    Without an activation, the logits at each temperature.
    """

    def at(logits: Tensor, temperature: float) -> Tensor:
        cooled = logits if temperature == 1 else logits / temperature
        if activation is None:
            return cooled
        return cooled.sigmoid() if activation == "sigmoid" else cooled.softmax(dim=0)

    for logits in planes:
        found = [at(logits, temperature) for temperature in temperatures]
        yield found[0] if len(found) == 1 else torch.cat(found)


def _weighted(planes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = planes[0].mul(weights[0])
    for plane, weight in zip(planes[1:], weights[1:], strict=True):
        total.add_(plane, alpha=weight)
    return total
