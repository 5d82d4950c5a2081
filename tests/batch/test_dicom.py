"""DICOM in a batch: which folders are cases, what is written of each, and when it is computed again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medseg.batch.cases import Case, find_cases
from medseg.batch.run import run_batch
from medseg.batch.worker import Settings, Worker
from medseg.bundles.load import load_bundle
from medseg.errors import InputError, UsageError
from medseg.io.read import read_labels
from tests.builders import blob_scan, save_scan, tiny_bundle
from tests.dicom_builders import IDENTITY, write_series, write_zip

SMALL = np.arange(24, dtype="<i2").reshape(2, 3, 4)
SCAN = np.rint(blob_scan((33, 42, 30))).astype("<i2")


def _names(*inputs: str | Path, **options: object) -> list[str]:
    return [case.name for case in find_cases(inputs, **options).cases]  # type: ignore[arg-type]


def test_each_subfolder_is_a_study_and_a_recursive_search_finds_each_series(tmp_path: Path) -> None:
    for name in ("p.1/s1", "p.1/s2", "p2", "out/x", ".hidden"):
        write_series(tmp_path / name, SMALL, np.eye(4))
    (tmp_path / "empty").mkdir()
    save_scan(tmp_path / "b.nii.gz", blob_scan((4, 4, 4)))
    write_zip(tmp_path / "c.zip", tmp_path / "p2")
    assert _names(tmp_path, output=tmp_path / "out") == ["b", "c", "p.1", "p2"]
    assert _names(tmp_path, recursive=True, output=tmp_path / "out") == ["b", "c", "p.1/s1", "p.1/s2", "p2"]
    assert _names(tmp_path / "p2") == ["p2"]
    assert _names(f"{tmp_path}/p.1/*") == ["s1", "s2"]
    (tmp_path / "m.csv").write_text("image\np.1/s1\np2\n")
    assert _names(tmp_path / "m.csv") == ["s1", "p2"]


def test_results_in_dicom_are_no_scans(tmp_path: Path) -> None:
    save_scan(tmp_path / "b.nii.gz", blob_scan((4, 4, 4)))
    paths = write_series(tmp_path, SMALL, np.eye(4))
    paths[0].rename(tmp_path / "b_seg.dcm")
    paths[1].rename(tmp_path / "b_seg_rtstruct.dcm")
    for path in paths[2:]:
        path.unlink()
    assert _names(tmp_path) == ["b"]


def test_of_studies_with_several_series_the_chosen_or_the_largest_is_read(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle(tmp_path / "bundles"))
    write_series(tmp_path / "study", SMALL, np.eye(4))
    write_series(tmp_path / "study", SMALL[:, :, :-1] + 1, np.eye(4), number=2)
    scan = save_scan(tmp_path / "plain.nii.gz", blob_scan((4, 4, 4)))
    study, plain = Case("study", (tmp_path / "study",)), Case("plain", (scan,))

    def depth(series: str | None, case: Case) -> int:
        return Worker(bundle, Settings(series=series), tmp_path).read(case).volume.shape[2]

    assert [depth(series, study) for series in ("1", "2", "largest")] == [4, 3, 4]
    assert depth("2", plain) == 4
    with pytest.raises(InputError, match="2 series"):
        depth(None, study)
    write_series(tmp_path / "study", SMALL + 2, np.eye(4), number=3)
    with pytest.raises(UsageError, match=r"2 series .* have 4 images"):
        depth("largest", study)


@pytest.mark.slow
def test_studies_are_computed_once_and_again_when_an_image_changes(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundles")
    studies, output = tmp_path / "studies", tmp_path / "out"
    write_series(studies / "one", SCAN, np.eye(4), order=2)
    write_series(studies / "two", SCAN[:, :, :-1] + 1, np.eye(4))
    write_series(studies / "several", SMALL, np.eye(4))
    write_series(studies / "several", SMALL, np.eye(4), number=2)
    settings = Settings(force=True, dicom_seg=True, rtstruct=True)
    summary = run_batch([studies], output, bundle=bundle, settings=settings)
    assert {case.case: case.status for case in summary.cases} == {"one": "done", "several": "failed", "two": "done"}
    failed = next(case for case in summary.cases if case.case == "several")
    assert "2 series (1: MR, 4 images, 2 x 3; 2: MR, 4 images, 2 x 3)" in failed.message
    for case in ("one", "two"):
        endings = ("_seg.nii.gz", "_seg.json", "_seg.png", "_seg.dcm", "_seg_rtstruct.dcm")
        assert all((output / f"{case}{ending}").is_file() for ending in endings)
    record = json.loads((output / "one_seg.json").read_text())
    assert (record["input"]["files"], record["input"]["format"]) == (["one"], "dicom")
    assert read_labels(output / "one_seg.nii.gz")[0].shape == SCAN.shape

    again = run_batch([studies], output, bundle=bundle, settings=settings)
    assert again.earlier == 3
    write_series(studies / "one", SCAN + 2, np.eye(4), order=2)
    third = run_batch([studies], output, bundle=bundle, settings=settings)
    assert {case.case: case.earlier for case in third.cases} == {"one": False, "several": True, "two": True}
    text = "".join(path.read_text() for path in output.iterdir() if path.suffix in {".json", ".jsonl", ".csv"})
    assert not any(word in text for word in IDENTITY)
