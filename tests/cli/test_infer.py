"""`medseg infer` and its neighbours as a user runs them: a process, its streams, its exit code, its files."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medseg.cli.main import app, main
from medseg.inference.record import Record
from tests.builders import blob_scan, save_scan, tiny_bundle


def _medseg(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medseg", *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.mark.slow
def test_a_scan_becomes_a_segmentation_a_record_and_a_picture_beside_it(bundle: Path, tmp_path: Path) -> None:
    scan = save_scan(tmp_path / "patient [1] ä.nii.gz", blob_scan((34, 50, 33)))
    before = scan.read_bytes()
    done = _medseg("infer", scan, "--bundle", bundle, "--probabilities", "--statistics", tmp_path / "volumes.csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Anterior" in done.stdout
    assert "Research use only" in done.stdout
    assert scan.read_bytes() == before
    stem = "patient [1] ä_seg"
    made = {path.name for path in tmp_path.iterdir()} - {scan.name}
    assert made == {f"{stem}.nii.gz", f"{stem}.json", f"{stem}.png", f"{stem}_probabilities.nii.gz", "volumes.csv"}
    labels = nib.load(tmp_path / f"{stem}.nii.gz")
    assert labels.get_data_dtype() == np.uint8
    record = Record.model_validate_json((tmp_path / f"{stem}.json").read_text())
    for label in record.labels:
        assert label.voxels == int((np.asarray(labels.dataobj) == label.value).sum())
    maps = nib.load(tmp_path / f"{stem}_probabilities.nii.gz").get_fdata()
    assert (maps.argmax(axis=-1) == np.asarray(labels.dataobj)).mean() > 0.9999
    with Image.open(tmp_path / f"{stem}.png") as picture:
        assert picture.width >= 1200
    table = (tmp_path / "volumes.csv").read_text().splitlines()
    assert table[0].startswith("case,value,name,voxels,volume_ml")
    assert [row.split(",")[3] for row in table[1:]] == [str(label.voxels) for label in record.labels]


@pytest.mark.slow
def test_json_prints_the_record_alone_and_the_same_run_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    scan = save_scan(tmp_path / "scan.nii", blob_scan((34, 50, 33)))
    (tmp_path / "out").mkdir()
    first = _medseg("infer", scan, "-b", bundle, "-o", tmp_path / "out", "--json")
    record = Record.model_validate_json(first.stdout)
    assert first.stderr == ""
    assert record.outputs == {"labels": "scan_seg.nii.gz", "record": "scan_seg.json", "preview": "scan_seg.png"}
    labels = (tmp_path / "out" / "scan_seg.nii.gz").read_bytes()
    again = _medseg("infer", scan, "-b", bundle, "-o", tmp_path / "out", "--quiet")
    assert again.returncode == 6
    assert "exists already; use --overwrite" in again.stderr
    # Maps of the result that is replaced go with it; a file of the user's own stays.
    maps = ["--probabilities", "--uncertainty", tmp_path / "out" / "scan_seg_uncertainty.nii.gz"]
    (tmp_path / "out" / "scan_seg_evidence.nii.gz").write_bytes(b"mine")
    _medseg("infer", scan, "-b", bundle, "-o", tmp_path / "out", "--quiet", "--overwrite", *maps)
    assert len(list((tmp_path / "out").iterdir())) == 6
    again = _medseg("infer", scan, "-b", bundle, "-o", tmp_path / "out", "--quiet", "--overwrite")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *record.outputs.values(),
        "scan_seg_evidence.nii.gz",
    }
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert (tmp_path / "out" / "scan_seg.nii.gz").read_bytes() == labels


def _truncated(path: Path) -> Path:
    save_scan(path, blob_scan((34, 50, 33)))
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _nan(path: Path) -> Path:
    return save_scan(path, np.full((32, 40, 30), np.nan, dtype=np.float32))


def _singular(path: Path) -> Path:
    image = nib.Nifti1Image(blob_scan((32, 40, 30)), None)
    image.header.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), code=1)
    nib.save(image, path)
    return path


def _zero_size(path: Path) -> Path:
    header = bytearray(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)).header.binaryblock + bytes(4))
    header[42:44] = (0).to_bytes(2, "little")
    return _written(path, gzip.compress(bytes(header) + bytes(256)))


BAD_INPUT: list[tuple[str, int, Callable[[Path], Path], str]] = [
    ("missing", 3, lambda path: path, "no such file"),
    ("folder", 3, _folder, "folder"),
    ("text", 3, lambda path: _written(path, b"patient data follow\n" * 40), "NIfTI"),
    ("empty", 3, lambda path: _written(path, b""), "empty"),
    ("truncated", 3, _truncated, ""),
    ("no finite voxel", 3, _nan, "finite"),
    ("two dimensions", 3, lambda path: save_scan(path, np.zeros((9, 9), np.float32)), "volume"),
    ("two channels", 3, lambda path: save_scan(path, np.zeros((32, 40, 30, 2), np.float32)), "--volume"),
    ("zero size", 3, _zero_size, ""),
    ("singular affine", 3, _singular, ""),
    ("unsuitable", 4, lambda path: save_scan(path, blob_scan((90, 90, 90))), "--force"),
    ("labels", 4, lambda path: save_scan(path, (blob_scan((34, 50, 33)) > 230).astype(np.uint8)), "a label map, not"),
]


@pytest.mark.parametrize(("name", "code", "build", "word"), BAD_INPUT, ids=[row[0] for row in BAD_INPUT])
def test_a_bad_scan_is_one_line_and_its_exit_code_and_leaves_nothing(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
    build: Callable[[Path], Path],
    word: str,
) -> None:
    scan = build(tmp_path / "scan.nii.gz")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(sys, "argv", ["medseg", "infer", str(scan), "-o", f"{tmp_path}/out/", "-b", str(bundle), "-q"])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == code, printed.err
    assert printed.out == ""
    assert printed.err.startswith(f"error: {scan}: ")
    assert printed.err.count("\n") == 1
    assert word in printed.err
    assert list((tmp_path / "out").iterdir()) == []


BAD_USE: list[tuple[str, int, list[str], str]] = [
    ("unknown bundle", 4, ["scan.nii", "-b", "nothing"], "not found; known: "),
    ("misspelt bundle", 4, ["scan.nii", "-b", "swin_unter_hipocampus"], "did you mean swin_unetr_hippocampus? known: "),
    ("folder missing", 6, ["scan.nii", "-o", "no/ne/seg.nii.gz"], "no/ne does not exist; create it first"),
    ("no such folder", 6, ["scan.nii", "-o", "no/results"], "no/results does not exist; create it first"),
    ("no folder is left", 2, ["scan.nii", "-o", "results", "--overlap", "1.5"], "overlap"),
    ("suffix", 2, ["scan.nii", "-o", "seg.png"], "suffix"),
    ("output is input", 2, ["scan.nii", "-o", "scan.nii", "--overwrite"], "the output is the input"),
    ("device", 2, ["scan.nii", "--device", "tpu"], "not a device"),
    ("no cuda", 8, ["scan.nii", "--device", "cuda:99"], "CUDA devices found"),
    ("overlap", 2, ["scan.nii", "--overlap", "1.5"], "overlap"),
]


@pytest.mark.parametrize(("name", "code", "arguments", "word"), BAD_USE, ids=[row[0] for row in BAD_USE])
def test_wrong_use_is_one_line_and_its_exit_code(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
    arguments: list[str],
    word: str,
) -> None:
    scan = save_scan(tmp_path / "scan.nii", blob_scan((34, 50, 33)))
    before = scan.read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSEG_BUNDLES", str(bundle.parent))
    with_bundle = arguments if "-b" in arguments else [*arguments, "-b", "tiny"]
    monkeypatch.setattr(sys, "argv", ["medseg", "infer", *with_bundle])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == code, printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert word in printed.err
    assert scan.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii"]


@pytest.mark.slow
def test_a_stopped_run_leaves_nothing_and_exits_with_its_signal(bundle: Path, tmp_path: Path) -> None:
    scan = save_scan(tmp_path / "scan.nii", blob_scan((90, 90, 90)))
    command = [sys.executable, "-m", "medseg", "--debug", "infer", str(scan), "-b", str(bundle)]
    command += ["--force", "--overlap", "0.95", "--quiet"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if "preprocess: " in line:
                    break
            process.send_signal(number)
            sent = time.monotonic()
            rest = process.stderr.read()
            assert process.wait() == code, rest
        assert time.monotonic() - sent < 30
        assert f"error: stopped by {number.name}" in rest
        assert [path.name for path in tmp_path.iterdir()] == ["scan.nii"]


def test_a_failure_nobody_foresaw_is_one_line_with_a_log_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the inside of a bug")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("medseg.bundles.locate.all_bundles", fail)
    monkeypatch.setattr(sys, "argv", ["medseg", "bundles", "list"])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == 1
    (log,) = tmp_path.iterdir()
    assert printed.err == f"error: internal error (RuntimeError); please report it with {log}\n"
    assert "the inside of a bug" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


def test_bundles_are_listed_shown_and_verified(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSEG_BUNDLES", str(bundle.parent))
    run = CliRunner()
    rows = {row["name"]: row for row in json.loads(run.invoke(app, ["bundles", "list", "--json"]).stdout)}
    assert rows["tiny"]["state"] == "ready"
    assert rows["tiny"]["labels"] == {"0": "background", "1": "Anterior", "2": "Posterior"}
    assert "tiny" in run.invoke(app, ["bundles", "list"]).stdout
    shown = json.loads(run.invoke(app, ["bundles", "show", "tiny", "--json"]).stdout)
    assert shown["padding"] == {"mode": "constant", "value": -2.0}
    assert "roi_size" in run.invoke(app, ["bundles", "show", "tiny"]).stdout
    verified = run.invoke(app, ["bundles", "verify", "tiny"])
    assert verified.exit_code == 0, verified.stdout
    assert "FAILED" not in verified.stdout
    assert "forward pass" in verified.stdout


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["infer"],
        ["batch"],
        ["evaluate"],
        ["train"],
        ["bundles"],
        ["bundles", "pack"],
        ["bundles", "verify"],
        ["networks", "show"],
        ["weights", "import"],
    ],
)
def test_help_says_what_a_command_does_without_loading_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom medseg.cli.main import main\nsys.argv[0] = 'medseg'\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'monai', 'scipy', 'nibabel'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: medseg" in done.stdout
