"""A patient from the command line: phases, age and sex in, class and findings out; a cohort and its figures."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from medseg.bundles.integrity import write_manifest
from medseg.bundles.spec import BundleSpec, ScaleIntensityRange, Suitability
from medseg.bundles.write import write_configs
from medseg.cli.main import app
from medseg.errors import MedsegError
from medseg.inference.diagnosis import SegmentingPath
from medseg.networks.mdpformer import MDPFormer
from medseg.phantom import SYNTHETIC
from medseg.phantom.dataset import write_dataset
from medseg.phantom.patients import TYPES
from tests.builders import save_scan, tiny_bundle

RUN = CliRunner()
CODES = [kind.code for kind in TYPES]
NETWORK: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "patient_classes": 9,
    "channels": [4, 6, 8],
    "fold": True,
    "hidden_size": 16,
    "num_heads": 2,
    "free_tokens": 1,
}


def by_intensity(_self: SegmentingPath, image: Tensor) -> Tensor:
    """In place of a trained segmentation: what is bright in the arterial phase, and its brightest part a lesion."""
    logits = torch.zeros(len(image), 3, *image.shape[2:])
    arterial = image[:, 1]
    logits[:, 0] = 1.0
    logits[:, 1] = 4.0 * (arterial > 0.2)
    logits[:, 2] = 8.0 * (arterial > 1.5)
    return logits


@pytest.fixture(autouse=True)
def segmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentingPath, "forward", by_intensity)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms") / "set"
    write_dataset(root, 3, 0, split=[("train", 1), ("test", 2)])
    return root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundles") / "diagnoses"
    low, high = (-150 - 60) / 90, (400 - 60) / 90
    spec = BundleSpec(
        network="mdpformer",
        network_args=NETWORK,
        channels=("CT NC", "CT A", "CT V"),
        labels={0: "background", 1: "pancreas", 2: "lesion"},
        spacing=(6.0, 6.0, 6.0),
        intensity=(ScaleIntensityRange(-150, 400, low, high),),
        roi_size=(32, 24, 16),
        padding_value=low,
        suitability=Suitability(modality="CT"),
    )
    classes = {kind.code: kind.name for kind in TYPES}
    described = {"name": "test", "task": "test", "description": "random", "data_source": f"phantoms; {SYNTHETIC}"}
    write_configs(root, spec, described | {"diagnosis": {"classes": classes}}, {})
    torch.manual_seed(0)
    network = MDPFormer(**NETWORK)
    with torch.no_grad():
        for parameter in network.parameters():  # what begins as zero, age and sex, has an effect too
            parameter.add_(0.2 * torch.randn_like(parameter))
    (root / "models").mkdir()
    torch.save({"model": network.state_dict()}, root / "models" / "model.pt")
    write_manifest(root)
    return root


@pytest.fixture(scope="module")
def patient(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One patient's phases as files of their own, the venous one with slices twice as thick."""
    root = tmp_path_factory.mktemp("patient")
    image = nib.load(phantoms / "imagesTr" / "pancreas_00001.nii.gz")
    data = np.asarray(image.dataobj)
    save_scan(root / "arterial.nii.gz", data[..., 1], image.affine)
    save_scan(root / "venous.nii.gz", data[:, :, ::2, 2], image.affine @ np.diag([1, 1, 2, 1]))
    save_scan(root / "t1.nii.gz", np.full((40, 40, 30), 300.0), np.diag([3.0, 3, 3, 1]))
    return root


