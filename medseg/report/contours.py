"""Outlines of a mask, exact to the pixel: polygons along pixel edges, holes joined to their outline by a cut.

The pixels whose centres lie inside the polygons are the mask, no more and no fewer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Corner = tuple[int, int]

# The step (dx, dy) after a left turn.
_LEFT = {(1, 0): (0, 1), (0, 1): (-1, 0), (-1, 0): (0, -1), (0, -1): (1, 0)}


def outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Closed polygons around the pieces of a mask.

    Args:
        mask: (X, Y); pixels that touch at a corner only are separate pieces.

    Returns:
        Corners (n, 2) of each polygon in pixel indices, pixel centres being whole numbers; the last corner is joined
        to the first. A piece with holes is one polygon that runs to each hole and back along the same line.
    """
    outer: list[list[Corner]] = []
    holes: list[list[Corner]] = []
    for loop in _loops(mask):
        (outer if _area(loop) > 0 else holes).append(loop)
    owner = {edge: loop for loop in outer for edge in _edges(loop)}
    # From left to right, so that what a hole is joined to is joined already.
    for hole in sorted(holes, key=min):
        start, y = min(hole)
        x = start
        while ((x, y + 1), (x, y)) not in owner:  # walk left through the mask to a left edge of its outline
            x -= 1
        loop = owner[(x, y + 1), (x, y)]
        at = next(index for index in range(len(loop)) if loop[index - 1] == (x, y + 1) and loop[index] == (x, y))
        turned = hole.index((start, y))
        loop[at:at] = [(x, y), *hole[turned:], *hole[:turned], (start, y)]
        owner |= dict.fromkeys(_edges(hole), loop)
    return [np.array(_corners(loop), dtype=np.float64) - 0.5 for loop in outer]


def _loops(mask: NDArray[np.bool_]) -> list[list[Corner]]:
    """Every closed run of pixel edges, one corner a pixel edge, with the mask on its left."""
    padded = np.pad(mask, 1)
    steps: dict[Corner, list[Corner]] = {}
    # Corner (x, y) is the lower left one of pixel (x, y).
    for dx, dy, inside, outside in (
        (1, 0, padded[1:-1, 1:], padded[1:-1, :-1]),
        (-1, 0, padded[1:-1, :-1], padded[1:-1, 1:]),
        (0, 1, padded[:-1, 1:-1], padded[1:, 1:-1]),
        (0, -1, padded[1:, 1:-1], padded[:-1, 1:-1]),
    ):
        for x, y in np.argwhere(inside & ~outside).tolist():
            corner = (x + (dx < 0), y + (dy < 0))
            steps.setdefault(corner, []).append((dx, dy))
    found = []
    left = dict.fromkeys((corner, step) for corner, some in steps.items() for step in some)
    while left:
        first = corner, step = next(iter(left))
        loop: list[Corner] = []
        while not loop or (corner, step) != first:
            del left[corner, step]
            loop.append(corner)
            corner = corner[0] + step[0], corner[1] + step[1]
            onward = steps[corner]
            # Where four edges meet, the left turn stays with the piece the loop came along.
            step = onward[0] if len(onward) == 1 else _LEFT[step]
        found.append(loop)
    return found


def _edges(loop: list[Corner]) -> list[tuple[Corner, Corner]]:
    return [(loop[index - 1], corner) for index, corner in enumerate(loop)]


def _area(loop: list[Corner]) -> int:
    """Twice the area, positive when the inside is on the left."""
    return sum(one[0] * other[1] - other[0] * one[1] for one, other in _edges(loop))


def _corners(loop: list[Corner]) -> list[Corner]:
    """The loop without corners at which it goes straight on."""
    kept = []
    for index, corner in enumerate(loop):
        before, after = loop[index - 1], loop[(index + 1) % len(loop)]
        if _direction(before, corner) != _direction(corner, after):
            kept.append(corner)
    return kept


def _direction(one: Corner, other: Corner) -> Corner:
    """The way from one corner to another along an axis: -1, 0 or 1 for each."""
    dx, dy = other[0] - one[0], other[1] - one[1]
    return (dx > 0) - (dx < 0), (dy > 0) - (dy < 0)
