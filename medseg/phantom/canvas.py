"""Grids and the canvas that tissues are painted on, later ones over earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]
HU = tuple[float, float, float]
"""Hounsfield units without contrast, in the arterial and in the portal venous phase."""


@dataclass(frozen=True)
class Grid:
    """Voxels of a scan in the phantom's own coordinates.

    These are millimetres, x to the patient's left, y to the back, z up, 0 in the middle of the upper abdomen.

    Attributes:
        shape: voxels (X, Y, Z).
        spacing: mm (x, y, z).
        first: mm (x, y, z), the centre of the first voxel.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    first: tuple[float, float, float]

    @property
    def affine(self) -> Floats:
        """Voxel index to RAS mm, (4, 4)."""
        flip = np.array([-1.0, -1.0, 1.0])
        affine = np.diag([*(flip * self.spacing), 1.0])
        affine[:3, 3] = flip * self.first
        return affine

    def box(self, low: Sequence[float] | Floats, high: Sequence[float] | Floats) -> Box:
        """The voxels between two corners in mm, empty where they lie outside."""
        ends = []
        for axis in range(3):
            begin = int(np.ceil((low[axis] - self.first[axis]) / self.spacing[axis]))
            end = int(np.floor((high[axis] - self.first[axis]) / self.spacing[axis])) + 1
            begin, end = max(begin, 0), min(end, self.shape[axis])
            ends.append(slice(min(begin, end), end) if end > 0 else slice(0, 0))
        return ends[0], ends[1], ends[2]

    def points(self, box: Box) -> tuple[Floats, Floats, Floats]:
        """Coordinates of a box's voxels in mm, three arrays that broadcast to its shape."""
        axes: list[Floats] = [
            first + step * np.arange(part.start, part.stop, dtype=np.float64)
            for first, step, part in zip(self.first, self.spacing, box, strict=True)
        ]
        x, y, z = axes
        return x[:, None, None], y[None, :, None], z[None, None, :]


def size_of(box: Box) -> tuple[int, int, int]:
    """Voxels of a box along each axis."""
    x, y, z = (part.stop - part.start for part in box)
    return x, y, z


class Canvas:
    """A label of tissue for each voxel, and each tissue's Hounsfield units.

    Args:
        grid: its voxels.
        background: what is there before anything is painted.
    """

    def __init__(self, grid: Grid, background: HU) -> None:
        self.grid = grid
        self.tissue: NDArray[np.uint8] = np.zeros(grid.shape, dtype=np.uint8)
        self._units: list[HU] = [background]

    def add(self, units: HU) -> int:
        """A new tissue; its number."""
        if len(self._units) > np.iinfo(np.uint8).max:
            raise ValueError("a canvas holds at most 256 tissues")
        self._units.append(units)
        return len(self._units) - 1

    def paint(self, box: Box, inside: Mask, units: HU) -> int:
        """Paint a mask (of the box's shape) with a new tissue; its number."""
        number = self.add(units)
        self.tissue[box][inside] = number
        return number

    def ellipsoid(self, centre: Sequence[float] | Floats, axes: Sequence[float] | Floats, units: HU) -> None:
        """Paint an ellipsoid; centre and semi-axes in mm."""
        centre, axes = np.asarray(centre, dtype=float), np.asarray(axes, dtype=float)
        box = self.grid.box(centre - axes, centre + axes)
        self.paint(box, self.radius(box, centre, axes) < 1, units)

    def cylinder(self, x: float, y: float, radius: float, units: HU, *, top: float = np.inf) -> None:
        """Paint an upright cylinder, below the height `top`; mm."""
        low, high = (x - radius, y - radius, -np.inf), (x + radius, y + radius, top)
        span = self.grid.first[2], self.grid.first[2] + self.grid.spacing[2] * (self.grid.shape[2] - 1)
        box = self.grid.box((*low[:2], span[0]), (*high[:2], min(top, span[1])))
        px, py, pz = self.grid.points(box)
        self.paint(box, ((px - x) ** 2 + (py - y) ** 2 < radius**2) & (pz < top), units)

    def tube(self, begin: Floats, end: Floats, radius: float, units: HU) -> int:
        """Paint a straight tube with round ends; mm. Returns the tissue's number."""
        box = self.grid.box(np.minimum(begin, end) - radius, np.maximum(begin, end) + radius)
        offsets = [points - start for points, start in zip(self.grid.points(box), begin, strict=True)]
        way = end - begin
        share = np.clip(sum(o * w for o, w in zip(offsets, way, strict=True)) / float(way @ way), 0, 1)
        squared = sum((o - share * w) ** 2 for o, w in zip(offsets, way, strict=True))
        return self.paint(box, np.asarray(squared < radius**2), units)

    def radius(self, box: Box, centre: Floats, axes: Floats) -> Floats:
        """Distance of a box's voxels from a centre, in units of an ellipsoid's semi-axes; both in mm."""
        x, y, z = ((p - c) / a for p, c, a in zip(self.grid.points(box), centre, axes, strict=True))
        return np.asarray(np.sqrt(x * x + y * y + z * z))

    def phase(self, number: int, enhancement: float) -> NDArray[np.float32]:
        """The picture (X, Y, Z) in HU of phase 0, 1 or 2, contrast multiplied by `enhancement`."""
        units = np.array(self._units, dtype=np.float32)
        table = units[:, 0] + enhancement * (units[:, number] - units[:, 0])
        return table.astype(np.float32)[self.tissue]


def smooth_field(random: np.random.Generator, grid: Grid, box: Box, deviation: float) -> Floats:
    """Smooth noise over a box, of mean 0 and deviation 1, cut at 2.

    Args:
        random: its source.
        grid: the box's grid.
        box: where.
        deviation: of the Gaussian that smooths it, mm.
    """
    noise = random.standard_normal(size_of(box))
    if noise.size < 2:
        return noise
    noise = gaussian_filter(noise, [deviation / step for step in grid.spacing], mode="nearest")
    return np.asarray(np.clip((noise - noise.mean()) / max(float(noise.std()), 1e-9), -2, 2))