def run(*arguments: object) -> str:
    done = RUN.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_patient_is_diagnosed_from_the_phases_that_there_are(patient: Path, bundle: Path, tmp_path: Path) -> None:
    scans = [patient / "venous.nii.gz", patient / "arterial.nii.gz"]
    known = "--phase", "V", "--phase", "A", "--age", "63", "--sex", "F"
    printed = run("infer", *scans, "-b", bundle, *known, "-o", tmp_path)
    assert "not for clinical use" in printed
    assert "missing: phase CT NC" in printed
    record = json.loads((tmp_path / "venous_seg.json").read_text())
    assert "synthetic data, not for clinical use" in record["disclaimer"]
    found = record["diagnosis"]
    assert found["missing"] == ["phase CT NC"]
    assert found["named"] == max(found["probabilities"], key=found["probabilities"].__getitem__)
    for chances in (found["probabilities"], found["probabilities_without_metadata"]):
        assert list(chances) == CODES
        assert sum(chances.values()) == pytest.approx(1, abs=1e-3)
    assert found["probabilities"] != found["probabilities_without_metadata"]

    # The label map lies on the arterial phase's own grid, with the lesions typed by the class.
    labels, arterial = nib.load(tmp_path / "venous_seg.nii.gz"), nib.load(patient / "arterial.nii.gz")
    np.testing.assert_allclose(labels.affine, arterial.affine, atol=1e-4)
    values = np.asarray(labels.dataobj)
    assert values.shape == arterial.shape
    kind = max(CODES[1:], key=found["probabilities"].__getitem__)
    assert set(np.unique(values)) == {0, 1, CODES.index(kind) + 1}
    named = {label["value"]: label for label in record["labels"]}
    assert named[CODES.index(kind) + 1]["name"] == f"lesion {kind}"
    assert named[CODES.index(kind) + 1]["volume_ml"] == pytest.approx(found["lesion_ml"], abs=0.01)
    first = found["findings"][0]
    assert first["type"] == kind
    assert first["part"] in ("head", "body", "tail")
    assert [one["plane"] for one in first["diameters"]] == ["axial", "coronal", "sagittal"]
    assert set(first["contrast_hu"]) == {"CT A", "CT V"}
    assert first["contrast_hu"]["CT A"] > 50  # what is brightest was taken for the lesion
    assert values[tuple(first["peak_voxel"])] == CODES.index(kind) + 1
    with Image.open(tmp_path / "venous_seg.png") as picture:
        assert picture.width == 1280

    # Where the class sees its evidence: on the same grid, and in the region of 32 x 24 x 16 voxels of 6 mm alone.
    shown = tmp_path / "evidence.nii.gz"
    printed = run("infer", *scans, "-b", bundle, *known, "-o", tmp_path, "--overwrite", "--evidence", shown, "--json")
    record = json.loads(printed)
    assert record["outputs"]["evidence"] == "evidence.nii.gz"
    assert record["diagnosis"]["probabilities"] == found["probabilities"]
    evidence = nib.load(shown)
    seen = np.asarray(evidence.dataobj)
    assert seen.dtype == np.float32
    assert seen.shape == arterial.shape
    np.testing.assert_allclose(evidence.affine, labels.affine)
    told = record["diagnosis"]["evidence"]
    assert told["stands_for"] == found["named"]
    assert tuple(told["peak_voxel"]) == np.unravel_index(seen.argmax(), seen.shape)
    assert told["highest"] == pytest.approx(seen.max(), abs=1e-4)
    assert seen.min() == 0
    assert 0 < seen.max() <= 1
    axes = [np.ptp(index) * size for index, size in zip(np.nonzero(seen), arterial.header.get_zooms(), strict=True)]
    assert all(mm <= voxels * 6 for mm, voxels in zip(axes, (32, 24, 16), strict=True))

    alone = json.loads(run("infer", scans[1], "-b", bundle, "-o", tmp_path, "--json"))["diagnosis"]
    assert alone["missing"] == ["phase CT NC", "phase CT V", "age", "sex"]
    assert alone["probabilities"] == alone["probabilities_without_metadata"]
    assert alone["phases"][0]["known_by"] == "name"


