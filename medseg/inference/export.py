"""From planes of logits on the model grid to labels on the scan's grid, with two planes of the model grid at hand.

Each class is interpolated linearly and the strongest wins, but most voxels do not need it: an interpolated value is a
mean of those at the corners around it, so where all corners have the same strongest class, that class wins. Only at the
other voxels are all classes interpolated, and only the corners of those voxels go through the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medseg.bundles.spec import Region
from medseg.inference.resample import Positions

# Voxels whose classes are interpolated at once: with 100 classes, 13 MB for each of the two planes.
_CHUNK = 32768


class NotFiniteError(ArithmeticError):
    """The network gave a value that is not a number, or only infinities at a voxel."""


def strongest_class(values: NDArray[np.float32]) -> NDArray[np.unsignedinteger[Any]]:
    """Index of the largest of the K values at each voxel, the lower where two are equal.

    The classes are gone through one after the other, which is ten times faster than NumPy's and torch's argmax here.

    Args:
        values: (K, A, B).

    Returns:
        (A, B) uint8, or uint16 above 256 classes.

    Raises:
        NotFiniteError: a value is NaN or positive infinity, or none at a voxel is finite.
    """
    best = values[0].copy()
    better = np.empty(best.shape, dtype=np.bool_)
    kind = np.uint8 if len(values) <= 256 else np.uint16
    winner, candidate = np.zeros(best.shape, dtype=kind), np.empty(best.shape, dtype=kind)
    flags = better.view(np.uint8)
    for index in range(1, len(values)):
        np.greater(values[index], best, out=better)
        np.multiply(flags, kind(index), out=candidate)
        np.maximum(winner, candidate, out=winner)
        np.maximum(best, values[index], out=best)
    if not np.isfinite(best).all():
        raise NotFiniteError("a value is not finite")
    return winner


def export_labels(
    planes: Iterator[Tensor],
    labels: NDArray[Any],
    *,
    size: tuple[int, int, int],
    step: tuple[float, float, float],
    softmax: bool = True,
    nearest: Sequence[bool] = (False, False, False),
    centred: bool = False,
) -> None:
    """Write the strongest class of each voxel of another grid.

    Args:
        planes: (K, A, B) float32, one for each voxel along the first axis of the model grid; all are drawn.
        labels: (N, A', B'), any layout; is filled.
        size: shape of the model grid, the axis of the planes first.
        step: distance of two voxels of `labels` along each axis in voxels of the model grid; the first ones coincide.
        softmax: whether the planes hold logits, of which the probabilities are wanted, or probabilities.
        nearest: along which axes each voxel takes its classes from the nearest voxel of the model grid.
        centred: the edges of the grids coincide instead of their first voxels.

    Raises:
        NotFiniteError: as `strongest_class`.
    """
    along, rows, columns = (
        Positions.along(size_in, size_out, stride, centred=centred, nearest=near)
        for size_in, size_out, stride, near in zip(size, labels.shape, step, nearest, strict=True)
    )
    lattice = _Lattice(rows, columns)
    for (low, high), targets, weights in _pairs(planes, along, lambda plane: _Plane(plane, lattice, softmax=softmax)):
        _label_between(low, high, lattice, [labels[index] for index in targets], weights)


def export_maps(
    planes: Iterator[Tensor],
    *,
    size: tuple[int, int, int],
    step: tuple[float, float, float],
    shape: tuple[int, int, int],
    nearest: Sequence[bool] = (False, False, False),
    centred: bool = False,
) -> Iterator[Tensor]:
    """All classes on another grid, plane by plane; the arguments are those of `export_labels`.

    Args:
        planes: (K, A, B) float32 probabilities, or logits.
        size: shape of the model grid.
        step: distance of two voxels of the other grid.
        shape: of the other grid, (N, A', B').
        nearest: along which axes each voxel takes its values from the nearest voxel of the model grid.
        centred: the edges of the grids coincide instead of their first voxels.

    Yields:
        (K, A', B') float32, one for each n of N.
    """
    along, rows, columns = (
        Positions.along(size_in, size_out, stride, centred=centred, nearest=near)
        for size_in, size_out, stride, near in zip(size, shape, step, nearest, strict=True)
    )
    for (low, high), _, weights in _pairs(planes, along, lambda plane: plane):
        for weight in weights:
            between = torch.lerp(low, high, weight) if weight else low
            yield columns.sample(rows.sample(between, 1), 2)


def paint_regions(maps: Tensor, regions: Sequence[Region], labels: NDArray[Any]) -> None:
    """Paint overlapping regions in turn, each where its probability is above one half.

    Args:
        maps: probabilities (K, A, B).
        regions: which channel gives which label.
        labels: (A, B), any layout; is filled.

    Raises:
        NotFiniteError: a probability is not finite.
    """
    if not bool(torch.isfinite(maps).all()):
        raise NotFiniteError("a value is not finite")
    labels[...] = 0
    for region in regions:
        np.copyto(labels, region.label, where=(maps[region.channel] > 0.5).numpy())


def _pairs(
    planes: Iterator[Tensor], along: Positions, prepare: Any
) -> Iterator[tuple[tuple[Any, Any], range, list[float]]]:
    """Pairs of neighbouring planes, each with the output planes that lie between the two and their weights.

    An output plane on a plane of the model grid has a pair of its own, that plane twice.
    """
    lower, upper, weights = along.lower.tolist(), along.upper.tolist(), along.weight.tolist()
    held: dict[int, Any] = {}
    drawn = first = 0
    while first < len(lower):
        pair = (lower[first], upper[first])
        last = first
        while last < len(lower) and (lower[last], upper[last]) == pair:
            last += 1
        while drawn <= pair[1]:
            plane = next(planes)
            if drawn >= pair[0]:
                held[drawn] = prepare(plane)
            drawn += 1
        yield (held[pair[0]], held[pair[1]]), range(first, last), weights[first:last]
        first = last
        held = {index: plane for index, plane in held.items() if first < len(lower) and index >= lower[first]}
    for _ in planes:
        pass


class _Lattice:
    """Output voxels of a plane and the corners around them in a plane of the model grid."""

    def __init__(self, rows: Positions, columns: Positions) -> None:
        self.rows, self.columns = rows, columns
        self.top, self.bottom = rows.lower.numpy(), rows.upper.numpy()
        self.left, self.right = columns.lower.numpy(), columns.upper.numpy()
        self.row_weight, self.column_weight = rows.weight.numpy(), columns.weight.numpy()

    def agreement(self, winner: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """The class at the first corner, (A', B'), and whether the four corners agree on it."""
        if self.rows.identity and self.columns.identity:
            chosen = winner[: len(self.top), : len(self.left)]
            return chosen, np.ones(chosen.shape, dtype=np.bool_)
        top, bottom = winner[self.top], winner[self.bottom]
        first = top[:, self.left]
        same = (
            (top == bottom)[:, self.left]
            & (first == top[:, self.right])
            & (bottom[:, self.left] == bottom[:, self.right])
        )
        return first, same

    def corners(self, index: NDArray[np.int64], width: int) -> tuple[Tensor, Tensor]:
        """The four corners of output voxels.

        Args:
            index: voxels, flat in (A', B'), (n,).
            width: B of the model grid.

        Returns:
            Voxels flat in (A, B), (n, 4), and their weights (n, 4) float32, which add up to 1.
        """
        row, column = np.divmod(index, len(self.left))
        top, bottom, left, right = (
            self.top[row] * width,
            self.bottom[row] * width,
            self.left[column],
            self.right[column],
        )
        places = np.stack([top + left, top + right, bottom + left, bottom + right], axis=1)
        down, across = self.row_weight[row], self.column_weight[column]
        up, back = 1 - down, 1 - across
        weights = np.stack([up * back, up * across, down * back, down * across], axis=1)
        return torch.from_numpy(places), torch.from_numpy(weights)


class _Plane:
    """A plane of the model grid: its classes, the strongest of them, and probabilities where they were asked for."""

    def __init__(self, values: Tensor, lattice: _Lattice, *, softmax: bool) -> None:
        self.width = values.shape[2]
        self.first, self.same = lattice.agreement(strongest_class(values.numpy()))
        self._values = values.reshape(len(values), -1)
        self._softmax = softmax
        self._table = torch.empty(0)
        self._ready = np.zeros(0, dtype=np.bool_)

    def table(self, places: Tensor) -> Tensor:
        """Probabilities (A B, K), valid at least at the given voxels (n, 4)."""
        if not len(self._ready):
            self._table = torch.empty(self._values.shape[::-1])
            self._ready = np.zeros(self._values.shape[1], dtype=np.bool_)
        wanted = np.zeros(len(self._ready), dtype=np.bool_)
        wanted[places.numpy().ravel()] = True
        missing = torch.from_numpy(np.flatnonzero(wanted & ~self._ready))
        if len(missing):
            values = self._values.index_select(1, missing)
            if self._softmax:
                values = values.softmax(dim=0)
            self._table.index_copy_(0, missing, values.t().contiguous())
            self._ready |= wanted
        return self._table


def _label_between(
    low: _Plane, high: _Plane, lattice: _Lattice, targets: Sequence[NDArray[Any]], weights: Sequence[float]
) -> None:
    """Label the output planes between two planes of the model grid, or those on one plane (`low is high`)."""
    same = low.same if low is high else low.same & high.same & (low.first == high.first)
    doubtful = np.flatnonzero(~same)
    for target in targets:
        target[...] = low.first
    width = len(lattice.left)
    for begin in range(0, len(doubtful), _CHUNK):
        chunk = doubtful[begin : begin + _CHUNK]
        places, shares = lattice.corners(chunk, low.width)
        below = functional.embedding_bag(places, low.table(places), per_sample_weights=shares, mode="sum")
        above = (
            below
            if low is high
            else functional.embedding_bag(places, high.table(places), per_sample_weights=shares, mode="sum")
        )
        row, column = np.divmod(chunk, width)
        for target, weight in zip(targets, weights, strict=True):
            between = torch.lerp(below, above, weight) if weight else below
            target[row, column] = between.numpy().argmax(axis=1)
