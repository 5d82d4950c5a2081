"""The synthetic patients: lesion types, age and sex, and how often one type looks like another.

The types and their tendencies are chosen, not measured: plausible for a clinician, with overlap on purpose. Synthetic
data, not for clinical use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

AGES = (18, 90)
"""Youngest and oldest patient, whole years; the tails of the age distributions are moved there."""

Sex = Literal["male", "female"]


@dataclass(frozen=True)
class LesionType:
    """A class of patients.

    Attributes:
        code: its short name, which patients.csv holds.
        name: the type in words.
        age: mean and standard deviation, years.
        female: probability that a patient is a woman.
        looks: how its pictures look: code of the type that is drawn, and its probability.
    """

    code: str
    name: str
    age: tuple[float, float]
    female: float
    looks: Mapping[str, float] = field(default_factory=dict)


TYPES: tuple[LesionType, ...] = (
    LesionType("normal", "no lesion", (55, 15), 0.50, {"normal": 1.0}),
    LesionType("PDAC", "pancreatic ductal adenocarcinoma", (64, 9), 0.42, {"PDAC": 0.85, "CP": 0.15}),
    LesionType("PNET", "neuroendocrine tumour", (54, 12), 0.52, {"PNET": 0.75, "SPT": 0.15, "PDAC": 0.10}),
    LesionType("SPT", "solid pseudopapillary tumour", (32, 11), 0.87, {"SPT": 0.70, "MCN": 0.30}),
    LesionType("IPMN", "intraductal papillary mucinous neoplasm", (66, 8), 0.42, {"IPMN": 0.85, "MCN": 0.15}),
    LesionType("MCN", "mucinous cystic neoplasm", (47, 11), 0.93, {"MCN": 0.85, "SPT": 0.15}),
    LesionType("CP", "chronic pancreatitis, mass-forming", (50, 11), 0.22, {"CP": 0.70, "PDAC": 0.30}),
    LesionType("SCN", "serous cystic neoplasm", (57, 12), 0.72, {"SCN": 0.75, "MCN": 0.15, "IPMN": 0.10}),
    LesionType("other", "ampullary cancer, metastasis, lymphoma, rest", (61, 11), 0.42, {"other": 0.80, "PDAC": 0.20}),
)
"""The nine classes; a class's number is its place. Voxels of a lesion have the label number + 1, the pancreas has 1."""

CODES: tuple[str, ...] = tuple(kind.code for kind in TYPES)


@dataclass(frozen=True)
class Patient:
    """One synthetic patient.

    Attributes:
        type: code of the class.
        look: code of the type that the picture shows; the demographics follow the class.
        age: years.
        sex: male or female.
    """

    type: str
    look: str
    age: int
    sex: Sex


def draw_patient(random: np.random.Generator, code: str, *, lookalikes: bool = True) -> Patient:
    """A patient of a class.

    Args:
        random: takes the same number of draws with and without look-alikes.
        code: one of `CODES`.
        lookalikes: some patients look like another type; else each looks like its own.

    Raises:
        ValueError: unknown code.
    """
    if code not in CODES:
        raise ValueError(f"unknown class {code!r}; known: {', '.join(CODES)}")
    kind = TYPES[CODES.index(code)]
    age = int(np.clip(np.rint(random.normal(*kind.age)), *AGES))
    sex: Sex = "female" if random.random() < kind.female else "male"
    look = list(kind.looks)[int(np.searchsorted(np.cumsum(list(kind.looks.values())), random.random(), side="right"))]
    return Patient(code, look if lookalikes else code, age, sex)


@dataclass(frozen=True)
class Ceilings:
    """The highest accuracy that any reader can reach on balanced classes, by what it knows of each patient.

    Attributes:
        look: the look, without any error.
        look_age_sex: the look, age and sex.
        age_sex: age and sex only.
    """

    look: float
    look_age_sex: float
    age_sex: float


def ceilings(codes: Sequence[str] = CODES, *, lookalikes: bool = True) -> Ceilings:
    """The best accuracy on equally many patients of each of `codes`, summed exactly.

    A reader that always names the most probable class is right with probability sum of max_c P(c) P(findings | c)
    over all findings. Findings are few: nine looks, whole years of age, two sexes.
    """
    kinds = [TYPES[CODES.index(code)] for code in codes]
    demographics = np.stack([_demographics(kind) for kind in kinds])
    looks = np.array(
        [[kind.looks.get(look, 0.0) if lookalikes else kind.code == look for look in CODES] for kind in kinds]
    )
    both = looks[:, :, None] * demographics[:, None, :]
    return Ceilings(*(float(table.max(axis=0).sum()) / len(kinds) for table in (looks, both, demographics)))


def _demographics(kind: LesionType) -> NDArray[np.float64]:
    """Probability of each age and sex in a class, (ages * 2,)."""
    years = np.arange(AGES[0], AGES[1])  # upper ends of all years of life but the last, which has none
    below = np.concatenate([[0.0], norm.cdf(years + 0.5, *kind.age), [1.0]])
    return np.outer(np.diff(below), [1 - kind.female, kind.female]).ravel()
