"""`medseg diagnose`: one patient with whatever is known, and the figures of a data set."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from medseg.cli.diagnose import app
from medseg.errors import BundleError, InputError, UsageError
from medseg.phantom.dataset import write_dataset
from medseg.training.config import TrainingConfig
from medseg.training.run import train
from tests.builders import tiny_bundle

RUN = CliRunner()
NETWORK = {"channels": [4, 6, 8], "fold": True, "hidden_size": 16, "num_heads": 2, "free_tokens": 1}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms") / "set"
    write_dataset(root, 3, 0, split=[("train", 1), ("test", 2)])
    return root


@pytest.fixture(scope="module")
def bundle(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "run"
    settings = {"network": NETWORK, "roi_size": (32, 24, 16), "spacing": (6.0, 6.0, 6.0), "steps": 2, "holdout": 0.0}
    train(TrainingConfig(architecture="mdpformer", warmup_steps=0, **settings), phantoms, root)
    return root


def report(*arguments: object) -> dict[str, Any]:
    done = RUN.invoke(app, ["patient", *(str(argument) for argument in arguments)], catch_exceptions=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_patient_is_classified_from_one_file_or_one_for_each_phase(
    phantoms: Path, bundle: Path, tmp_path: Path
) -> None:
    scan = phantoms / "imagesTr" / "pancreas_00001.nii.gz"
    whole = report(scan, "-b", bundle, "--age", 64, "--sex", "male")
    assert sum(whole["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert whole["class"] == max(whole["probabilities"], key=whole["probabilities"].__getitem__)
    assert whole["phases_used"] == ["CT NC", "CT A", "CT V"]
    assert whole["metadata_used"] == {"age": True, "sex": True}
    assert "synthetic, not for clinical use" in whole["trained_on"]
    assert "not for diagnosis" in whole["disclaimer"]

    image = nib.load(scan)
    phases = np.asarray(image.dataobj)
    for number, name in enumerate(("nc", "a", "v")):
        nib.save(nib.Nifti1Image(phases[..., number], image.affine), tmp_path / f"{name}.nii.gz")
    files = {name: f"{name.upper()}={tmp_path / name}.nii.gz" for name in ("nc", "a", "v")}
    # In any order; the channel's own name is understood too.
    apart = report(f"CT V={tmp_path / 'v.nii.gz'}", files["nc"], files["a"], "-b", bundle, "--age", 64, "--sex", "male")
    assert apart == whole
    venous = report(files["v"], "-b", bundle)
    assert venous["phases_used"] == ["CT V"]
    assert venous["metadata_used"] == {"age": False, "sex": False}
    assert venous["probabilities"] == venous["probabilities_without_metadata"]
    assert venous["probabilities"] != whole["probabilities_without_metadata"]


def test_a_data_set_is_scored_and_the_table_agrees(phantoms: Path, bundle: Path, tmp_path: Path) -> None:
    output, table = tmp_path / "scores.json", tmp_path / "patients.csv"
    command = ["dataset", "--data", phantoms, "--split", phantoms / "split.json", "-b", bundle, "-o", output]
    done = RUN.invoke(app, [*map(str, command), "--table", str(table)], catch_exceptions=False)
    assert "2 patients of Pancreas phantom" in done.stdout
    figures = json.loads(output.read_text())
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == ["pancreas_00001", "pancreas_00002"]
    assert [row["class"] for row in rows] == ["PDAC", "PNET"]
    right = sum(row["class"] == row["named"] for row in rows)
    assert figures["accuracy"]["value"] == right / 2
    matrix = np.array(figures["confusion"]["rows_truth_columns_named"])
    assert matrix.sum() == 2
    assert np.trace(matrix) == right
    assert figures["auc"]["normal"]["value"] is None  # nobody is healthy here
    assert figures["lesion"]["specificity"] is None
    for row in rows:
        assert row["named"] == max((key for key in row if key.startswith("p_")), key=lambda key: float(row[key]))[2:]


def test_wrong_use_is_one_line_and_writes_nothing(phantoms: Path, bundle: Path, tmp_path: Path) -> None:
    scan, output = phantoms / "imagesTr" / "pancreas_00001.nii.gz", tmp_path / "out.json"
    segments = tiny_bundle(tmp_path)
    for arguments, error, problem in (
        ([scan, "-b", bundle, "--sex", "x"], UsageError, "--sex"),
        ([f"X={scan}", "-b", bundle], UsageError, "'X' is no phase of the bundle; it has CT NC, CT A, CT V"),
        ([f"A={scan}", f"A={scan}", "-b", bundle], UsageError, "one file for each phase"),
        ([scan, scan, "-b", bundle], UsageError, "no phase of the bundle"),
        ([tmp_path / "none.nii.gz", "-b", bundle], InputError, "no such file"),
        ([scan, "-b", segments], BundleError, "does not diagnose"),
    ):
        done = RUN.invoke(app, ["patient", *map(str, arguments), "-o", str(output)])
        assert isinstance(done.exception, error), done.exception
        assert problem in str(done.exception)
    done = RUN.invoke(
        app, ["dataset", "--data", str(phantoms), "-b", str(bundle), "--phases", "A,B", "-o", str(output)]
    )
    assert isinstance(done.exception, UsageError)
    assert not output.exists()
