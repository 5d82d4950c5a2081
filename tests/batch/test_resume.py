"""What a second run does: what it trusts, what it computes again, what it refuses to replace."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medseg.batch.journal import Entry, Journal
from medseg.batch.lock import FolderLock
from medseg.batch.run import run_batch
from medseg.batch.summary import Summary
from medseg.batch.worker import Settings
from medseg.errors import OutputError, UsageError
from tests.builders import blob_scan, save_scan, tiny_bundle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles"), overlap=0.0)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(2):
        save_scan(tmp_path / "in" / f"case_{number}.nii.gz", blob_scan((32, 42 + number, 30), seed=number))
    return tmp_path / "in"


def _computed(summary: Summary) -> list[str]:
    return [case.case for case in summary.cases if not case.earlier]


def test_a_run_killed_before_any_step_on_the_disk_leaves_what_the_next_one_needs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.batch.crash_points", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 30


def test_only_what_changed_is_computed_again(bundle: Path, scans: Path, tmp_path: Path) -> None:
    def run(**options: object) -> list[str]:
        return _computed(run_batch([scans], tmp_path / "out", bundle=bundle, **options))  # type: ignore[arg-type]

    def settled(change: Callable[[], object], expected: list[str]) -> None:
        change()
        assert run() == expected
        assert run() == []

    first, second = scans / "case_0.nii.gz", scans / "case_1.nii.gz"
    output = tmp_path / "out"
    assert run() == ["case_0", "case_1"]
    assert run() == []
    settled(lambda: os.utime(first), [])  # another time, the same bytes
    settled(lambda: save_scan(first, blob_scan((32, 42, 30), seed=7)), ["case_0"])
    settled((output / "case_1_seg.nii.gz").unlink, ["case_1"])
    settled((output / "case_1_seg.json").unlink, ["case_1"])
    settled(lambda: save_scan(scans / "case_2.nii.gz", blob_scan((32, 40, 30))), ["case_2"])
    assert _computed(run_batch([second], output, bundle=bundle, restart=True)) == ["case_1"]
    assert run() == []


def test_what_this_journal_does_not_vouch_for_is_not_replaced(bundle: Path, scans: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    labels = output / "case_0_seg.nii.gz"
    output.mkdir()
    labels.write_bytes(b"somebody's own")
    with pytest.raises(OutputError, match=r"case_0_seg.nii.gz: exists and is not of an earlier run"):
        run_batch([scans], output, bundle=bundle)
    assert sorted(path.name for path in output.iterdir()) == ["case_0_seg.nii.gz"]
    assert run_batch([scans], output, bundle=bundle, overwrite=True).counts == {"done": 2}
    whole = labels.read_bytes()
    labels.write_bytes(b"corrected by hand")
    with pytest.raises(OutputError, match="was changed since it was written"):
        run_batch([scans], output, bundle=bundle)
    assert labels.read_bytes() == b"corrected by hand"
    assert _computed(run_batch([scans], output, bundle=bundle, overwrite=True)) == ["case_0"]
    assert labels.read_bytes() == whole
    with pytest.raises(OutputError, match=r"another bundle or other options \(and 5 more files\)"):
        run_batch([scans], output, bundle=bundle, settings=Settings(tta=True))


def test_a_failure_of_the_scan_stands_until_something_changes(bundle: Path, scans: Path, tmp_path: Path) -> None:
    save_scan(scans / "case_0.nii.gz", blob_scan((70, 70, 70)))  # not what the bundle was trained on
    (scans / "case_1.nii.gz").write_bytes(b"not a scan")

    def run(**options: object) -> Summary:
        return run_batch([scans], tmp_path / "out", bundle=bundle, **options)  # type: ignore[arg-type]

    first = run()
    assert [(case.status, case.code) for case in first.cases] == [("failed", 4), ("failed", 3)]
    error = first.error()
    assert error is not None
    assert error.exit_code == 3  # the codes differ
    assert _computed(run()) == []
    assert _computed(run(retry_failed=True)) == ["case_0", "case_1"]
    save_scan(scans / "case_1.nii.gz", blob_scan((32, 40, 30)))
    assert _computed(run()) == ["case_1"]
    forced = run(settings=Settings(force=True))
    assert _computed(forced) == ["case_0"]
    assert forced.counts == {"done": 2}
    again = run()  # without --force the forced result does not count
    assert [(case.case, case.code) for case in again.cases if not case.earlier] == [("case_0", 4)]


def test_an_output_never_replaces_a_scan_of_the_batch(bundle: Path, scans: Path) -> None:
    (scans / "table.csv").write_text("case,image\ncase_0,case_0.nii.gz\nother,case_0_seg.nii.gz\n")
    save_scan(scans / "case_0_seg.nii.gz", blob_scan((32, 40, 30)))
    with pytest.raises(UsageError, match="would replace this scan"):
        run_batch([scans / "table.csv"], scans, bundle=bundle, overwrite=True)


def test_a_second_run_is_refused_with_the_number_of_the_first(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock:
        with pytest.raises(OutputError, match=rf"process {os.getpid()} works on it") as refused, FolderLock(tmp_path):
            pass
        assert refused.value.exit_code == 6
        assert json.loads((tmp_path / ".run.lock").read_text())["token"] == lock.token
    assert not list(tmp_path.iterdir())
    (tmp_path / ".run.lock").write_text("left by a killed run")
    with FolderLock(tmp_path), (tmp_path / ".run.lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_torn_last_line_does_not_count_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    journal = Journal.read(tmp_path)
    journal.begin({})
    for name in ("a", "b"):
        journal.append(Entry(event="done", case=name))
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'{"event": "done", "case": "c"')
    torn = Journal.read(tmp_path)
    assert sorted(torn.cases) == ["a", "b"]
    torn.begin({})
    torn.append(Entry(event="failed", case="d", code=3))
    torn.close()
    assert sorted(Journal.read(tmp_path).cases) == ["a", "b", "d"]
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join([*lines[:2], b"{}\n", *lines[2:]]))
    with pytest.raises(OutputError, match="line 3 is not one of a batch's journal"):
        Journal.read(tmp_path)


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.read(tmp_path)
    journal.begin({})
    before = journal.path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:9]))
    with pytest.raises(OutputError, match="no space left"):
        journal.append(Entry(event="done", case="a"))
    journal.close()
    assert journal.path.read_bytes() == before
