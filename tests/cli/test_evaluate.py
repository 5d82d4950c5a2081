"""``medseg evaluate`` on real NIfTI files: outputs, exit codes, and what is printed where."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from medseg.cli.evaluate import evaluate
from medseg.errors import MedsegError

AFFINE = np.diag([2.0, 1.0, 3.0, 1.0])


class Done:
    """What one call of the command left behind."""

    def __init__(self, *args: object) -> None:
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(evaluate)
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        self.stdout, self.stderr = result.stdout, result.stderr
        self.error = str(result.exception) if isinstance(result.exception, MedsegError) else ""
        self.code = result.exception.exit_code if isinstance(result.exception, MedsegError) else result.exit_code


def save(path: Path, start: int, shift_mm: float = 0.0) -> None:
    """Write a label map with a cube of 27 voxels that begins at `start` along x."""
    labels = np.zeros((12, 12, 12), dtype=np.uint8)
    labels[start : start + 3, 2:5, 2:5] = 1
    affine = AFFINE.copy()
    affine[0, 3] = shift_mm
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(labels, affine), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three references; two predictions, one exact and one moved by one voxel of 2 mm."""
    prediction, reference = tmp_path / "results", tmp_path / "labelsTr"
    for case in ("a", "b", "c"):
        save(reference / f"{case}.nii.gz", 2)
    save(prediction / "a_seg.nii.gz", 2)
    save(prediction / "b_seg.nii.gz", 3)
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "[red] Cube"}}')
    (tmp_path / "split.json").write_text('{"train": ["c"], "val": ["a", "b"]}')
    return prediction, reference


def test_part_of_a_split_gives_code_0_a_table_and_a_csv(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prediction, reference = folders
    output = tmp_path / "scores.csv"
    done = Done("--prediction", prediction, "--reference", reference, "--split", tmp_path / "split.json", "-o", output)
    assert (done.code, done.stderr, done.error) == (0, "", "")
    table = done.stdout.splitlines()
    (start,) = (number for number, line in enumerate(table) if line.strip() == "1 [red] Cube")
    assert table[start + 1].split() == ["Dice", "0.8333", "0.8333", "0.2357", "0.6667", "b", "2"]
    with output.open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"a", "b"}
    assert float(rows["b"]["dice"]) == pytest.approx(2 / 3, abs=1e-6)
    assert float(rows["b"]["hd95_mm"]) == 2.0
    assert float(rows["b"]["reference_ml"]) == pytest.approx(27 * 6 / 1000)


def test_missing_prediction_is_named_and_gives_code_7_after_the_scores_are_written(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    prediction, reference = folders
    save(prediction / "z.nii.gz", 2)
    save(prediction / "b_seg.nii.gz", 2, shift_mm=1.0)
    output = tmp_path / "scores.json"
    done = Done("--prediction", prediction, "--reference", reference, "-o", output)
    assert done.code == 7
    assert done.error == f"{prediction}: 2 of 3 cases could not be evaluated; see the warnings above"
    assert "warning: no prediction for c\n" in done.stderr
    assert "warning: no reference for z\n" in done.stderr
    assert "warning: b: " in done.stderr
    assert "up to 1 mm away" in done.stderr
    record = json.loads(output.read_text())
    assert (record["missing"], record["extra"]) == (["c"], ["z"])
    assert [failure["case"] for failure in record["failed"]] == ["b"]
    assert [case["case"] for case in record["cases"]] == ["a"]


def test_json_alone_is_on_stdout_even_when_cases_are_missing(folders: tuple[Path, Path]) -> None:
    prediction, reference = folders
    done = Done("--prediction", prediction, "--reference", reference, "--json", "--tolerance", 2)
    assert done.code == 7
    record = json.loads(done.stdout)
    assert record["tolerance_mm"] == 2.0
    assert record["labels"] == [{"value": 1, "name": "[red] Cube"}]
    nsd = next(entry for entry in record["summary"] if entry["metric"] == "nsd")
    assert (nsd["count"], nsd["mean"]) == (2, 1.0)


def test_when_no_case_can_be_evaluated_the_code_is_3_and_nothing_is_written(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    prediction, reference = folders
    output = tmp_path / "scores.csv"
    save(tmp_path / "moved.nii.gz", 2, shift_mm=5.0)
    one = Done("--prediction", tmp_path / "moved.nii.gz", "--reference", reference / "a.nii.gz", "-o", output)
    assert (one.code, one.stdout, one.stderr) == (3, "", "")
    assert "lie up to 5 mm away from the reference's" in one.error
    (prediction / "a_seg.nii.gz").unlink()
    (prediction / "b_seg.nii.gz").write_bytes(b"not a volume")
    none = Done("--prediction", prediction, "--reference", reference, "-o", output)
    assert (none.code, none.stdout) == (3, "")
    assert "none of 3 cases could be evaluated" in none.error
    assert not output.exists()


def test_outputs_and_options_are_checked_before_any_case_is_read(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prediction, reference = folders
    both = ("--prediction", prediction, "--reference", reference)
    output = tmp_path / "scores.csv"
    output.write_text("old")
    assert Done(*both, "-o", output).code == 6
    assert output.read_text() == "old"
    assert Done(*both, "-o", tmp_path / "scores.xlsx").code == 2
    assert Done(*both, "--labels", "1,x").error.startswith("--labels: must be values of 1 or more")
    assert Done(*both, "--tolerance", "-1").code == 2
    assert Done(*both, "--split", tmp_path / "split.json", "--part", "test").error.endswith(
        "no part 'test'; it has train, val; choose with --part"
    )
    assert Done("--prediction", tmp_path / "nowhere", "--reference", reference).code == 3
    quiet = Done(*both, "--split", tmp_path / "split.json", "-o", output, "--overwrite", "--quiet")
    assert (quiet.code, quiet.stdout, quiet.stderr) == (0, "", "")
    assert output.read_text().startswith("case,value,name,presence,dice,")
