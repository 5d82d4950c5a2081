"""patients.csv: the class, age and sex of each case; and what training leaves out of them on purpose."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg.errors import InputError
from medseg.inference.diagnosis import PatientData
from medseg.io.patients import PATIENTS
from medseg.io.patients import read_patients as read_table
from medseg.networks.mdpformer import UNKNOWN_SEX
from medseg.training.config import TrainingConfig

log = logging.getLogger(__name__)

# Chances of leaving out, for one patient at one step. Age and sex together is a case of its own: dropped independently
# they would hardly ever be unknown at once, and a network never sees what it is given at many hospitals.
_BOTH_UNKNOWN, _ONE_UNKNOWN = 0.20, 0.10
_PHASE_ABSENT, _LAST_PHASE_ALONE = 0.10, 0.05


@dataclass(frozen=True)
class Patient:
    """One row of patients.csv.

    Attributes:
        target: number of the class.
        age: years, NaN unknown.
        sex: 0 male, 1 female, 2 unknown.
    """

    target: int
    age: float
    sex: int


def diagnoses(config: TrainingConfig, data: Path) -> bool:
    """Whether a run learns to diagnose: a network that can, on patients; else it learns to segment."""
    able = config.architecture == "mdpformer" and config.network.get("patient_classes") != 0
    return able and (data / PATIENTS).is_file()


def read_patients(root: Path, classes: Collection[str], cases: Collection[str]) -> dict[str, Patient]:
    """The patients of the named cases, from patients.csv; an unknown age or sex is left empty there.

    Raises:
        InputError: no such file, a column or a case is missing, a case stands there twice, or an unknown class.
    """
    path = root / PATIENTS
    numbers = {code: number for number, code in enumerate(classes)}
    found: dict[str, Patient] = {}
    for case, row in read_table(path, classes=True).items():
        if row.code not in numbers:
            raise InputError(path, f"class {row.code!r} of {case}", f"dataset.json names {', '.join(numbers)}")
        for remark in row.remarks:
            log.warning("%s", remark)
        found[case] = Patient(numbers[row.code], row.age, row.sex)
    absent = [case for case in cases if case not in found]
    if absent:
        raise InputError(path, f"{len(absent)} cases have no row ({absent[0]}, ...)", "add them")
    return {case: found[case] for case in cases}


def leave_out(random: np.random.Generator, patient: Patient, phases: int) -> PatientData:
    """What the network is told of a patient at one step of training.

    Args:
        random: one step's.
        patient: what is known.
        phases: number of phases; the last one stays when all would go.
    """
    both = random.random() < _BOTH_UNKNOWN
    no_age, no_sex = (both or chance < _ONE_UNKNOWN for chance in random.random(2))
    there = random.random(phases) >= _PHASE_ABSENT
    if random.random() < _LAST_PHASE_ALONE:
        there[:] = False
    if not there.any():
        there[-1] = True
    return PatientData(
        math.nan if no_age else patient.age, UNKNOWN_SEX if no_sex else patient.sex, tuple(there.tolist())
    )


def frequencies(patients: Mapping[str, Patient], classes: Collection[str]) -> dict[str, int]:
    """Patients of each class."""
    counts = np.bincount([patient.target for patient in patients.values()], minlength=len(classes))
    return {code: int(count) for code, count in zip(classes, counts, strict=True)}
