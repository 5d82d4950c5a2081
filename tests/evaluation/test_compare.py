"""Pairing of files, failures of single cases, and the summary."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medseg.errors import InputError, UsageError
from medseg.evaluation.compare import Evaluation, Summary, evaluate
from medseg.evaluation.pairing import case_name, label_names, pair_cases

SPACING = (2.0, 1.0, 3.0)
Grid = tuple[NDArray[np.integer], NDArray[np.float64]]


class Folders:
    """Two folders of empty files, and the label maps that a reader returns for them."""

    def __init__(self, root: Path) -> None:
        self.prediction, self.reference = root / "predictions", root / "labelsTr"
        self.grids: dict[Path, Grid] = {}
        for folder in (self.prediction, self.reference):
            folder.mkdir()

    def add(self, path: Path, labels: NDArray[np.integer], affine: NDArray[np.float64] | None = None) -> None:
        path.touch()
        self.grids[path] = (labels, np.diag([*SPACING, 1.0]) if affine is None else affine)

    def read(self, path: Path) -> Grid:
        if path not in self.grids:
            raise InputError(path, "damaged")
        return self.grids[path]

    def evaluate(self, **options: object) -> Evaluation:
        return evaluate(self.prediction, self.reference, read=self.read, **options)  # type: ignore[arg-type]


def cube(start: int = 2, value: int = 1) -> NDArray[np.integer]:
    """Three voxels along each axis, 27 voxels of 6 mm3."""
    labels = np.zeros((10, 10, 10), dtype=np.uint8)
    labels[start : start + 3, 2:5, 2:5] = value
    return labels


def summary(evaluation: Evaluation, value: int | None, metric: str) -> Summary:
    return next(entry for entry in evaluation.summary if (entry.value, entry.metric) == (value, metric))


@pytest.mark.parametrize(
    "name",
    ["case_7.nii.gz", "case_7.nii", "case_7.NII.GZ", "case_7_seg.nii.gz", "case_7_0000.nii.gz", "case_7_0000_seg.mha"],
)
def test_a_case_is_known_by_its_name_whatever_suffixes_the_tools_add(name: str) -> None:
    assert case_name(Path("folder") / name) == "case_7"


def test_pairing_names_missing_extra_and_ambiguous_cases_and_takes_the_segmentation_beside_a_scan(
    tmp_path: Path,
) -> None:
    folders = Folders(tmp_path)
    for name in ("a.nii.gz", "b.nii", "c.nii.gz", "d.nii.gz"):
        (folders.reference / name).touch()
    for name in (
        "a.nii.gz",
        "a_seg.nii.gz",
        "a_seg.json",
        "._b.nii.gz",
        "c_0000.nii.gz",
        "c.nii",
        "d.nii",
        "z_seg.nii",
    ):
        (folders.prediction / name).touch()
    pairing = pair_cases(folders.prediction, folders.reference)
    assert [(pair.case, pair.prediction.name, pair.reference.name) for pair in pairing.pairs] == [
        ("a", "a_seg.nii.gz", "a.nii.gz"),
        ("d", "d.nii", "d.nii.gz"),
    ]
    assert pairing.missing == ("b",)
    assert pairing.extra == ("z",)
    (ambiguous,) = pairing.failed
    assert ambiguous.case == "c"
    assert "c.nii" in ambiguous.problem
    assert "c_0000.nii.gz" in ambiguous.problem

    chosen = pair_cases(folders.prediction, folders.reference, cases=["a", "y"])
    assert [pair.case for pair in chosen.pairs] == ["a"]
    assert chosen.missing == ()
    assert [(failure.case, failure.problem) for failure in chosen.failed] == [("y", "no reference file")]


def test_paths_that_cannot_be_compared_are_refused_in_one_line(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        pair_cases(tmp_path / "nowhere", folders.reference)
    with pytest.raises(InputError, match="holds no volume"):
        pair_cases(folders.prediction, folders.reference)
    with pytest.raises(InputError, match=r"did you mean .*labelsTr\?"):
        pair_cases(folders.prediction, tmp_path)
    with pytest.raises(UsageError, match="are the same"):
        pair_cases(folders.reference, folders.prediction / ".." / "labelsTr")
    file = tmp_path / "one.nii.gz"
    file.touch()
    with pytest.raises(UsageError, match="a folder, the other a file"):
        pair_cases(file, folders.reference)


@pytest.mark.parametrize(
    "labels",
    [{"0": "background", "2": "Tail", "1": "Head"}, {"background": 0, "Head": 1, "Tail": 2, "whole": [1, 2]}],
)
def test_label_names_are_read_from_both_layouts(tmp_path: Path, labels: dict[str, object]) -> None:
    folders = Folders(tmp_path)
    assert label_names(folders.reference) == {}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert label_names(folders.reference) == {1: "Head", 2: "Tail"}
    assert label_names(folders.reference / "a.nii.gz") == {1: "Head", 2: "Tail"}


def test_scores_volumes_and_summary_of_two_cases_agree_with_the_hand(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "Head", "2": "Tail"}}')
    folders.add(folders.reference / "good.nii.gz", cube())
    folders.add(folders.prediction / "good_seg.nii.gz", cube())
    folders.add(folders.reference / "moved.nii.gz", cube())
    smaller = cube(start=3)
    smaller[5] = 0  # 18 voxels, all of them inside the reference
    folders.add(folders.prediction / "moved_seg.nii.gz", smaller)
    evaluation = folders.evaluate()

    assert [case.case for case in evaluation.cases] == ["good", "moved"]
    head, tail = evaluation.cases[1].labels
    assert (head.name, head.presence) == ("Head", "both")
    assert head.dice == pytest.approx(2 * 18 / 45)
    assert head.hd95_mm == pytest.approx(2.0)
    assert (head.prediction_ml, head.reference_ml) == (pytest.approx(0.108), pytest.approx(0.162))
    assert head.volume_error_ml == pytest.approx(-0.054)
    assert head.volume_error_percent == pytest.approx(-100 / 3)
    assert (tail.name, tail.presence, tail.dice, tail.hd95_mm, tail.nsd) == ("Tail", "neither", None, None, None)

    dices = summary(evaluation, 1, "dice")
    assert (dices.mean, dices.median) == (pytest.approx(0.9), pytest.approx(0.9))
    assert dices.std == pytest.approx(math.sqrt(0.02))
    assert (dices.worst, dices.worst_case, dices.count) == (pytest.approx(0.8), "moved", 2)
    assert summary(evaluation, 1, "volume_error_percent").worst == pytest.approx(-100 / 3)
    assert summary(evaluation, 2, "dice").count == 0
    assert summary(evaluation, None, "dice").mean == pytest.approx(0.9)


def test_a_label_that_one_map_lacks_scores_zero_and_its_infinite_distance_is_counted_not_averaged(
    tmp_path: Path,
) -> None:
    folders = Folders(tmp_path)
    for case in ("a", "b"):
        folders.add(folders.reference / f"{case}.nii.gz", cube())
    folders.add(folders.prediction / "a.nii.gz", cube())
    folders.add(folders.prediction / "b.nii.gz", cube(value=4))
    evaluation = folders.evaluate()

    missed, invented = evaluation.cases[1].labels
    assert (missed.value, missed.presence, missed.dice, missed.hd95_mm, missed.nsd) == (1, "reference", 0, math.inf, 0)
    assert (invented.value, invented.presence, invented.dice, invented.name) == (4, "prediction", 0, "label 4")
    assert invented.volume_error_percent is None
    distance = summary(evaluation, 1, "hd95_mm")
    assert (distance.mean, distance.count, distance.infinite) == (0.0, 1, 1)
    assert (distance.worst, distance.worst_case) == (math.inf, "b")
    assert summary(evaluation, 1, "dice").mean == pytest.approx(0.5)

    record = json.loads(json.dumps(evaluation.to_record(), allow_nan=False))
    assert record["cases"][1]["labels"][0]["hd95_mm"] is None
    assert record["cases"][1]["labels"][0]["presence"] == "reference"
    rows = list(csv.DictReader(io.StringIO(evaluation.to_csv())))
    assert [(row["case"], row["value"], row["hd95_mm"]) for row in rows] == [
        ("a", "1", "0.0"),
        ("a", "4", ""),
        ("b", "1", "inf"),
        ("b", "4", "inf"),
    ]

    only = folders.evaluate(labels=[1])
    assert [scores.value for scores in only.cases[1].labels] == [1]


def test_a_case_that_cannot_be_compared_is_named_and_the_others_are_scored(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    affine = np.diag([*SPACING, 1.0])
    nudged, moved = affine.copy(), affine.copy()
    nudged[0, 3], moved[0, 3] = 0.05, 0.5
    predictions: dict[str, tuple[NDArray[np.integer], NDArray[np.float64]]] = {
        "fine": (cube(), nudged),
        "grid": (cube(), moved),
        "scan": (np.full((10, 10, 10), -1000, dtype=np.int16), affine),
        "shape": (cube()[:, :, :9], affine),
    }
    for case, (labels, own_affine) in predictions.items():
        folders.add(folders.reference / f"{case}.nii.gz", cube())
        folders.add(folders.prediction / f"{case}.nii.gz", labels, own_affine)
    (folders.reference / "broken.nii.gz").touch()
    (folders.prediction / "broken.nii.gz").touch()
    seen: list[tuple[int, int, str]] = []
    evaluation = folders.evaluate(progress=lambda done, total, case: seen.append((done, total, case)))

    assert [case.case for case in evaluation.cases] == ["fine"]
    problems = {failure.case: failure.problem for failure in evaluation.failed}
    assert set(problems) == {"broken", "grid", "scan", "shape"}
    assert "damaged" in problems["broken"]
    assert "up to 0.5 mm away" in problems["grid"]
    assert "from -1000 to -1000" in problems["scan"]
    assert "shape (10, 10, 9) differs from the reference's (10, 10, 10)" in problems["shape"]
    assert seen[:2] == [(0, 5, "broken"), (1, 5, "fine")]


def test_two_single_files_are_one_case(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    prediction, reference = tmp_path / "any_name.nii.gz", tmp_path / "truth.nii.gz"
    folders.add(prediction, cube())
    folders.add(reference, cube())
    evaluation = evaluate(prediction, reference, read=folders.read)
    assert [(case.case, case.labels[0].dice) for case in evaluation.cases] == [("truth", 1.0)]
