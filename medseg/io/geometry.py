"""Voxel grids in space: the only affine arithmetic of the project.

An affine (4, 4) float64 maps voxel indices (x, y, z, 1) to RAS millimetres: right, anterior, superior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Affine = NDArray[np.float64]
Scalar = TypeVar("Scalar", bound=np.generic)

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def spacing(affine: Affine) -> NDArray[np.float64]:
    """Voxel size in mm along each array axis, (3,)."""
    size: NDArray[np.float64] = np.sqrt((np.asarray(affine, dtype=np.float64)[:3, :3] ** 2).sum(axis=0))
    return size


def orientation(affine: Affine) -> str:
    """Directions in which the array axes run, to the nearest anatomical axis: "RAS", "LPI", ..."""
    order = AxisOrder.to_canonical(affine)
    letters = [""] * 3
    for axis, (source, flip) in enumerate(zip(order.axes, order.flips, strict=True)):
        letters[source] = "LPI"[axis] if flip else "RAS"[axis]
    return "".join(letters)


def extent_mm(shape: Sequence[int], affine: Affine, *, canonical: bool = False) -> NDArray[np.float64]:
    """Field of view in mm, shape times spacing, (3,).

    Args:
        shape: (X, Y, Z).
        affine: of that grid.
        canonical: order the result left-right, posterior-anterior, inferior-superior instead of by array axis.
    """
    extent: NDArray[np.float64] = np.asarray(shape, dtype=np.float64) * spacing(affine)
    return extent[list(AxisOrder.to_canonical(affine).axes)] if canonical else extent


def world(affine: Affine, index: ArrayLike) -> NDArray[np.float64]:
    """Positions in RAS mm of voxel indices (..., 3), which need not be whole."""
    points = np.asarray(index, dtype=np.float64)
    placed: NDArray[np.float64] = points @ affine[:3, :3].T + affine[:3, 3]
    return placed


def shear_degrees(affine: Affine) -> float:
    """Largest deviation from a right angle between two voxel axes, in degrees."""
    axes = affine[:3, :3] / spacing(affine)
    cosines = np.abs(axes.T @ axes)[np.triu_indices(3, k=1)]
    return float(np.degrees(np.arcsin(np.clip(cosines, 0.0, 1.0))).max())


def oblique_degrees(affine: Affine) -> float:
    """Largest angle between a voxel axis and the nearest of the anatomical axes, in degrees: 0 to about 55."""
    axes = affine[:3, :3] / spacing(affine)
    return float(np.degrees(np.arccos(np.clip(np.abs(axes).max(axis=0), 0.0, 1.0))).max())


def is_orthogonal(affine: Affine, *, tolerance_degrees: float = 0.1) -> bool:
    """Whether the voxel axes meet at right angles."""
    return shear_degrees(affine) <= tolerance_degrees


def is_singular(affine: Affine) -> bool:
    """Whether the affine is not finite or its voxel axes do not span space."""
    if not np.isfinite(affine).all():
        return True
    size = spacing(affine)
    return bool((size == 0).any() or abs(np.linalg.det(affine[:3, :3] / size)) < 1e-6)


def corner_shift(shape: Sequence[int], one: Affine, other: Affine) -> float:
    """Largest distance in mm between the same corner voxel of a (X, Y, Z) grid under two affines."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1).T
    return float(np.linalg.norm(world(one, corners) - world(other, corners), axis=1).max())


def from_lps(direction: ArrayLike, size: ArrayLike, origin: ArrayLike) -> Affine:
    """Affine of an ITK grid.

    Args:
        direction: (3, 3), a column for each array axis, LPS.
        size: spacing (3,) in mm.
        origin: centre of the first voxel (3,) in mm, LPS.
    """
    lps = np.eye(4)
    lps[:3, :3] = np.asarray(direction, dtype=np.float64) * np.asarray(size, dtype=np.float64)
    lps[:3, 3] = np.asarray(origin, dtype=np.float64)
    affine: Affine = _LPS_TO_RAS @ lps
    return affine


