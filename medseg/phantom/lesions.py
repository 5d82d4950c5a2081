"""What each type of lesion looks like: where it sits, its size, what it is made of, what it does to the gland."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.ndimage import label

from medseg.phantom.anatomy import DUCT_RADIUS, PANCREAS, SAMPLES, Course
from medseg.phantom.canvas import HU, Canvas, Floats, Mask, smooth_field

FLUID: HU = (12, 13, 14)
_IRREGULARITY_MM = 6.0
_MICROCYST_MM = 7.0


@dataclass(frozen=True)
class Plan:
    """A lesion before it is painted, and its effect on the gland.

    Attributes:
        look: code of the type that is drawn.
        subtype: a word for its variant.
        site: place s along the gland, 0 head, 1 tail.
        radius: mean radius, mm.
        offset: of its centre from the gland's centre line, in radii.
        irregularity: of its surface, share of the radius.
        units: HU of its main tissue.
        duct: (SAMPLES,) radius of the pancreatic duct, mm.
        atrophy: (SAMPLES,) share of the gland's thickness that is left.
        bile_duct: radius of the bile duct, mm.
        calcified: calcium spots in the whole gland.
        duct_through: the duct is seen inside the lesion too.
    """

    look: str
    subtype: str = ""
    site: float = 0.0
    radius: float = 0.0
    offset: float = 0.0
    irregularity: float = 0.0
    units: HU = FLUID
    duct: Floats = field(default_factory=lambda: np.full(SAMPLES, DUCT_RADIUS))
    atrophy: Floats = field(default_factory=lambda: np.ones(SAMPLES))
    bile_duct: float = 3.0
    calcified: bool = False
    duct_through: bool = False

    def shrunk(self, share: float) -> Plan:
        """The same lesion with its radius multiplied."""
        return replace(self, radius=self.radius * share)


_PLACE = np.linspace(0, 1, SAMPLES)


def _over_native(native: float, arterial: float, portal: float) -> HU:
    return native, native + arterial, native + portal


def _pdac(random: np.random.Generator) -> Plan:
    head = random.random() < 0.65
    site = random.uniform(0.05, 0.3) if head else random.uniform(0.45, 0.9)
    hidden = random.random() < 0.12
    units = _over_native(40, random.normal(22, 6), random.normal(36, 6))
    upstream = site < _PLACE
    return Plan(
        "PDAC",
        "iso-attenuating" if hidden else "hypo-attenuating",
        site=site,
        radius=random.uniform(10, 21),
        offset=0.15,
        irregularity=0.18,
        units=PANCREAS if hidden else units,
        duct=np.where(upstream, random.uniform(2.5, 4.5), DUCT_RADIUS),
        atrophy=np.where(upstream, random.uniform(0.5, 0.75), 1.0),
        bile_duct=random.uniform(5, 8) if head else 3.0,
    )


def _pnet(random: np.random.Generator) -> Plan:
    radius = random.uniform(6, 16)
    bright = random.random() < 0.8
    units: HU = (42, random.normal(185, 20), random.normal(130, 10))
    necrotic = random.random() < 0.4 and radius > 12
    return Plan(
        "PNET",
        ("hyper-attenuating" if bright else "iso-attenuating") + (", necrotic" if necrotic else ""),
        site=random.uniform(0.05, 0.95),
        radius=radius,
        offset=0.4,
        irregularity=0.03,
        units=units if bright else (42, 100, 95),
    )


def _spt(random: np.random.Generator) -> Plan:
    return Plan(
        "SPT",
        "rim calcium" if random.random() < 0.3 else "plain",
        site=random.uniform(0.1, 0.95),
        radius=random.uniform(16, 34),
        offset=0.8,
        irregularity=0.03,
        units=(34, 62, 84),
    )


def _ipmn(random: np.random.Generator) -> Plan:
    site, width = random.uniform(0.03, 0.6), random.uniform(2.5, 4.5)
    return Plan(
        "IPMN",
        "main and branch duct",
        site=site,
        radius=random.uniform(10, 18),
        offset=0.5,
        duct=np.where(site < _PLACE, 1.15 * width, width),
        duct_through=True,
    )


def _mcn(random: np.random.Generator) -> Plan:
    septum, calcium = random.random() < 0.35, random.random() < 0.25
    return Plan(
        "MCN",
        ", ".join(word for word, there in (("septum", septum), ("rim calcium", calcium)) if there) or "plain",
        site=random.uniform(0.5, 0.97),
        radius=random.uniform(16, 36),
        offset=0.9,
        irregularity=0.03,
    )


def _cp(random: np.random.Generator) -> Plan:
    beads = 1 + 0.35 * np.sin(45 * _PLACE)
    return Plan(
        "CP",
        "mass-forming",
        site=random.uniform(0.05, 0.5),
        radius=random.uniform(10, 17),
        offset=0.15,
        irregularity=0.15,
        units=(40, 80, 98),
        duct=random.uniform(2, 3.6) * beads,
        atrophy=np.full(SAMPLES, random.uniform(0.6, 0.8)),
        calcified=True,
    )


def _scn(random: np.random.Generator) -> Plan:
    return Plan(
        "SCN",
        "calcified scar" if random.random() < 0.3 else "scar",
        site=random.uniform(0.05, 0.95),
        radius=random.uniform(12, 26),
        offset=0.7,
        irregularity=0.1,
        units=(28, 62, 62),
    )


def _other(random: np.random.Generator) -> Plan:
    if random.random() < 0.6:
        return Plan(
            "other",
            "ampullary",
            site=0.0,
            radius=random.uniform(6, 11),
            offset=0.15,
            irregularity=0.12,
            units=(40, 70, 85),
            duct=np.full(SAMPLES, random.uniform(2, 3.5)),
            bile_duct=random.uniform(5.5, 8),
        )
    return Plan(
        "other",
        "bulky",
        site=random.uniform(0.05, 0.9),
        radius=random.uniform(12, 24),
        offset=0.15,
        irregularity=0.12,
        units=(45, 72, 88),
    )


_PLANS: dict[str, Callable[[np.random.Generator], Plan]] = {
    "PDAC": _pdac,
    "PNET": _pnet,
    "SPT": _spt,
    "IPMN": _ipmn,
    "MCN": _mcn,
    "CP": _cp,
    "SCN": _scn,
    "other": _other,
}


def draw_plan(random: np.random.Generator, look: str) -> Plan:
    """A lesion of a type, or none for ``normal``."""
    return Plan("normal") if look == "normal" else _PLANS[look](random)


def paint_lesion(canvas: Canvas, random: np.random.Generator, course: Course, plan: Plan) -> Mask:
    """Paint a lesion with its parts; the mask (X, Y, Z) of what belongs to it."""
    inside = np.zeros(canvas.grid.shape, dtype=bool)
    sample = course.at(plan.site)
    direction = _normal(random, course.tangents[sample])
    if direction[1] > 0:
        direction = -direction  # forwards: behind the gland lies the spine, which no lesion grows into
    centre = course.points[sample] + plan.offset * plan.radius * direction
    if plan.look == "IPMN":
        count = int(random.integers(3, 7))
        for _ in range(count):
            radius = plan.radius * random.uniform(0.3, 0.55)
            _blob(canvas, random, plan, centre + random.normal(0, 0.45 * plan.radius, 3), radius, inside)
        return inside
    _blob(canvas, random, plan, centre, plan.radius, inside)
    if plan.subtype == "bulky":
        for _ in range(int(random.integers(0, 3))):
            radius = random.uniform(6, 10)
            direction = random.standard_normal(3)
            away = direction / np.linalg.norm(direction) * (plan.radius + 1.4 * radius)
            _blob(canvas, random, plan, centre + away, radius, inside)
    return inside


def _normal(random: np.random.Generator, tangent: Floats) -> Floats:
    """A random direction at a right angle to the gland."""
    direction = random.standard_normal(3)
    direction -= (direction @ tangent) * tangent
    return np.asarray(direction / np.linalg.norm(direction))


def _blob(canvas: Canvas, random: np.random.Generator, plan: Plan, centre: Floats, radius: float, lesion: Mask) -> None:
    """One rounded part of a lesion with what is inside it; adds its voxels to `lesion`."""
    axes = radius * random.uniform(0.85, 1.15, 3) if plan.look != "IPMN" else np.full(3, radius)
    reach = axes / (1 - 2 * plan.irregularity)
    box = canvas.grid.box(centre - reach, centre + reach)
    if any(part.stop <= part.start for part in box):
        return
    depth = canvas.radius(box, centre, axes)
    if plan.irregularity:
        depth = depth * (1 + plan.irregularity * smooth_field(random, canvas.grid, box, _IRREGULARITY_MM))
    inside = depth < 1
    parts, count = label(inside)
    if count > 1:  # the field has cut off a crumb
        inside = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    lesion[box] |= inside
    canvas.paint(box, inside, plan.units)

    def thickness(millimetres: float) -> Mask:
        return inside & (depth > 1 - millimetres / radius)

    def noise(millimetres: float) -> Floats:
        return smooth_field(random, canvas.grid, box, millimetres)

    if plan.look == "PNET" and "necrotic" in plan.subtype:
        canvas.paint(box, depth < 0.5, (22, 28, 30))
    elif plan.look == "SPT":
        canvas.paint(box, (depth < 0.9) & (noise(6.6) > 0.1), (24, 26, 27))
        canvas.paint(box, thickness(2.5), (40, 85, 108))
        if plan.subtype == "rim calcium":
            canvas.paint(box, inside & (depth > 0.8) & (noise(3) > 1.6), (320, 320, 320))
    elif plan.look == "MCN":
        canvas.paint(box, thickness(2), (38, 75, 95))
        if "septum" in plan.subtype:
            across = random.standard_normal(3)
            across /= np.linalg.norm(across)
            x, y, z = (p - c for p, c in zip(canvas.grid.points(box), centre, strict=True))
            sheet = np.abs(x * across[0] + y * across[1] + z * across[2] - 0.2 * radius) < 1.5
            canvas.paint(box, inside & sheet, (35, 65, 85))
        if "rim calcium" in plan.subtype:
            canvas.paint(box, inside & (depth > 0.9) & (noise(3) > 1.8), (350, 350, 350))
    elif plan.look == "SCN":
        phases = random.uniform(0, 2 * np.pi, 3)
        waves = (
            np.sin(2 * np.pi / _MICROCYST_MM * p + a) for p, a in zip(canvas.grid.points(box), phases, strict=True)
        )
        x, y, z = waves
        canvas.paint(box, inside & (np.abs(x * y * z) > 0.25), (14, 18, 18))
        canvas.paint(box, depth < 0.22, (36, 60, 80))
        if plan.subtype == "calcified scar":
            canvas.paint(box, depth < 0.14, (300, 300, 300))


def paint_calcium(canvas: Canvas, random: np.random.Generator, course: Course, plan: Plan) -> None:
    """Spots of calcium along the gland, as in chronic pancreatitis."""
    for _ in range(int(random.integers(8, 26))):
        sample = int(random.integers(0, SAMPLES))
        away = 0.7 * course.radius[sample] * plan.atrophy[sample] * random.random()
        centre = course.points[sample] + away * _normal(random, course.tangents[sample])
        radius = random.uniform(1.6, 3.2)
        grid = canvas.grid
        # The voxel nearest to the centre always counts: a spot may be smaller than a voxel.
        reach = np.maximum(radius, 0.5 * np.asarray(grid.spacing))
        box = grid.box(centre - reach, centre + reach)
        if any(part.stop <= part.start for part in box):
            continue
        distance = canvas.radius(box, centre, np.ones(3))
        canvas.paint(box, distance <= max(radius, float(distance.min())), (450, 450, 450))
