"""`medseg batch` as a user runs it: a process, its streams, its exit code, its files, its end by signals."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders import blob_scan, save_scan, tiny_bundle

pytestmark = pytest.mark.slow

_COMMAND = [sys.executable, "-m", "medseg", "batch"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles"), overlap=0.0)


def _batch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


def _scans(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        save_scan(folder / f"case_{number}.nii.gz", blob_scan((32, 42 + number, 30), seed=number))
    return folder


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four scans, and their results of a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    assert _batch(_scans(root / "in", 4), "-o", root / "out", "-b", bundle, "--quiet").returncode == 0
    return root / "in", root / "out"


def test_a_batch_with_a_bad_scan_says_so_in_every_way_it_has(bundle: Path, tmp_path: Path) -> None:
    scans, output = _scans(tmp_path / "in", 2), tmp_path / "out"
    (scans / "bad [x].nii.gz").write_bytes(b"not a scan")
    done = _batch(scans, "-o", output, "-b", bundle)
    assert done.returncode == 7
    lines = done.stderr.splitlines()
    assert lines[0] == "3 cases"
    assert lines[1].startswith("[1/3] bad [x]: failed, code 3: bad [x].nii.gz: ")
    assert lines[2].startswith("[2/3] case_0: done in ")
    assert lines[2].endswith(" s left")
    assert lines[3].startswith("[3/3] case_1: done in ")
    assert lines[4:] == [f"error: {output}: 1 of 3 cases failed; see {output / 'summary.csv'}"]
    assert "2 done, 1 failed" in done.stdout
    rows = {row["case"]: row for row in csv.DictReader((output / "summary.csv").read_text().splitlines())}
    assert [(row["status"], row["code"]) for row in rows.values()] == [("failed", "3"), ("done", "0"), ("done", "0")]
    record = json.loads((output / "case_1_seg.json").read_text())
    for label in record["labels"]:
        assert float(rows["case_1"][f"{label['name']}_ml"]) == label["volume_ml"]
    assert rows["case_1"]["labels_file"] == "case_1_seg.nii.gz"

    again = _batch(scans, "-o", output, "-b", bundle, "--json")
    assert again.returncode == 7
    assert again.stderr == lines[4] + "\n"
    summary = json.loads(again.stdout)
    assert summary["earlier"] == 3
    assert str(tmp_path) not in again.stdout  # what is stored names files, not folders
    assert str(tmp_path) not in (output / "run.jsonl").read_text()

    (scans / "bad [x].nii.gz").unlink()
    final = _batch(scans, "-o", output, "-b", bundle, "--quiet")
    assert (final.returncode, final.stdout, final.stderr) == (0, "", "")


def test_what_cannot_begin_is_one_line_and_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    scans = _scans(tmp_path / "in", 1)
    (tmp_path / "file").write_text("")
    for arguments, code, word in (
        ((tmp_path / "missing", "-o", tmp_path / "out"), 3, "no such file or folder"),
        ((scans, "-o", tmp_path / "no" / "out"), 6, "does not exist"),
        ((scans, "-o", tmp_path / "file"), 6, "a file, not a folder"),
        ((scans, "-o", tmp_path / "out", "--shard", "3/2"), 2, "--shard"),
        ((scans, "-o", tmp_path / "out", "--address", "auto"), 2, "--engine ray"),
    ):
        done = _batch(*arguments, "-b", bundle)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert word in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in", "file"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_stopped_batch_goes_on_and_ends_as_if_it_had_not_been_stopped(
    bundle: Path, whole: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    scans, output = whole[0], tmp_path / "out"
    command = [*_COMMAND, str(scans), "-o", str(output), "-b", str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        while "[2/4]" not in (line := running.stderr.readline()):
            assert line, "ended before its second case"
        os.kill(running.pid, number)
        sent = time.monotonic()
        _, errors = running.communicate(timeout=30)
    assert time.monotonic() - sent < 30
    if number != signal.SIGKILL:
        assert running.returncode == 128 + number
        assert errors.splitlines()[-1] == f"error: stopped by {number.name}; nothing is half written"
        assert not list(output.glob(".*"))
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("case_[01]_seg*")}
    done = _batch(scans, "-o", output, "-b", bundle, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["earlier"] >= 2
    assert {path.name: path.stat().st_mtime_ns for path in output.glob("case_[01]_seg*")} == before
    assert {path.name for path in output.iterdir()} == {path.name for path in whole[1].iterdir()}
    for path in whole[1].glob("*_seg.[np]*"):
        assert (output / path.name).read_bytes() == path.read_bytes()


def test_a_folder_that_is_worked_on_refuses_a_second_run(bundle: Path, tmp_path: Path) -> None:
    scans, output = _scans(tmp_path / "in", 3), tmp_path / "out"
    command = [*_COMMAND, str(scans), "-o", str(output), "-b", str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        running.stderr.readline()
        os.kill(running.pid, signal.SIGSTOP)
        second = _batch(scans, "-o", output, "-b", bundle)
        os.kill(running.pid, signal.SIGCONT)
        running.communicate()
    assert running.returncode == 0
    assert second.returncode == 6
    assert second.stderr == f"error: {output}: process {running.pid} works on it; wait for that run\n"