def test_a_cohort_goes_through_batch_and_evaluate(phantoms: Path, bundle: Path, tmp_path: Path) -> None:
    scans, results = tmp_path / "scans", tmp_path / "results"
    scans.mkdir()
    shutil.copy(phantoms / "imagesTr" / "pancreas_00001.nii.gz", scans)
    image = nib.load(phantoms / "imagesTr" / "pancreas_00002.nii.gz")
    for number in (0, 2):  # numbered files, the arterial phase is missing
        save_scan(scans / f"pancreas_00002_{number:04}.nii.gz", np.asarray(image.dataobj)[..., number], image.affine)
    known = "--metadata", phantoms / "patients.csv"
    run("batch", scans, "-b", bundle, "-o", results, *known, "--evidence", "-q")
    with (results / "summary.csv").open() as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    records = {case: json.loads((results / f"{case}_seg.json").read_text()) for case in rows}
    assert {case: row["class"] for case, row in rows.items()} == {
        case: record["diagnosis"]["named"] for case, record in records.items()
    }
    assert records["pancreas_00001"]["diagnosis"]["missing"] == []
    assert records["pancreas_00002"]["diagnosis"]["missing"] == ["phase CT A"]
    for case, record in records.items():
        assert record["outputs"]["evidence"] == f"{case}_seg_evidence.nii.gz"
        assert nib.load(results / f"{case}_seg_evidence.nii.gz").shape == tuple(record["input"]["shape"])
    single = json.loads(run("infer", scans / "pancreas_00001.nii.gz", "-b", bundle, *known, "-o", tmp_path, "--json"))
    assert single["diagnosis"]["probabilities"] == records["pancreas_00001"]["diagnosis"]["probabilities"]

    split = "--split", phantoms / "split.json", "--part", "test"
    against = "--prediction", results, "--reference", phantoms
    picture, table = tmp_path / "confusion.png", tmp_path / "table.csv"
    printed = run("evaluate", "--classification", *against, *split, "--confusion", picture, "-o", table, "--json")
    figures = json.loads(printed)
    assert figures["patients"] == 2
    assert np.sum(figures["confusion"]["rows_truth_columns_named"]) == 2
    right = sum(records[f"pancreas_0000{n}"]["diagnosis"]["named"] == CODES[n] for n in (1, 2))
    assert figures["accuracy"]["value"] == right / 2
    assert figures["missing"] == {"phase CT A": 1}
    assert "not for clinical use" in figures["disclaimer"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(table.read_text().splitlines()) == 3
    # The whole data set has a patient that nobody computed.
    done = RUN.invoke(app, [str(word) for word in ("evaluate", "--classification", *against)])
    assert isinstance(done.exception, MedsegError)
    assert done.exception.exit_code == 7
    assert "1 of 3 patients" in str(done.exception)


def test_wrong_use_is_one_line_with_its_code_and_writes_nothing(
    patient: Path, bundle: Path, phantoms: Path, tmp_path: Path
) -> None:
    arterial, venous = patient / "arterial.nii.gz", patient / "venous.nii.gz"
    table, output = tmp_path / "patients.csv", tmp_path / "out"
    output.mkdir()
    table.write_text("case,age,sex\nsomebody,63,F\n")
    segments = tiny_bundle(tmp_path)
    for arguments, code, problem in (
        ([arterial, venous, "--phase", "A", "--phase", "A"], 2, "'A' is given twice"),
        ([arterial, "--phase", "X"], 2, "'X' is no phase of the bundle; it has CT NC, CT A, CT V"),
        ([arterial, venous, "--phase", "A"], 2, "1 given for 2 scans"),
        ([arterial, "--age", "abc"], 2, "--age: 'abc' is no age between 0 and 120 years"),
        ([arterial, "--age", "nan"], 2, "no age"),
        ([arterial, "--age", "121"], 2, "no age"),
        ([arterial, "--sex", "X"], 2, "--sex: 'X' is not known"),
        ([arterial, "--metadata", table], 3, "no row for arterial"),
        ([arterial, "--metadata", table, "--age", "63"], 2, "given with --age"),
        ([patient / "t1.nii.gz", "--phase", "V"], 4, "no Hounsfield units of CT; use --force"),
        ([arterial, "--tta"], 2, "allows no flips"),
        ([arterial, "--backend", "onnxruntime"], 2, "eager alone"),
        ([arterial, "-b", bundle], 4, "diagnoses are not averaged"),
    ):
        done = RUN.invoke(app, ["infer", "-b", str(bundle), *map(str, arguments), "-o", str(output)])
        assert isinstance(done.exception, MedsegError), done.output
        assert done.exception.exit_code == code, done.exception
        assert problem in str(done.exception)
        assert "\n" not in str(done.exception)
    for words, problem in (
        (["infer", arterial, "-b", segments, "--age", "63"], "tiny diagnoses no patients"),
        (["infer", arterial, "-b", segments, "--evidence", output / "e.nii"], "--evidence: tiny diagnoses no patients"),
        (["batch", arterial, "-b", segments, "--evidence"], "--evidence: tiny diagnoses no patients"),
        (["batch", arterial, "-b", segments, "--register"], "--register: tiny diagnoses no patients"),
        (["batch", phantoms / "imagesTr", "-b", bundle, "--metadata", tmp_path / "none.csv"], "no such file"),
    ):
        done = RUN.invoke(app, [*map(str, words), "-o", str(output)])
        assert isinstance(done.exception, MedsegError), done.output
        assert problem in str(done.exception)
    assert not list(output.iterdir())
