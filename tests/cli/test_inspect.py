"""`medseg inspect`: what it says of NIfTI, of DICOM folders, and what it never says."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import Dataset
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from medseg.cli.main import app
from medseg.errors import InputError
from medseg.inference.inspection import Inspection
from tests.builders import blob_scan, save_scan
from tests.dicom_builders import IDENTITY, write_series

AFFINE = np.diag([0.8, 0.8, 5.0, 1.0])


def _inspected(*arguments: object) -> Inspection:
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return Inspection.model_validate_json(done.stdout)


def test_a_nifti_file_is_described_by_its_own_numbers(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("z", 12, degrees=True).as_matrix() * (0.5, 0.5, 2.0)
    data = np.rint(blob_scan((20, 22, 24)))
    image = nib.Nifti1Image(data.astype(">i2"), affine)
    nib.save(image, tmp_path / "scan.nii.gz")
    found = _inspected(tmp_path / "scan.nii.gz")
    assert found.volume is not None
    assert (found.format, found.volume.dtype, found.volume.shape) == ("nifti", "int16", (20, 22, 24))
    assert found.volume.spacing_mm == pytest.approx((0.5, 0.5, 2.0), rel=1e-5)
    assert found.volume.extent_mm == pytest.approx((10, 11, 48), rel=1e-5)
    assert (found.volume.orientation, found.volume.oblique_degrees) == ("RAS", 12.0)
    assert (found.volume.minimum, found.volume.maximum) == (data.min(), data.max())
    assert found.volume.percentiles["50"] == np.median(data)
    assert (found.volume.modality, found.volume.modality_is) == ("MR", "guessed")
    assert found.warnings == ("anisotropic voxels, 0.5 x 0.5 x 2 mm",)
    fit = next(bundle for bundle in found.bundles if bundle.name == "swin_unetr_hippocampus")
    assert any("field of view 10 x 11 x 48 mm" in reason for reason in fit.unsuitable)


def test_labels_and_ct_are_told_from_mr(tmp_path: Path) -> None:
    labels = (blob_scan((20, 22, 24)) > 230).astype(np.float32)
    found = _inspected(save_scan(tmp_path / "labels.nii", labels))
    assert found.volume is not None
    assert (found.volume.modality, found.bundles) == ("label map", ())
    assert "looks like a label map" in found.warnings[-1]
    found = _inspected(save_scan(tmp_path / "ct.nii", blob_scan((20, 22, 24)) * 8 - 2000))
    assert found.volume is not None
    assert found.volume.modality == "CT"


def test_a_folder_of_several_series_is_listed_and_one_is_read(tmp_path: Path) -> None:
    def drop(dataset: Dataset, k: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    stored = np.rint(blob_scan((20, 22, 9))).astype("<i2")
    write_series(tmp_path / "ct", stored, AFFINE, modality="CT", rescale=(1, -1024), number=4)
    write_series(tmp_path / "scout", stored[..., :1], AFFINE, number=1, change=drop)
    write_series(tmp_path / "mr", stored, AFFINE, number=9)[3].unlink()
    (tmp_path / "report.txt").write_text("x")
    found = _inspected(tmp_path)
    assert found.volume is None
    ct, mr = found.series
    assert (ct.number, ct.series_number, ct.modality, ct.images, ct.shape) == (1, 4, "CT", 9, (20, 22, 9))
    assert ct.spacing_mm == (0.8, 0.8, 5.0)
    assert ct.problem == ""
    assert ct.description is None
    assert "1 slice is missing" in mr.problem
    assert (found.others, found.not_dicom) == ({"localiser": 1}, 1)
    assert _inspected(tmp_path, "--descriptions").series[0].description == "Series of Zyxwvut"
    chosen = _inspected(tmp_path, "--series", ct.uid)
    assert chosen.volume is not None
    assert (chosen.volume.modality, chosen.volume.modality_is, chosen.volume.dtype) == ("CT", "stated", "int16")
    assert chosen.volume.minimum == stored.min() - 1024
    with pytest.raises(InputError, match="1 slice is missing"):
        CliRunner().invoke(app, ["inspect", str(tmp_path), "--series", "2"], catch_exceptions=False)


def test_the_table_names_what_is_needed_and_no_patient(tmp_path: Path) -> None:
    tilted = np.array([[0.8, 0, 0, 0], [0, 0.8, 0.9, 0], [0, 0, 3.0, 0], [0, 0, 0, 1]])
    stored = np.rint(blob_scan((20, 22, 9))).astype("<i2")
    write_series(tmp_path, stored, tilted, modality="CT", rescale=(1, -1024))
    done = CliRunner().invoke(app, ["inspect", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "gantry tilt of 16.7 degrees: needs --fix-gantry-tilt" in done.stdout
    assert "20 x 22 x 9" in done.stdout
    assert not any(word in done.output + json.dumps(_inspected(tmp_path).model_dump()) for word in IDENTITY)
