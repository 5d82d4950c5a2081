"""DICOM through the command line: the label map of the NIfTI scan, the DICOM outputs, and nothing of the patient."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from medseg.bundles.locate import DEFAULT_BUNDLE, find_bundle, weights_of
from medseg.cli.main import app
from medseg.errors import InputError, UsageError
from medseg.io.read import read_volume
from medseg.report.outputs import reserve_outputs
from tests.builders import HIPPOCAMPUS, SAMPLES, blob_scan, save_scan, tiny_bundle
from tests.dicom_builders import IDENTITY, write_series


def _medseg(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medseg", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles"))


def _real_scan() -> Path:
    found = sorted([*SAMPLES.rglob("hippocampus*.nii.gz"), *(HIPPOCAMPUS / "imagesTr").glob("*.nii.gz")])
    if not found:
        pytest.skip("no hippocampus scan is at hand")
    return found[0]


@pytest.mark.slow
def test_a_dicom_series_gets_the_label_map_of_the_same_scan_in_nifti(tmp_path: Path) -> None:
    if weights_of(find_bundle(DEFAULT_BUNDLE)) is None:
        pytest.skip("the default bundle has no weights here")
    image = nib.load(_real_scan())
    stored = np.rint(np.asarray(image.dataobj)).astype("<u2")
    scan = save_scan(tmp_path / "scan.nii.gz", stored.astype(np.float32), image.affine)
    write_series(tmp_path / "study" / "s1", stored, image.affine, order=3)
    for arguments in (
        (scan,),
        (tmp_path / "study", "--dicom-seg", tmp_path / "seg.dcm", "--rtstruct", tmp_path / "rt.dcm"),
    ):
        done = CliRunner().invoke(app, ["infer", "--quiet", *map(str, arguments)], catch_exceptions=False)
        assert (done.exit_code, done.output) == (0, "")
    plain, from_dicom = nib.load(tmp_path / "scan_seg.nii.gz"), nib.load(tmp_path / "study_seg.nii.gz")
    labels = np.asarray(plain.dataobj)
    assert labels.max() == 2
    np.testing.assert_array_equal(np.asarray(from_dicom.dataobj), labels)
    np.testing.assert_allclose(from_dicom.affine, plain.affine, atol=1e-4)
    record = json.loads((tmp_path / "study_seg.json").read_text())
    assert record["outputs"]["dicom_seg"] == "seg.dcm"
    assert record["input"]["files"] == ["study"]
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    counts = [int(seg.get_volume(segment_numbers=[number]).array.sum()) for number in (1, 2)]
    assert counts == [label["voxels"] for label in record["labels"]]
    assert [roi.ROIName for roi in pydicom.dcmread(tmp_path / "rt.dcm").StructureSetROISequence] == [
        "Anterior",
        "Posterior",
    ]


@pytest.mark.slow
def test_nothing_of_the_patient_leaves_the_images(bundle: Path, tmp_path: Path) -> None:
    stored = np.rint(blob_scan((33, 42, 30))).astype("<i2")
    paths = write_series(tmp_path / "in", stored, np.eye(4))
    for number, path in enumerate(paths):
        path.rename(tmp_path / "in" / f"Zyxwvut_PID-8675309_{number:03}.dcm")
    done = _medseg("--debug", "infer", "in", "-b", bundle, "--force", "--statistics", "volumes.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "in" / "Zyxwvut_PID-8675309_007.dcm").unlink()
    with pytest.raises(InputError, match="in: 1 slice is missing") as missing:
        read_volume(tmp_path / "in")
    listed = CliRunner().invoke(app, ["inspect", str(tmp_path / "in"), "--series", "1"])
    said = done.stdout + done.stderr + str(missing.value) + listed.output
    written = "".join(path.read_bytes().decode("latin1") for path in tmp_path.iterdir() if path.is_file()) + nib.load(
        tmp_path / "in_seg.nii.gz"
    ).header.binaryblock.decode("latin1")
    assert "in_seg.nii.gz" in said
    assert not any(word.lower() in (said + written).lower() for word in IDENTITY)


def test_dicom_outputs_of_a_nifti_scan_are_refused_at_once(tmp_path: Path) -> None:
    save_scan(tmp_path / "scan.nii", blob_scan((33, 42, 30)))
    with pytest.raises(UsageError, match=r"scan\.nii is not DICOM"):
        reserve_outputs([tmp_path / "scan.nii"], dicom_seg=tmp_path / "seg.dcm")
