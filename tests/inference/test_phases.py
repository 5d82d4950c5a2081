"""Phases of contrast: which file is which, one grid for all, registration that finds what was moved."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset

from medseg.bundles.spec import BundleSpec, Suitability
from medseg.errors import InputError, UsageError
from medseg.inference.phases import read_phases
from medseg.inference.register import register, resample_to
from medseg.io.patients import told_facts
from medseg.phantom.pancreas import Case, Options, make_case
from tests.builders import save_scan, tiny_spec
from tests.dicom_builders import write_series

NAMES = ("CT NC", "CT A", "CT V")


def spec() -> BundleSpec:
    arguments = {"in_channels": 3, "out_channels": 3, "feature_size": 12, "window_size": 4, "depths": [1] * 4}
    return tiny_spec(channels=NAMES, network_args=arguments, suitability=Suitability(modality="CT"))


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(3, 1, Options(motion_scale=4.0))


@pytest.fixture(scope="module")
def files(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("patient")
    for phase, name in zip(case.phases, ("plain", "arterial", "venous"), strict=True):
        save_scan(root / f"{name}.nii.gz", phase, case.grid.affine)
    save_scan(root / "all.nii.gz", np.moveaxis(case.phases, 0, -1), case.grid.affine)
    coarse = case.grid.affine @ np.diag([2, 1, 1, 1])
    save_scan(root / "coarse_venous.nii.gz", case.phases[2, ::2], coarse)
    far = case.grid.affine.copy()
    far[2, 3] += 70
    save_scan(root / "far_venous.nii.gz", case.phases[2], far)
    return root


def test_phases_are_known_by_option_by_name_by_number_or_by_order(case: Case, files: Path, tmp_path: Path) -> None:
    arterial, venous = files / "arterial.nii.gz", files / "venous.nii.gz"
    by_name = read_phases([venous, arterial], spec())
    assert by_name.present == (False, True, True)
    assert by_name.reference == 1
    np.testing.assert_array_equal(by_name.data[1:], case.phases[1:])
    assert [phase.how for phase in by_name.phases if phase] == ["name", "name"]
    assert "phase CT NC is absent" in " ".join(by_name.source.warnings)
    digest = hashlib.sha256(venous.read_bytes() + arterial.read_bytes()).hexdigest()
    assert by_name.source.sha256 == digest

    named = read_phases([venous, arterial], spec(), phases=["A", "ct v"])  # the option has the last word
    np.testing.assert_array_equal(named.data[1], case.phases[2])
    whole = read_phases(files / "all.nii.gz", spec())
    np.testing.assert_array_equal(whole.data, case.phases)
    for number in (0, 2):
        save_scan(tmp_path / f"x_{number:04}.nii.gz", case.phases[number], case.grid.affine)
    numbered = read_phases(sorted(tmp_path.iterdir()), spec())
    assert numbered.present == (True, False, True)
    assert numbered.reference == 2
    third = read_phases(files / "all.nii.gz", spec(), phases=["V"], volume_index=2)
    np.testing.assert_array_equal(third.data[2], case.phases[2])
    (tmp_path / "scan.nii.gz").write_bytes(venous.read_bytes())
    alone = read_phases(tmp_path / "scan.nii.gz", spec())
    assert alone.present == (False, False, True)
    assert "taken for CT V" in alone.source.warnings[0]


def test_dicom_series_tell_their_phase_and_the_patients_age_and_sex(case: Case, tmp_path: Path) -> None:
    def series(name: str, description: str, **elements: str) -> Path:
        def change(dataset: Dataset, _slice: int) -> None:
            dataset.SeriesDescription = description
            for tag, value in elements.items():
                setattr(dataset, tag, value)

        write_series(
            tmp_path / name,
            case.phases[0].astype(np.int16),
            case.grid.affine,
            modality="CT",
            change=change,
            study="1.2.3",
        )
        return tmp_path / name

    known = {"PatientAge": "071Y", "PatientSex": "M"}
    found = read_phases(
        [series("one", "Abdomen portal venous 3.0", **known), series("two", "Non-Contrast 3.0", **known)], spec()
    )
    assert found.present == (True, False, True)
    assert {phase.how for phase in found.phases if phase} == {"description"}
    assert (found.patient.age, found.patient.sex) == (71, 0)
    assert not any("71" in text or "portal" in text for text in found.source.warnings)

    born = read_phases(series("three", "thin"), spec()).patient  # 11 March 1957 to 1 January 2020
    assert born.age == pytest.approx(62.81, abs=0.01)
    assert born.sex == 1
    said = told_facts("40", None).completed(born)
    assert (said.age, said.sex) == (40, 1)
    unknown = read_phases(series("four", "thin", PatientAge="000Y", PatientSex="O"), spec()).patient
    assert math.isnan(unknown.age)
    assert unknown.sex == 2


def test_another_grid_is_resampled_to_the_references(case: Case, files: Path) -> None:
    found = read_phases([files / "arterial.nii.gz", files / "coarse_venous.nii.gz"], spec())
    assert found.shape == case.grid.shape
    np.testing.assert_allclose(found.affine, case.grid.affine, atol=1e-4)
    np.testing.assert_allclose(found.data[2, ::2], case.phases[2, ::2], atol=0.01)
    between = (case.phases[2, 0:-2:2].astype(float) + case.phases[2, 2::2]) / 2
    np.testing.assert_allclose(found.data[2, 1:-1:2], between, atol=0.01)
    venous = found.phases[2]
    assert venous is not None
    assert venous.resampled
    assert venous.motion is None


def test_registration_finds_what_the_phantom_was_moved_by_and_repeats_itself(case: Case, files: Path) -> None:
    whole = read_phases(files / "all.nii.gz", spec(), align=True)
    for channel in (0, 2):
        phase = whole.phases[channel]
        assert phase is not None
        assert phase.motion is not None
        wanted = case.motion[channel] * [-1, -1, 1]  # the phantom's x is to the left, its y to the back
        assert np.linalg.norm(wanted) > 3
        assert np.linalg.norm(np.array(phase.motion.shift_mm) - wanted) < 0.6
        assert phase.motion.degrees < 0.3
    again = read_phases(files / "all.nii.gz", spec(), align=True)
    np.testing.assert_array_equal(again.data, whole.data)


def test_a_rotation_is_found_and_undone(case: Case) -> None:
    angle, arterial = np.deg2rad(6), case.phases[1].astype(np.float32)
    motion = np.eye(4)
    motion[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    motion[:3, 3] = 8, -5, 4
    found = register(arterial, case.grid.affine, arterial, motion @ case.grid.affine)
    assert found.degrees == pytest.approx(6, abs=0.1)
    middle = case.grid.affine @ [*((np.array(case.grid.shape) - 1) / 2), 1]
    np.testing.assert_allclose(found.shift_mm, (motion @ middle - middle)[:3], atol=0.3)
    back = resample_to(arterial, motion @ case.grid.affine, case.grid.shape, case.grid.affine, found)
    inner = (slice(8, -8),) * 3
    assert np.abs(back - arterial)[inner].mean() < 8  # the noise alone is 17 HU


def test_phases_that_do_not_fit_are_refused_in_one_line(case: Case, files: Path, tmp_path: Path) -> None:
    arterial, venous = files / "arterial.nii.gz", files / "venous.nii.gz"
    for scans, phases, error, problem in (
        ([arterial, venous], ["A", "A"], UsageError, "--phase: 'A' is given twice"),
        ([arterial], ["X"], UsageError, "'X' is no phase of the bundle; it has CT NC, CT A, CT V"),
        ([arterial, venous], ["A"], UsageError, "--phase: 1 given for 2 scans"),
        ([files / "all.nii.gz"], ["A", "V"], InputError, "all.nii.gz"),
        ([venous, files / "coarse_venous.nii.gz"], [], UsageError, "a second file for CT V"),
        ([arterial, files / "all.nii.gz"], ["A", "V"], InputError, "all.nii.gz"),
    ):
        with pytest.raises(error, match=problem):
            read_phases(scans, spec(), phases=phases)
    with pytest.raises(InputError, match=r"covers 3\d % of the field of view of arterial.nii.gz.*70 mm apart"):
        read_phases([arterial, files / "far_venous.nii.gz"], spec())
    brain = save_scan(tmp_path / "t1_venous.nii.gz", np.full((20, 20, 20), 300.0), np.eye(4))
    assert "no Hounsfield units" in read_phases(brain, spec()).unsuited[0]
