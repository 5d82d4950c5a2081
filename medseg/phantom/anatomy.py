"""The upper abdomen around the pancreas, and the gland itself with its duct and the bile duct."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial import cKDTree

from medseg.phantom.canvas import HU, Box, Canvas, Floats, Grid, Mask, size_of, smooth_field

AIR: HU = (-1000, -1000, -1000)
FAT: HU = (-100, -98, -95)
MUSCLE: HU = (55, 60, 66)
CORTEX: HU = (600, 605, 610)
VERTEBRA: HU = (260, 270, 280)
LIVER: HU = (58, 75, 112)
SPLEEN: HU = (48, 130, 120)
KIDNEY: HU = (34, 165, 160)
BOWEL_WALL: HU = (40, 75, 85)
CONTENT: HU = (12, 14, 14)
AORTA: HU = (42, 320, 165)
PORTAL: HU = (42, 140, 180)
CAVA: HU = (42, 85, 140)
PANCREAS: HU = (42, 115, 95)
PANCREAS_IN_PANCREATITIS: HU = (40, 88, 88)
DUCT: HU = (8, 9, 9)

SAMPLES = 90
"""Points of the gland's centre line, head to tail."""
DUCT_RADIUS = 1.1
"""Of a healthy duct, mm; what is thinner than `_DRAWN` is not drawn."""
_DRAWN = 1.5

_COURSE = ((-46, -2, -24), (-30, -8, -12), (-8, -16, 0), (25, -8, 8), (55, 8, 14), (72, 18, 18))
_THICKNESS = np.array(
    [(0.0, 12.0), (0.12, 15.0), (0.35, 8.0), (0.6, 9.5), (0.85, 9.0), (1.0, 6.0)]
)  # place s, radius mm
_LOBULES = (4.5, 0.1)  # mm, share of the radius

# Centre and semi-axes in mm; the centre moves from patient to patient by the last number.
_ORGANS: tuple[tuple[tuple[float, float, float], tuple[float, float, float], HU, float], ...] = (
    ((-85, -30, 25), (55, 55, 45), LIVER, 6),
    ((95, 20, 25), (25, 35, 35), SPLEEN, 5),
    ((-60, 45, -25), (26, 24, 45), KIDNEY, 4),
    ((62, 48, -12), (25, 23, 45), KIDNEY, 4),
    ((0, 72, 0), (24, 24, 200), VERTEBRA, 3),
)
_HOLLOW: tuple[tuple[tuple[float, float, float], tuple[float, float, float]], ...] = (
    ((30, -58, 25), (45, 22, 25)),  # stomach
    ((-66, -2, -22), (12, 14, 30)),  # duodenum
)
_WALL = 3.0
_BODY = ((0.0, 8.0), (166.0, 122.0))  # centre and semi-axes of the skin, x and y
_LAYERS: tuple[tuple[float, float, HU], ...] = (
    (0, 3, MUSCLE),
    (3, 19, FAT),
    (19, 31, MUSCLE),
)  # depth mm: skin, fat, wall


def paint_surroundings(canvas: Canvas, random: np.random.Generator) -> None:
    """Organs, vessels and the body wall, all but the pancreas."""
    for centre, axes, units, jitter in _ORGANS:
        canvas.ellipsoid(centre + random.normal(0, jitter, 3), np.asarray(axes) * random.normal(1, 0.06, 3), units)
    _paint_bowel(canvas, random)
    for centre, axes in _HOLLOW:
        middle = centre + random.normal(0, 4, 3)
        semi = np.asarray(axes) * random.normal(1, 0.06, 3)
        canvas.ellipsoid(middle, semi, BOWEL_WALL)
        canvas.ellipsoid(middle, semi - _WALL, CONTENT)
    x, y, _ = random.normal(0, 3, 3)
    canvas.cylinder(4 + x, 38 + y, 9.5, AORTA)
    canvas.cylinder(-22 + x, 36 + y, 11, CAVA)
    canvas.cylinder(-12 + x, 6 + y, 6, PORTAL, top=2)
    _paint_body_wall(canvas)  # after the organs, which end at it
    _paint_ribs(canvas)


def _paint_body_wall(canvas: Canvas) -> None:
    """Air outside, then skin, fat and muscle, where the field of view reaches them."""
    grid = canvas.grid
    everything = (slice(0, grid.shape[0]), slice(0, grid.shape[1]), slice(0, grid.shape[2]))
    x, y, _ = grid.points(everything)
    depth = _depth(x, y)
    if float(depth.min()) >= _LAYERS[-1][1]:
        return
    canvas.paint(everything, np.broadcast_to(depth < 0, grid.shape), AIR)
    for upper, lower, units in _LAYERS:
        canvas.paint(everything, np.broadcast_to((depth >= upper) & (depth < lower), grid.shape), units)


def _depth(x: Floats, y: Floats) -> Floats:
    """Depth below the skin in mm, nearly; negative outside."""
    (cx, cy), (ax, ay) = _BODY
    radius = np.sqrt(((x - cx) / ax) ** 2 + ((y - cy) / ay) ** 2)
    distance = np.sqrt((x - cx) ** 2 + (y - cy) ** 2)
    return distance * (1 / np.maximum(radius, 1e-3) - 1)


