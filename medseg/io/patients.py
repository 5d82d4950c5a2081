"""Age, sex and, where it is known, the class of a patient: from patients.csv, a user's words or a DICOM header."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from medseg.errors import InputError, UsageError

PATIENTS = "patients.csv"
SEXES = ("male", "female", "unknown")
"""A sex's number is its place."""

AGES = (0.0, 120.0)
PATIENT_TAGS = ("PatientAge", "PatientBirthDate", "PatientSex", "StudyDate")
"""Elements of a DICOM header that `told_by_dicom` reads."""
_DAYS_IN = {"Y": 365.25, "M": 365.25 / 12, "W": 7.0, "D": 1.0}
_WORDS = {"": 2, "unknown": 2, "male": 0, "m": 0, "female": 1, "f": 1}


@dataclass(frozen=True, slots=True)
class PatientFacts:
    """What is known of a patient beside the scan: one row of patients.csv.

    Attributes:
        age: years, NaN unknown.
        sex: 0 male, 1 female, 2 unknown.
        code: of the class, "" unknown.
        remarks: entries that are taken as unknown because they cannot be right, one sentence each.
    """

    age: float = math.nan
    sex: int = 2
    code: str = ""
    remarks: tuple[str, ...] = ()

    def completed(self, other: PatientFacts) -> PatientFacts:
        """The same, with age and sex of another source where they are unknown."""
        return replace(
            self, age=other.age if math.isnan(self.age) else self.age, sex=other.sex if self.sex == 2 else self.sex
        )


def read_patients(path: Path, *, classes: bool = False) -> dict[str, PatientFacts]:
    """Read the table; an unknown age or sex is left empty in it.

    Args:
        path: CSV, UTF-8, with the columns case, age, sex and perhaps class; others are ignored.
        classes: the column class must be there.

    Raises:
        InputError: no such file, no table, a column is missing, or a case stands there twice.
    """
    columns = ("case", "age", "sex", "class") if classes else ("case", "age", "sex")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            lines = list(reader)
    except FileNotFoundError:
        raise InputError(path, "no such file", f"it holds {', '.join(columns)} of each patient") from None
    except (OSError, ValueError, csv.Error) as err:
        raise InputError(path, f"cannot be read as CSV ({err})", "restore the file") from err
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise InputError(path, f"no column {', '.join(missing)}", f"it needs {', '.join(columns)}")
    found: dict[str, PatientFacts] = {}
    for line in lines:
        case = (line["case"] or "").strip()
        if case in found:
            raise InputError(path, f"{case} stands there twice", "keep one row for each case")
        age, sex = age_of(line["age"]), sex_of(line["sex"])
        remarks = []
        if age is None:
            remarks.append(f"an age is not between {AGES[0]:g} and {AGES[1]:g} years; taken as unknown")
        if sex is None:
            remarks.append("a sex is neither male nor female; taken as unknown")
        found[case] = PatientFacts(
            math.nan if age is None else age, 2 if sex is None else sex, (line.get("class") or "").strip(), (*remarks,)
        )
    return found


def read_classes(root: Path) -> dict[str, str]:
    """The classes of a data set, code to name, in their order; the first is that of patients without a lesion.

    Raises:
        InputError: dataset.json has no ``classes``.
    """
    path = root / "dataset.json"
    try:
        classes = json.loads(path.read_text(encoding="utf-8")).get("classes")
    except (OSError, ValueError, AttributeError) as err:
        raise InputError(path, f"cannot be read as JSON ({err})", "restore the file") from err
    if not isinstance(classes, dict) or len(classes) < 2:
        raise InputError(path, "no classes", 'name them: "classes": {"normal": "no lesion", "PDAC": "..."}')
    return {str(code): str(name) for code, name in classes.items()}


def facts_of(rows: Mapping[str, PatientFacts], table: Path, *cases: str) -> PatientFacts:
    """The row of a patient who goes by one of several names.

    Args:
        rows: as `read_patients` gives them.
        table: where they are from.
        cases: names, the likeliest first.

    Raises:
        InputError: there is no such row.
    """
    for case in cases:
        if case in rows:
            return rows[case]
    raise InputError(table, f"no row for {cases[0]}", "add one; age and sex may be empty in it")


def told_facts(age: str | float | None, sex: str | None) -> PatientFacts:
    """What a user says of a patient; None: unknown.

    Args:
        age: years.
        sex: F, M, female or male in any case.

    Raises:
        UsageError: no age between 0 and 120 years, or another word for the sex.
    """
    years = math.nan if age is None else age_of(str(age))
    if years is None or (age is not None and math.isnan(years)):
        between = f"{AGES[0]:g} and {AGES[1]:g}"
        raise UsageError("--age", f"{age!r} is no age between {between} years", "leave it out if unknown")
    number = sex_of(sex)
    if number is None:
        raise UsageError("--sex", f"{sex!r} is not known", "use F or M, or leave it out if unknown")
    return PatientFacts(years, number)


def told_by_dicom(header: Mapping[str, str]) -> PatientFacts:
    """What a DICOM header says of a patient; an age of 0 years, which some programs write for none, is unknown.

    Args:
        header: `PATIENT_TAGS` by name; PatientAge as "063Y", dates as YYYYMMDD.
    """
    told = re.fullmatch(r"(\d{1,3})([YMWD])", header.get("PatientAge", "").strip().upper())
    age = math.nan
    if told:
        age = int(told[1]) * _DAYS_IN[told[2]] / _DAYS_IN["Y"]
    else:
        with suppress(ValueError):
            born, seen = (datetime.strptime(header.get(tag, ""), "%Y%m%d") for tag in ("PatientBirthDate", "StudyDate"))
            age = (seen - born).days / _DAYS_IN["Y"]
    sex = sex_of(header.get("PatientSex"))
    return PatientFacts(age if AGES[0] < age <= AGES[1] else math.nan, 2 if sex is None else sex)


def age_of(text: str | None) -> float | None:
    """Years of an entry, NaN of an empty one; None where it is no age."""
    try:
        age = float((text or "").strip() or "nan")
    except ValueError:
        return None
    return age if math.isnan(age) or AGES[0] <= age <= AGES[1] else None


def sex_of(text: str | None) -> int | None:
    """0 male, 1 female, 2 unknown of an entry such as "F", "male" or ""; None of any other word."""
    return _WORDS.get((text or "").strip().lower())
