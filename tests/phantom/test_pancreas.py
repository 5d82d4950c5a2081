"""The pancreas phantom: the same seed gives the same bytes, the pictures show what the truth says, and the ceilings."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from medseg.cli.phantom import app
from medseg.errors import OutputError, UsageError
from medseg.io.read import read_labels, read_volume
from medseg.io.split import read_split
from medseg.phantom import SYNTHETIC
from medseg.phantom.dataset import write_dataset
from medseg.phantom.pancreas import PHASES, Case, Options, make_case
from medseg.phantom.patients import CODES, TYPES, ceilings, draw_patient
from medseg.training.dataset import read_dataset

RUN = CliRunner()
EASY = Options(lookalikes=False)


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_in_any_number_of_pieces_and_workers(tmp_path: Path) -> None:
    write_dataset(tmp_path / "once", 3, 7)
    assert write_dataset(tmp_path / "pieces", 1, 7) == 1
    assert write_dataset(tmp_path / "pieces", 3, 7, workers=2) == 2
    first, again = _files(tmp_path / "once"), _files(tmp_path / "pieces")
    assert len(first) == 3 * 3 + 4  # image, label map and truth of each; two tables, the settings, the words
    assert first == again
    write_dataset(tmp_path / "other", 1, 8)
    assert _files(tmp_path / "other")["imagesTr/pancreas_00000.nii.gz"] != first["imagesTr/pancreas_00000.nii.gz"]


def test_a_stopped_run_goes_on_and_a_half_made_case_is_made_again(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_dataset(root, 2, 7)
    whole = _files(root)
    (root / "truth" / "pancreas_00001.json").unlink()  # the last file of a case
    (root / "labelsTr" / "pancreas_00001.nii.gz").unlink()
    (root / "dataset.json").unlink()
    assert write_dataset(root, 2, 7) == 1
    assert _files(root) == whole


def test_every_file_says_that_it_is_synthetic(tmp_path: Path) -> None:
    root = tmp_path / "set"
    done = RUN.invoke(app, ["pancreas", "--cases", "9", "--split", "6,1,2", "-o", str(root)], catch_exceptions=False)
    assert SYNTHETIC in done.output
    assert "0.806 from the picture, 0.846 with age and sex, 0.304" in done.output
    for path in root.rglob("*.nii.gz"):
        assert nib.load(path).header["descrip"].item() == SYNTHETIC.encode()
    texts = [path for path in root.rglob("*") if path.suffix in (".json", ".md", ".csv") and path.name != "split.json"]
    assert len(texts) == 13
    assert all(SYNTHETIC in path.read_text() for path in texts)
    assert read_split(root / "split.json")["test"] == ["pancreas_00007", "pancreas_00008"]
    assert (root / "preview.png").stat().st_size > 100_000


def test_the_folder_is_a_data_set_with_patients(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_dataset(root, 9, 3, EASY)
    dataset = read_dataset(root)
    assert dataset.channels == ("CT NC", "CT A", "CT V")
    assert list(dataset.labels) == list(range(10))
    with (root / "patients.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["class"] for row in rows] == list(CODES)
    assert list(json.loads((root / "dataset.json").read_text())["classes"]) == list(CODES)
    shapes, spacings = set(), set()
    for number, (case, row) in enumerate(zip(dataset.cases, rows, strict=True)):
        assert case.name == row["case"]
        assert 18 <= int(row["age"]) <= 90
        volume = read_volume(case.images[0], channels=3)
        labels, affine = read_labels(case.label)
        np.testing.assert_allclose(affine, volume.affine)
        assert set(np.unique(labels)) == ({0, 1} if number == 0 else {0, 1, number + 1})
        assert labels.shape == volume.shape
        shapes.add(labels.shape)
        spacings.add(tuple(np.diag(affine)[:3].round(3)))
        made = make_case(3, number, EASY)
        np.testing.assert_array_equal(volume.data, made.phases)
    assert len(shapes) > 5
    assert len(spacings) == 9
    assert all(x < 0 and y < 0 and z > 0 for x, y, z in spacings)  # LPS, so that readers have to look


def test_a_folder_of_other_phantoms_or_files_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_dataset(root, 1, 3, EASY)
    before = _files(root)
    for seed, options in ((4, EASY), (3, Options())):
        with pytest.raises(OutputError, match="another seed or other options"):
            write_dataset(root, 1, seed, options)
    assert _files(root) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files"):
        write_dataset(tmp_path / "notes", 1, 3)
    wrong = RUN.invoke(app, ["pancreas", "--cases", "9", "--split", "4,4", "-o", str(tmp_path / "x")])
    assert isinstance(wrong.exception, UsageError)
    assert not (tmp_path / "x").exists()


def _values(case: Case, phase: str, label: int) -> np.ndarray:
    found: np.ndarray = case.phases[PHASES.index(phase)][case.labels == label]
    return found


def _cases(code: str, count: int, **options: Any) -> list[Case]:
    return [make_case(11, number, Options(lookalikes=False, **options), code=code) for number in range(count)]


def test_lesions_look_as_described() -> None:
    still: dict[str, Any] = {"noise_scale": 0.3, "motion_scale": 0.0}
    brighter = [
        _values(case, "A", 3).mean() - _values(case, "A", 1).mean() > 30 for case in _cases("PNET", 10, **still)
    ]
    assert sum(brighter) >= 6  # four of five
    for code, label in (("IPMN", 5), ("MCN", 6)):
        for case in _cases(code, 3, **still):
            for phase in PHASES:
                assert 0 < np.median(_values(case, phase, label)) < 40
    for case in _cases("PDAC", 6, **still):
        grey, drawn = float(np.median(_values(case, "A", 2))), case.plan.units[1]
        assert (drawn > 100) == (case.plan.subtype == "iso-attenuating")
        assert 0.7 * drawn < grey < 1.2 * drawn  # patients take up more or less contrast
        assert case.plan.duct[-1] > 2.5  # behind it the duct is wide
        assert case.plan.duct[0] < 1.5
    for case in _cases("CP", 2, **still):
        gland = np.concatenate([_values(case, "NC", 1), _values(case, "NC", 7)])
        assert (gland > 250).any()
        healthy = next(iter(_cases("normal", 1)))
        assert (case.labels == 1).sum() < (healthy.labels == 1).sum()
    for case in _cases("SPT", 2, **still):
        inside = _values(case, "V", 4)
        assert np.percentile(inside, 85) - np.percentile(inside, 15) > 30  # solid and cystic parts


def test_the_phases_are_those_of_contrast_passing_through() -> None:
    case = make_case(11, 0, Options(motion_scale=0.0))
    # The aorta at (4, 38) mm, see medseg.phantom.anatomy; it may have moved by some millimetres.
    grid = case.grid
    x, y = (round((mm - grid.first[axis]) / grid.spacing[axis]) for axis, mm in ((0, 4), (1, 38)))
    aorta = [float(np.median(phase[x - 1 : x + 2, y - 1 : y + 2])) for phase in case.phases]
    assert aorta[0] < 80 < 110 < aorta[2] < 200 < aorta[1]


def test_the_look_changes_with_look_alikes_and_nothing_else_does() -> None:
    pairs = [(make_case(5, n, EASY, code="CP"), make_case(5, n, code="CP")) for n in range(8)]
    looks = Counter(alike.patient.look for _, alike in pairs)
    assert looks.keys() == {"CP", "PDAC"}
    for easy, alike in pairs:
        assert (easy.patient.age, easy.patient.sex, easy.grid) == (alike.patient.age, alike.patient.sex, alike.grid)
        assert set(np.unique(alike.labels)) == {0, 1, 7}  # the label is the class's, not the look's
        same = easy.patient.look == alike.patient.look
        assert np.array_equal(easy.phases, alike.phases) == same


def test_noise_and_motion_do_what_their_scales_say() -> None:
    quiet, usual, double = (make_case(2, 0, Options(noise_scale=scale, motion_scale=0.0)) for scale in (0.0, 1.0, 2.0))
    for scale, case in ((1.0, usual), (2.0, double)):
        difference = case.phases.astype(float) - quiet.phases
        assert difference.std() == pytest.approx(17 * scale, rel=0.02)
    moved = make_case(2, 0, Options(noise_scale=0.0))
    assert np.array_equal(moved.phases[1], quiet.phases[1])  # the label map's phase stays
    assert not np.array_equal(moved.phases[0], quiet.phases[0])
    assert np.abs(moved.motion[[0, 2]]).max() > 0.3


def test_hard_lesions_are_smaller_and_the_abdomen_holds_the_same_patient() -> None:
    usual, hard, wide = (
        make_case(2, 3, Options(hard=hard, abdomen=abdomen))
        for hard, abdomen in ((False, False), (True, False), (False, True))
    )
    assert 0.6 <= hard.plan.radius / usual.plan.radius < 1
    assert (hard.labels > 1).sum() < (usual.labels > 1).sum()
    assert wide.patient == usual.patient
    assert wide.plan.radius == usual.plan.radius
    millilitres = [float((case.labels == 1).sum() * np.prod(case.grid.spacing)) / 1000 for case in (usual, wide)]
    assert millilitres[0] == pytest.approx(millilitres[1], rel=0.25)
    assert np.mean(wide.phases < -900) > 0.05  # air around the patient
    assert np.prod(wide.labels.shape) * np.prod(wide.grid.spacing) > 0.95 * 360 * 280 * 200


def test_the_ceilings_are_those_of_the_look_alike_table() -> None:
    best = ceilings()
    assert best.look == pytest.approx(0.806, abs=0.0005)
    assert best.look_age_sex == pytest.approx(0.846, abs=0.001)
    assert best.age_sex == pytest.approx(0.304, abs=0.001)
    assert ceilings(("SPT", "MCN")).age_sex == pytest.approx(0.755, abs=0.001)
    assert ceilings(lookalikes=False).look == pytest.approx(1.0)
    # By hand: SPT and MCN look alike in 0.30 and 0.15, so 0.70 / 2 + 0.85 / 2 are told apart by the look.
    assert ceilings(("SPT", "MCN")).look == pytest.approx(0.775)


def test_patients_are_drawn_as_the_table_says() -> None:
    random = np.random.default_rng(0)
    for kind in TYPES:
        drawn = [draw_patient(random, kind.code) for _ in range(1500)]
        for look, share in kind.looks.items():
            assert sum(p.look == look for p in drawn) / 1500 == pytest.approx(share, abs=0.05)
        assert sum(p.sex == "female" for p in drawn) / 1500 == pytest.approx(kind.female, abs=0.05)
        assert np.mean([p.age for p in drawn]) == pytest.approx(kind.age[0], abs=1.5)
        assert math.isclose(sum(kind.looks.values()), 1.0)
    with pytest.raises(ValueError, match="unknown class 'GIST'"):
        draw_patient(random, "GIST")
