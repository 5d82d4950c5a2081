"""The evidence map of the shipped bundle on patients of the phantom: on the scan's own grid, and in the lesion."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

import medseg
from medseg.inference.run import Result
from medseg.io.patients import told_facts
from medseg.phantom.pancreas import Case, make_case
from tests.builders import save_scan

BUNDLE = "mdpformer_pancreas"
TURN = np.array([[2, -1], [0, 1], [1, -1]])


def diagnosed(folder: Path, case: Case) -> Result:
    """A patient with the axes of the file turned and flipped, so that no axis is what the network takes."""
    whole = nib.Nifti1Image(np.moveaxis(case.phases, 0, -1), case.grid.affine).as_reoriented(TURN)
    scan = save_scan(folder / "all.nii.gz", np.asarray(whole.dataobj), whole.affine)
    known = told_facts(case.patient.age, case.patient.sex)
    return medseg.infer(scan, bundle=BUNDLE, evidence=True, patient=known, device="cpu")


def test_the_evidence_of_a_patient_named_rightly_lies_in_the_lesion_on_the_scans_own_grid(tmp_path: Path) -> None:
    for number in (6, 3, 8, 4):
        case = make_case(5, number)
        result = diagnosed(tmp_path, case)
        record = result.record.diagnosis
        assert record is not None
        if record.named == case.patient.type:
            break
    assert record.named == case.patient.type
    seen = result.evidence
    assert seen is not None
    assert (seen.dtype, seen.shape) == (np.float32, result.label_map.shape)
    assert seen.min() >= 0
    assert seen.max() <= 1
    labels = nib.Nifti1Image(case.labels, case.grid.affine).as_reoriented(TURN)
    np.testing.assert_allclose(labels.affine, result.affine, atol=1e-4)
    truth = np.asarray(labels.dataobj)
    lesion = truth > 1
    assert seen[lesion].mean() > 0.7
    assert seen[truth == 0].mean() < 0.1
    assert record.evidence is not None
    assert record.evidence.stands_for == case.patient.type
    assert lesion[record.evidence.peak_voxel]
    highest = seen >= np.quantile(seen, 1 - lesion.mean() / 2)
    assert lesion[highest].mean() > 0.8


def test_the_map_of_a_healthy_patient_says_that_it_shows_nothing(tmp_path: Path) -> None:
    for number in (9, 18, 27):  # healthy, all of them; some may be taken for patients with a small tumour
        case = make_case(5, number)
        assert case.patient.type == "normal"
        scan = save_scan(tmp_path / "all.nii.gz", np.moveaxis(case.phases, 0, -1), case.grid.affine)
        result = medseg.infer(scan, bundle=BUNDLE, evidence=True, device="cpu")
        assert result.record.diagnosis is not None
        if result.record.diagnosis.named == "normal":
            break
    assert result.record.diagnosis.named == "normal"
    assert "which has no lesion: it was not trained and shows nothing" in " ".join(result.record.warnings)
