"""patients.csv: what is read, what is refused, and how often something is left out in training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from medseg.errors import InputError
from medseg.io.patients import read_classes
from medseg.training.patients import Patient, frequencies, leave_out, read_patients

CLASSES = ("normal", "PDAC", "CP")


def table(root: Path, *rows: str, header: str = "case,age,sex,class") -> Path:
    (root / "patients.csv").write_text("\n".join((header, *rows)) + "\n")
    return root


def test_patients_are_read_and_what_is_unknown_stays_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = table(tmp_path, "a,64,male,PDAC", "b,,,normal", "c,47.5,F,CP", "d,200,x,CP", "e,old,unknown,CP", "f,1,m,CP")
    found = read_patients(root, CLASSES, ["c", "a", "b", "d", "e"])
    assert list(found) == ["c", "a", "b", "d", "e"]
    assert found["a"] == Patient(1, 64.0, 0)
    assert found["c"] == Patient(2, 47.5, 1)
    assert [(math.isnan(found[case].age), found[case].sex) for case in "bde"] == [(True, 2)] * 3
    # Two ages and a sex that are none; the lines hold no value and no case.
    assert len(caplog.messages) == 3
    assert not any(word in line for line in caplog.messages for word in ("200", "old", " d", " e"))
    assert frequencies(found, CLASSES) == {"normal": 1, "PDAC": 1, "CP": 3}


@pytest.mark.parametrize(
    ("rows", "header", "problem"),
    [
        (["a,1,m,PDAC"], "case,age,sex,class", r"1 cases have no row \(b, ...\)"),
        (["a,1,m,PDAC", "a,1,m,CP"], "case,age,sex,class", "a stands there twice"),
        (["a,1,m,GIST"], "case,age,sex,class", "class 'GIST' of a; dataset.json names normal, PDAC, CP"),
        (["a,1"], "case,age", "no column sex, class"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, rows: list[str], header: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        read_patients(table(tmp_path, *rows, header=header), CLASSES, ["a", "b"])


def test_a_missing_table_or_list_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_patients(tmp_path, CLASSES, ["a"])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {}}))
    with pytest.raises(InputError, match="no classes"):
        read_classes(tmp_path)


def test_age_and_sex_go_together_often_and_one_phase_always_stays() -> None:
    random, patient = np.random.default_rng(0), Patient(1, 60.0, 0)
    drawn = [leave_out(random, patient, 3) for _ in range(20_000)]
    no_age = np.array([math.isnan(told.age) for told in drawn])
    no_sex = np.array([told.sex == 2 for told in drawn])
    # Together in 0.2, or both by chance in 0.8 x 0.1 x 0.1.
    assert (no_age & no_sex).mean() == pytest.approx(0.208, abs=0.01)
    assert (no_age & ~no_sex).mean() == pytest.approx(0.8 * 0.1 * 0.9, abs=0.01)
    phases = np.array([told.phases for told in drawn])
    assert phases.any(axis=1).all()
    alone = (phases == (False, False, True)).all(axis=1).mean()
    # On purpose in 0.05; by chance when the two others go, whether the last one would have gone or not.
    assert alone == pytest.approx(0.05 + 0.95 * 0.1 * 0.1, abs=0.01)
    assert (~phases[:, 0]).mean() == pytest.approx(0.05 + 0.95 * 0.1, abs=0.01)
    assert all(told.age == 60.0 or math.isnan(told.age) for told in drawn)