def resampled_shape(shape: Sequence[int], old: ArrayLike, new: ArrayLike) -> tuple[int, int, int]:
    """Shape of a grid after resampling, the first voxel centres coinciding (the rule of MONAI's Spacingd).

    Args:
        shape: (X, Y, Z).
        old: spacing (3,) in mm of that grid.
        new: spacing (3,) in mm wanted.
    """
    steps = (np.asarray(shape) - 1) * np.asarray(old, dtype=np.float64) / np.asarray(new, dtype=np.float64)
    x, y, z = (max(1, int(n)) for n in np.round(steps + 1.0))
    return x, y, z


def resampled_affine(affine: Affine, new: ArrayLike) -> Affine:
    """Affine with spacing `new` (3,) in mm, the same directions and the same first voxel centre."""
    result = np.array(affine, dtype=np.float64)
    result[:3, :3] *= np.asarray(new, dtype=np.float64) / spacing(affine)
    return result


@dataclass(frozen=True)
class AxisOrder:
    """A permutation of the three spatial axes and flips: turns one grid's array into another's.

    Attributes:
        axes: for each axis of the result, the axis of the input that it comes from.
        flips: for each axis of the result, whether it runs backwards.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @classmethod
    def to_canonical(cls, affine: Affine, axcodes: str = "RAS") -> AxisOrder:
        """The order that turns a grid with this affine to the nearest anatomical axes.

        Args:
            affine: of the grid; oblique and sheared ones included.
            axcodes: wanted directions, one of R/L, A/P and S/I each, in any order.

        Raises:
            ValueError: `axcodes` is not three such letters.
        """
        from nibabel import orientations

        ornt: Any = orientations

        code = axcodes.upper()
        if len(code) != 3 or any(len(set(code) & set(pair)) != 1 for pair in ("RL", "AP", "SI")):
            raise ValueError(f"axcodes must hold one of R/L, A/P and S/I each, got {axcodes!r}")
        # Row i: the result's axis that input axis i becomes, and its direction. The choice is a greedy one over the
        # nearest rotation, which for a regular affine always is a permutation; MONAI's Orientation uses the same.
        turn = ornt.ornt_transform(ornt.io_orientation(affine), ornt.axcodes2ornt(tuple(code)))
        axes, flips = [0, 0, 0], [False, False, False]
        for source, (target, direction) in enumerate(turn):
            axes[int(target)], flips[int(target)] = source, direction < 0
        return cls((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))

    @property
    def inverse(self) -> AxisOrder:
        """The order that undoes this one."""
        axes = [self.axes.index(axis) for axis in range(3)]
        flips = [self.flips[axis] for axis in axes]
        return AxisOrder((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))

    def apply(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        """Turn an array (..., X, Y, Z); the result is a view."""
        lead = array.ndim - 3
        if lead < 0:
            raise ValueError(f"three spatial axes expected, got shape {array.shape}")
        turned = array.transpose(*range(lead), *(lead + axis for axis in self.axes))
        index: Any = (..., *(slice(None, None, -1 if flip else 1) for flip in self.flips))
        view: NDArray[Scalar] = turned[index]
        return view

    def invert(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        """Turn an array (..., X, Y, Z) of the result's order back to the input's; a view."""
        return self.inverse.apply(array)

    def shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Shape of the result for an input (X, Y, Z)."""
        x, y, z = (shape[axis] for axis in self.axes)
        return x, y, z

    def affine(self, affine: Affine, shape: Sequence[int]) -> Affine:
        """Affine of the result.

        Args:
            affine: of the input.
            shape: of the input, (X, Y, Z).
        """
        step = np.zeros((4, 4))
        step[3, 3] = 1.0
        for axis, (source, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            step[source, axis] = -1.0 if flip else 1.0
            step[source, 3] = shape[source] - 1 if flip else 0
        result: Affine = np.asarray(affine, dtype=np.float64) @ step
        return result
