"""One synthetic patient: multi-phase CT of the pancreas, its label map and the truth. Not for clinical use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, shift

from medseg.phantom.anatomy import (
    DUCT,
    FAT,
    PANCREAS,
    PANCREAS_IN_PANCREATITIS,
    draw_course,
    paint_bile_duct,
    paint_gland,
    paint_surroundings,
)
from medseg.phantom.canvas import HU, Canvas, Grid
from medseg.phantom.lesions import Plan, draw_plan, paint_calcium, paint_lesion
from medseg.phantom.patients import CODES, Patient, draw_patient

PHASES = ("NC", "A", "V")
"""Without contrast, arterial, portal venous; all on the arterial phase's grid."""

LABELS = {
    0: "background",
    1: "pancreas",
    **{number + 1: f"lesion {code}" for number, code in enumerate(CODES) if number},
}

_NOISE_HU = 17.0
_BLUR_VOXELS = 0.5
_NOISE_GRAIN_VOXELS = 0.4
_MOTION_MM = 1.5
_FATTY_HU = -95.0


@dataclass(frozen=True)
class Options:
    """How the patients of a data set are made.

    Attributes:
        lookalikes: some patients look like another type.
        hard: lesions up to 40 % smaller in radius.
        noise_scale: 1 is 17 HU.
        motion_scale: 1 is a deviation of 1.5 mm between phases along each axis.
        abdomen: the whole abdomen at 2 mm; else the region around the pancreas at about 3 mm.
    """

    lookalikes: bool = True
    hard: bool = False
    noise_scale: float = 1.0
    motion_scale: float = 1.0
    abdomen: bool = False


@dataclass(frozen=True)
class Case:
    """A synthetic patient with pictures and truth.

    Attributes:
        patient: class, look, age and sex.
        grid: the voxels.
        phases: (3, X, Y, Z) int16 HU, see `PHASES`.
        labels: (X, Y, Z) uint8, see `LABELS`.
        plan: the lesion as drawn.
        motion: (3, 3) mm by which each phase is shifted.
    """

    patient: Patient
    grid: Grid
    phases: NDArray[np.int16]
    labels: NDArray[np.uint8]
    plan: Plan
    motion: NDArray[np.float64]


def make_case(seed: int, number: int, options: Options | None = None, *, code: str | None = None) -> Case:
    """Make patient `number` of the data set `seed`; the same one always, whatever the data set's size.

    Patient, grid, surroundings, lesion and image have sources of chance of their own, so that an option changes only
    what it is about.

    Args:
        seed: of the data set.
        number: of the patient; the classes take turns.
        options: see `Options`; None: the default ones.
        code: another class than the one whose turn it is.

    Raises:
        ValueError: unknown class, or a negative scale.
    """
    options = options or Options()
    if options.noise_scale < 0 or options.motion_scale < 0:
        raise ValueError(f"scales must not be negative, got {options.noise_scale} and {options.motion_scale}")
    who, where, around, lesion, image = (
        np.random.Generator(np.random.PCG64(part)) for part in np.random.SeedSequence([seed, number]).spawn(5)
    )
    patient = draw_patient(who, code or CODES[number % len(CODES)], lookalikes=options.lookalikes)
    grid = _draw_grid(where, abdomen=options.abdomen)
    canvas = Canvas(grid, FAT)
    course = draw_course(around)
    fat = 0.35 * float(np.clip((patient.age - 50) / 40, 0, 1)) * around.random()
    plan = draw_plan(lesion, patient.look)
    smaller = lesion.uniform(0.6, 1.0)
    plan = plan.shrunk(smaller) if options.hard else plan

    paint_surroundings(canvas, around)
    tissue = PANCREAS_IN_PANCREATITIS if plan.look == "CP" else PANCREAS
    gland = paint_gland(canvas, lesion, course, atrophy=plan.atrophy, duct=plan.duct, units=_mixed(tissue, fat))
    inside = np.zeros(grid.shape, dtype=bool)
    inside[gland.box] = gland.inside
    bile = paint_bile_duct(canvas, course, plan.bile_duct)
    labels = (inside & (canvas.tissue != bile)).astype(np.uint8)
    mass = np.zeros(grid.shape, dtype=bool)
    if plan.look != "normal":
        mass = paint_lesion(canvas, lesion, course, plan)
    duct = gland.duct if plan.duct_through else gland.duct & ~mass[gland.box]
    canvas.paint(gland.box, duct, DUCT)
    labels[gland.box][duct] = 1
    if plan.calcified:
        paint_calcium(canvas, lesion, course, plan)
    labels[mass] = CODES.index(patient.type) + 1

    motion = np.zeros((len(PHASES), 3))
    pictures = []
    for phase in range(len(PHASES)):
        enhancement = float(np.clip(image.normal(1, 0.12), 0.75, 1.25))
        movement = options.motion_scale * image.normal(0, _MOTION_MM, 3)
        picture = gaussian_filter(canvas.phase(phase, enhancement), _BLUR_VOXELS)
        if PHASES[phase] != "A":  # the label map belongs to the arterial phase
            motion[phase] = movement
            picture = shift(picture, movement / grid.spacing, order=1, mode="nearest")
        grain = gaussian_filter(image.standard_normal(grid.shape, dtype=np.float32), _NOISE_GRAIN_VOXELS)
        picture += options.noise_scale * _NOISE_HU / grain.std() * grain
        pictures.append(np.clip(np.rint(picture), -1024, 3000).astype(np.int16))
    return Case(patient, grid, np.stack(pictures), labels, plan, motion)


def _draw_grid(random: np.random.Generator, *, abdomen: bool) -> Grid:
    """Voxel size, field of view and its position, which differ from patient to patient."""
    if abdomen:
        spacing = np.array([2.0, 2.0, 2.0]) * random.uniform(0.9, 1.1, 3)
        extent = np.array([360.0, 280.0, 200.0])
    else:
        plane = random.uniform(2.6, 3.2)
        spacing = np.array([plane, plane, random.uniform(2.4, 3.6)])
        extent = np.array([192.0, 144.0, 96.0]) * random.uniform(1.0, 1.12, 3)
    spacing = spacing.round(3)
    x, y, z = (int(n) for n in np.rint(extent / spacing))
    first = -0.5 * (np.array([x, y, z]) - 1) * spacing + random.normal(0, 3, 3)
    return Grid((x, y, z), tuple(spacing.tolist()), tuple(first.round(3).tolist()))


def _mixed(units: HU, fat: float) -> HU:
    """Gland with a share of fat."""
    native, arterial, portal = ((1 - fat) * value + fat * _FATTY_HU for value in units)
    return native, arterial, portal