def _paint_ribs(canvas: Canvas) -> None:
    """Six ribs on each side in the muscle of the wall, sloping forwards and down."""
    grid = canvas.grid
    (cx, cy), (ax, ay) = _BODY
    for side in (-1, 1):
        for level in range(6):
            angle = np.linspace(0.05, 0.8, 60) * np.pi  # from the back to the front
            course = np.stack(
                [
                    cx + side * (ax - 25) * np.sin(angle),
                    cy + (ay - 25) * np.cos(angle),
                    130 - 32.0 * level - 60 * angle / np.pi,
                ],
                axis=1,
            )
            box = grid.box(course.min(axis=0) - 6, course.max(axis=0) + 6)
            if 0 in size_of(box):
                continue
            distance, _ = _nearest(grid, box, course, 6.0)
            canvas.paint(box, distance < 5, CORTEX)
            canvas.paint(box, distance < 3, VERTEBRA)


def _paint_bowel(canvas: Canvas, random: np.random.Generator) -> None:
    """Loops below and in front of the pancreas, some with gas in their upper (front) part."""
    for _ in range(16):
        centre = np.array([random.uniform(-110, 110), random.uniform(-85, -45), random.uniform(-95, -45)])
        axes = np.array([random.uniform(16, 34), random.uniform(12, 20), random.uniform(12, 22)])
        gas = random.random() < 0.4
        canvas.ellipsoid(centre, axes, BOWEL_WALL)
        canvas.ellipsoid(centre, axes - _WALL, CONTENT)
        if gas:
            box = canvas.grid.box(centre - axes, centre + axes * (1, -0.1, 1))
            canvas.paint(box, canvas.radius(box, centre, axes - _WALL) < 1, AIR)


def _nearest(grid: Grid, box: Box, course: Floats, reach: float) -> tuple[Floats, np.ndarray]:
    """Distance in mm of a box's voxels from the nearest point (n, 3) of a course, and its number; inf beyond reach."""
    x, y, z = np.broadcast_arrays(*grid.points(box))
    points = np.stack([x, y, z], axis=-1).reshape(-1, 3)
    distance, number = cKDTree(course).query(points, distance_upper_bound=reach)
    return np.asarray(distance).reshape(size_of(box)), np.minimum(number, len(course) - 1).reshape(size_of(box))


@dataclass(frozen=True)
class Course:
    """The gland's centre line.

    Attributes:
        points: (SAMPLES, 3) mm, head to tail, evenly spaced.
        tangents: (SAMPLES, 3), of length 1.
        radius: (SAMPLES,) mm, half the gland's thickness in health.
    """

    points: Floats
    tangents: Floats
    radius: Floats

    def at(self, place: float) -> int:
        """The sample at a place s, 0 (head) to 1 (tail)."""
        return round(place * (SAMPLES - 1))


def draw_course(random: np.random.Generator) -> Course:
    """A patient's centre line and thickness."""
    knots = np.asarray(_COURSE, dtype=float) + random.normal(0, 3.5, (len(_COURSE), 3))
    chords = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(knots, axis=0), axis=1))])
    spline = CubicSpline(chords / chords[-1], knots)
    place = np.linspace(0, 1, SAMPLES)
    tangents = spline(place, 1)
    thickness = np.interp(place, _THICKNESS[:, 0], _THICKNESS[:, 1])
    return Course(
        spline(place), tangents / np.linalg.norm(tangents, axis=1, keepdims=True), thickness * random.normal(1, 0.08)
    )


@dataclass(frozen=True)
class Gland:
    """The painted pancreas.

    Attributes:
        box: where it lies; the arrays below have its shape.
        inside: the gland's voxels.
        duct: the voxels of its duct, empty where it is too thin to be drawn.
    """

    box: Box
    inside: Mask
    duct: Mask


def paint_gland(
    canvas: Canvas, random: np.random.Generator, course: Course, *, atrophy: Floats, duct: Floats, units: HU
) -> Gland:
    """Paint the gland; its duct is returned and not painted, since a lesion comes in between.

    Args:
        canvas: what is painted on.
        random: source of its lobules.
        course: its centre line.
        atrophy: (SAMPLES,) share of the thickness that is left.
        duct: (SAMPLES,) radius of the duct, mm.
        units: HU of its tissue.
    """
    radius = course.radius * atrophy
    reach = max(float(radius.max()) * (1 + 2 * _LOBULES[1]), float(duct.max())) + 1
    box = canvas.grid.box(course.points.min(axis=0) - reach, course.points.max(axis=0) + reach)
    distance, nearest = _nearest(canvas.grid, box, course.points, reach)
    lobules = 1 + _LOBULES[1] * smooth_field(random, canvas.grid, box, _LOBULES[0])
    inside = distance < radius[nearest] * lobules
    canvas.paint(box, inside, units)
    return Gland(box, inside, (distance < duct[nearest]) & (duct[nearest] > _DRAWN))


def paint_bile_duct(canvas: Canvas, course: Course, radius: float) -> int:
    """The common bile duct, from the head of the gland to the liver; radius in mm. Returns the tissue's number."""
    return canvas.tube(course.points[course.at(0.03)], np.array([-30.0, -2.0, 45.0]), radius, DUCT)
