"""A cohort's figures from records and label maps, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.errors import InputError
from medseg.evaluation.cohort import judge_cohort, patient_table, shares_of_largest, summarise
from tests.builders import save_scan

CLASSES = {"normal": "no lesion", "solid": "a solid lesion", "cyst": "a cyst"}
AFFINE = np.diag([5.0, 5.0, 5.0, 1.0])  # 0.125 ml a voxel


def label_map(*lesions: tuple[slice, int]) -> np.ndarray:
    """An organ of 20 voxels, and lesions of 2 x 2 voxels across with the values given."""
    labels = np.zeros((20, 8, 8), dtype=np.uint8)
    labels[:, 1, 1] = 1
    for where, value in lesions:
        labels[where, 4:6, 4:6] = value
    return labels


def write_case(
    root: Path, case: str, labels: np.ndarray, truth: np.ndarray, known: list[float], blind: list[float] | None
) -> None:
    """A record, its label map and the reference; `blind` None: of a bundle that segments only."""
    results, reference = root / "results", root / "set" / "labelsTr"
    save_scan(results / f"{case}_seg.nii.gz", labels, AFFINE)
    save_scan(reference / f"{case}.nii.gz", truth, AFFINE)
    record: dict[str, Any] = {"labels": [], "disclaimer": "Synthetic."}
    if blind is not None:
        record["diagnosis"] = {
            "classes": CLASSES,
            "probabilities": dict(zip(CLASSES, known, strict=True)),
            "probabilities_without_metadata": dict(zip(CLASSES, blind, strict=True)),
            "findings": [{"peak_voxel": [3, 4, 4], "confidence": 0.9}],
            "flags": ["disagreement"] if known[0] > 0.5 else [],
            "missing": ["age"],
        }
    (results / f"{case}_seg.json").write_text(json.dumps(record))


def cohort(root: Path, *, diagnoses: bool = True) -> Path:
    for folder in ("results", "set/labelsTr"):
        (root / folder).mkdir(parents=True)
    (root / "set" / "dataset.json").write_text(json.dumps({"classes": CLASSES}))
    rows = "a,50,F,normal\nb,60,M,solid\nc,,,cyst\nd,40,F,cyst\n"
    (root / "set" / "patients.csv").write_text("case,age,sex,class\n" + rows)
    none, first = label_map(), label_map((slice(2, 6), 3))
    blind = [[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.2, 0.5, 0.3]]
    known = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]
    maps = none, label_map((slice(2, 6), 2), (slice(10, 14), 2)), label_map((slice(2, 4), 3))
    truths = none, label_map((slice(2, 6), 2)), first
    for number, case in enumerate("abc"):
        write_case(root, case, maps[number], truths[number], known[number], blind[number] if diagnoses else None)
    return root


def test_figures_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    root = cohort(tmp_path)
    found = judge_cohort(root / "results", root / "set")
    assert [one.case for one in found.patients] == ["a", "b", "c"]
    assert found.missing == ("d",)
    assert found.disclaimers == ("Synthetic.",)
    figures = summarise(found.patients, list(CLASSES), resamples=50)
    assert figures["accuracy"]["value"] == 1.0
    assert figures["without_metadata"]["accuracy"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert figures["gain_from_metadata"]["value"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["confusion"]["rows_truth_columns_named"] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert figures["recall"] == {"normal": 1.0, "solid": 1.0, "cyst": 1.0}
    assert figures["dice"]["organ"] == 1.0
    # b: 16 of 32 voxels right, 2 * 16 / (32 + 16); c: 8 of 16 found, 2 * 8 / (8 + 16).
    assert figures["dice"]["lesion"] == pytest.approx(2 / 3, abs=1e-4)
    lesion = figures["lesion"]
    assert (lesion["sensitivity"], lesion["specificity"]) == (1.0, 1.0)
    # Three candidates in three patients: those that the records name with confidence 0.9 hit, b's second one does not.
    assert lesion["sensitivity_at_false_positives"]["0.125"] == 0.0
    assert lesion["sensitivity_at_false_positives"]["0.5"] == 1.0
    assert figures["flags"] == {"organ_not_found": 0, "disagreement": 1}
    assert figures["missing"] == {"age": 3}
    table = patient_table(found.patients, list(CLASSES)).splitlines()
    assert table[0].startswith("case,class,named,named_without_metadata")
    assert table[3].startswith("c,cyst,cyst,solid,1.0000,0.6667,1.00,,age,")


def test_a_bundle_that_segments_only_is_scored_by_its_largest_lesion(tmp_path: Path) -> None:
    root = cohort(tmp_path, diagnoses=False)
    found = judge_cohort(root / "results", root / "set", cases=["a", "b", "c"])
    figures = summarise(found.patients, list(CLASSES), resamples=50)
    assert figures["accuracy"]["value"] == 1.0
    assert figures["without_metadata"] is None
    assert figures["gain_from_metadata"] is None

    mixed = label_map((slice(2, 6), 2), (slice(10, 15), 3))
    mixed[12, 4:6, 4:6] = 2
    np.testing.assert_allclose(shares_of_largest(mixed, 3, 0.125), [0, 0.2, 0.8])
    np.testing.assert_allclose(shares_of_largest(label_map(), 3, 0.125), [1, 0, 0])
    small = label_map()
    small[3, 4, 4:6] = 2  # 0.25 ml
    np.testing.assert_allclose(shares_of_largest(small, 3, 0.125), [1, 0, 0])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    root = cohort(tmp_path)
    (root / "results" / "b_seg.json").write_text("no json")
    save_scan(root / "results" / "c_seg.nii.gz", np.zeros((3, 3, 3), dtype=np.uint8), AFFINE)
    found = judge_cohort(root / "results", root / "set")
    assert [failure.case for failure in found.failed] == ["b", "c"]
    assert "cannot be read as JSON" in found.failed[0].problem
    assert "grid (3, 3, 3) differs from its reference's (20, 8, 8)" in found.failed[1].problem
    assert math.isnan(judge_cohort(root / "results", root / "set", cases=["a"]).patients[0].lesion_dice)
    with pytest.raises(InputError, match="no such folder"):
        judge_cohort(root / "nothing", root / "set")
    (root / "set" / "patients.csv").write_text("case,age,sex,class\na,50,F,unheard\n")
    with pytest.raises(InputError, match=r"class 'unheard' of a; dataset\.json names normal, solid, cyst"):
        judge_cohort(root / "results", root / "set")
