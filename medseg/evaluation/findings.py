"""Measurements of single lesions: volume, diameters in three planes, place along the organ, contrast in each phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medseg.evaluation.detection import components
from medseg.evaluation.volumes import label_boxes, voxel_volume_ml
from medseg.io.geometry import Affine, AxisOrder, spacing, world

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Point = tuple[float, float, float]
Part = Literal["head", "body", "tail", "unknown"]

LESION_ML = 0.3
"""A smaller lesion does not count as found, and does not contradict the class without lesions."""

PLANES: tuple[tuple[str, int], ...] = (("axial", 2), ("coronal", 1), ("sagittal", 0))
"""Name of each plane, and the canonical (RAS) axis that it is perpendicular to."""

# Along the straight axis of the gland, from its right end (0) to its left end (1). On 106 synthetic glands with a known
# centre line these values separate the line's thirds for 99 of 100 lesions; 1/3 and 2/3 do so for 91.
_HEAD_TO, _BODY_TO = 0.35, 0.70
_ENDS_PERCENT = (1.0, 99.0)
_GLAND_VOXELS = 20  # fewer have no axis


@dataclass(frozen=True, slots=True)
class Diameters:
    """A lesion in one plane, by the rule of RECIST: its longest diameter, and the longest one perpendicular to it.

    Attributes:
        plane: axial, coronal or sagittal, the nearest to the scan's own axes.
        slice_index: along the scan's array axis that the plane is perpendicular to, counted from 0.
        longest_mm: length of the longest diameter of all slices of this plane.
        short_mm: length of the longest diameter in that slice at a right angle to it.
        longest_ends_mm: both ends in RAS mm.
        short_ends_mm: both ends in RAS mm.
    """

    plane: str
    slice_index: int
    longest_mm: float
    short_mm: float
    longest_ends_mm: tuple[Point, Point]
    short_ends_mm: tuple[Point, Point]


@dataclass(frozen=True, slots=True)
class Finding:
    """One connected lesion.

    Attributes:
        voxels: how many.
        volume_ml: their volume.
        centroid_mm: mean voxel centre, RAS mm.
        peak_voxel: where the lesion is surest; of several such voxels the first.
        confidence: probability of a lesion there.
        diameters: axial, coronal and sagittal.
        place: 0 at the organ's right end, 1 at its left end, beyond them outside; None without an organ.
        part: head, body or tail, by `place`.
        contrast_hu: mean of the lesion less mean of the organ in each phase; empty without an organ.
    """

    voxels: int
    volume_ml: float
    centroid_mm: Point
    peak_voxel: tuple[int, int, int]
    confidence: float
    diameters: tuple[Diameters, ...]
    place: float | None
    part: Part
    contrast_hu: Mapping[str, float]


def measure_lesions(
    lesion: Mask,
    organ: Mask,
    probability: NDArray[np.floating],
    phases: Mapping[str, NDArray[np.floating]],
    affine: Affine,
    *,
    least_ml: float,
) -> list[Finding]:
    """Measure each connected lesion (26 neighbours), the largest first.

    Args:
        lesion: (X, Y, Z).
        organ: (X, Y, Z), without the lesion.
        probability: of a lesion, (X, Y, Z).
        phases: the scan in each phase, (X, Y, Z) in HU.
        affine: of that grid, voxel index to RAS mm.
        least_ml: smaller ones are left out.
    """
    voxel_ml = voxel_volume_ml(affine)
    parts, count = components(lesion, min_voxels=max(1, int(np.ceil(least_ml / voxel_ml))))
    axis = organ_axis(organ, affine)
    means = {name: float(image[organ].mean()) for name, image in phases.items()} if organ.any() else {}
    found = []
    boxes = label_boxes(parts) if count else {}
    for number, box in boxes.items():
        own = parts[box] == number
        first = np.array([side.start for side in box])
        inside = np.argwhere(own) + first
        centre = world(affine, inside.mean(axis=0))
        surest = tuple(int(n) for n in inside[int(np.argmax(probability[box][own]))])
        place = None if axis is None else axis.place(centre)
        found.append(
            Finding(
                voxels=len(inside),
                volume_ml=len(inside) * voxel_ml,
                centroid_mm=_point(centre),
                peak_voxel=(surest[0], surest[1], surest[2]),
                confidence=float(probability[surest]),
                diameters=diameters(own, shifted(affine, first), first),
                place=place,
                part=part_of(place),
                contrast_hu={name: float(phases[name][box][own].mean()) - mean for name, mean in means.items()},
            )
        )
    return sorted(found, key=lambda one: (-one.voxels, one.peak_voxel))


@dataclass(frozen=True, slots=True)
class OrganAxis:
    """The straight axis of an elongated organ, from the patient's right to the left.

    Attributes:
        begin_mm: right end, RAS mm.
        way_mm: from there to the left end.
    """

    begin_mm: Floats
    way_mm: Floats

    def place(self, point: Floats) -> float:
        """Where a point (3,) in RAS mm lies: 0 at the right end, 1 at the left end."""
        return float((point - self.begin_mm) @ self.way_mm / (self.way_mm @ self.way_mm))


def organ_axis(organ: Mask, affine: Affine) -> OrganAxis | None:
    """The principal axis of a mask (X, Y, Z), between the 1st and the 99th percentile of its voxels along it."""
    if int(np.count_nonzero(organ)) < _GLAND_VOXELS:
        return None
    points = world(affine, np.argwhere(organ))
    centre = points.mean(axis=0)
    _, directions = np.linalg.eigh(np.cov((points - centre).T))
    direction = directions[:, -1]
    if direction[0] > 0:  # in RAS the first coordinate grows to the right
        direction = -direction
    begin, end = np.percentile((points - centre) @ direction, _ENDS_PERCENT)
    if end - begin <= 0:
        return None
    return OrganAxis(centre + begin * direction, (end - begin) * direction)


def part_of(place: float | None) -> Part:
    """Head, body or tail of the pancreas for a place along its axis."""
    if place is None:
        return "unknown"
    return "head" if place < _HEAD_TO else "body" if place < _BODY_TO else "tail"


def shifted(affine: Affine, first: NDArray[np.integer]) -> Affine:
    """The affine of a grid that begins at voxel `first` (3,) of another one."""
    result = affine.copy()
    result[:3, 3] = world(affine, first)
    return result


def diameters(mask: Mask, affine: Affine, first: NDArray[np.integer] | None = None) -> tuple[Diameters, ...]:
    """The diameters of one lesion in the axial, coronal and sagittal plane.

    The outline of a slice runs through the middle of the pixels' outer edges, so that a disc has its own diameter on
    average over its positions.

    Args:
        mask: (X, Y, Z), not empty.
        affine: of the mask.
        first: voxel of the whole scan at which the mask begins; None: it is the whole scan.
    """
    order = AxisOrder.to_canonical(affine)
    turned = order.apply(mask)
    placed = order.affine(affine, mask.shape)
    size = spacing(placed)
    found = []
    for plane, through in PLANES:
        column, row = (axis for axis in range(3) if axis != through)
        slices = np.moveaxis(turned, through, 0)
        longest: tuple[float, float, Floats, Floats] | None = None
        chosen = 0
        for number in np.nonzero(slices.any(axis=(1, 2)))[0].tolist():
            measured = _feret(_outline(slices[number]) * size[[column, row]])
            if longest is None or measured[0] > longest[0] + 1e-9:
                longest, chosen = measured, number
        if longest is None:
            raise ValueError("an empty mask has no diameter")
        long_mm, short_mm, *ends = longest
        corners = []
        for pair in ends:
            index = np.full((2, 3), float(chosen))
            index[:, [column, row]] = pair / size[[column, row]]
            begin, end = world(placed, index)
            corners.append((_point(begin), _point(end)))
        source = order.axes[through]
        along = mask.shape[source] - 1 - chosen if order.flips[through] else chosen
        along += 0 if first is None else int(first[source])
        found.append(Diameters(plane, along, long_mm, short_mm, corners[0], corners[1]))
    return tuple(found)


def _outline(mask: Mask) -> Floats:
    """Points (n, 2) in pixels whose convex hull is that of a mask (rows, columns): middles of outer pixel edges."""
    points = []
    for axis in (0, 1):
        lines = mask if axis == 0 else mask.T
        filled = np.nonzero(lines.any(axis=1))[0]
        begin = lines[filled].argmax(axis=1) - 0.5
        end = lines.shape[1] - 0.5 - lines[filled][:, ::-1].argmax(axis=1)
        for ends in (begin, end):
            pair = np.stack([filled, ends], axis=1)
            points.append(pair if axis == 0 else pair[:, ::-1])
    return np.concatenate(points)


def _feret(points: Floats) -> tuple[float, float, Floats, Floats]:
    """Longest diameter of a convex hull and the longest one perpendicular to it: lengths, then ends (2, 2) of each."""
    from scipy.spatial import ConvexHull
    from scipy.spatial.distance import pdist, squareform

    hull: Floats = points[ConvexHull(points).vertices]
    apart = squareform(pdist(hull))
    one, other = (int(n) for n in np.unravel_index(int(apart.argmax()), apart.shape))
    length = float(apart[one, other])
    along = (hull[other] - hull[one]) / length
    across = np.array([-along[1], along[0]])
    # From one end to the other the hull has two sides; between its corners their distance changes linearly.
    turned = np.roll(hull, -one, axis=0)
    middle = (other - one) % len(hull)
    sides = turned[: middle + 1], np.concatenate([turned[middle:], turned[:1]])[::-1]
    steps = (hull - hull[one]) @ along
    heights = [np.interp(steps, (side - hull[one]) @ along, (side - hull[one]) @ across) for side in sides]
    widest = int(np.argmax(np.abs(heights[0] - heights[1])))
    foot = hull[one] + steps[widest] * along
    short = np.stack([foot + side[widest] * across for side in heights])
    return length, float(abs(heights[0][widest] - heights[1][widest])), hull[[one, other]], short


def _point(values: Floats) -> Point:
    x, y, z = (round(float(value), 2) for value in values)
    return x, y, z
