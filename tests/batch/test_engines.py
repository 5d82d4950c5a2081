"""One process, several processes and a Ray cluster do the same: the same files, journal, failures and retries."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.batch.cases import Case, find_cases
from medseg.batch.journal import Entry
from medseg.batch.local import Factory, ProcessPool, make_worker, run_threads
from medseg.batch.lock import FolderLock
from medseg.batch.pool import Pool, drive
from medseg.batch.run import Silence, Workers, run_batch
from medseg.batch.worker import Settings
from medseg.errors import BundleError, DeviceError, Interrupted, UsageError
from medseg.inference.run import infer
from medseg.report.outputs import reserve_outputs, write_outputs
from tests.batch.poisoned import make_narrow, make_poisoned
from tests.builders import blob_scan, save_scan, tiny_bundle

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray.*")]

ENGINES = {
    "one process": Workers("local", 1),
    "two processes": Workers("local", 2),
    "ray": Workers("ray", 2, cpus_per_actor=1),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of two cores for the whole module."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'medseg[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(params=ENGINES)
def workers(request: pytest.FixtureRequest) -> Workers:
    if request.param == "ray":
        request.getfixturevalue("cluster")
    return ENGINES[request.param]


@pytest.fixture(params=["processes", "ray"])
def make_pool(request: pytest.FixtureRequest) -> Callable[[Factory], Pool]:
    if request.param == "processes":
        return lambda factory: ProcessPool(factory, 2)
    request.getfixturevalue("cluster")
    from medseg.batch.ray import RayPool

    return lambda factory: RayPool(factory, actors=2, most=9, cpus_per_actor=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the workers: another number of threads sums in another order, which the last bits show."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles"), overlap=0.0)


def _scans(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        save_scan(folder / f"{name}.nii.gz", blob_scan((32, 42 + number, 30), seed=number))
    return folder


def _without_time(record: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(record.read_text())
    del content["created"], content["seconds"], content["threads"]
    return content


def test_every_engine_writes_what_infer_writes_and_a_second_run_computes_nothing(
    workers: Workers, bundle: Path, tmp_path: Path
) -> None:
    scans = _scans(tmp_path / "in", "a", "b", "c")
    (scans / "bad.nii.gz").write_bytes(b"not a scan")
    output, alone = tmp_path / "out", tmp_path / "alone"
    summary = run_batch([scans], output, bundle=bundle, settings=Settings(probabilities=True), workers=workers)
    assert summary.counts == {"done": 3, "failed": 1}
    error = summary.error()
    assert error is not None
    assert error.exit_code == 7
    alone.mkdir()
    for name in ("a", "b", "c"):
        scan = scans / f"{name}.nii.gz"
        places = reserve_outputs([scan], alone, probabilities=True)
        result = write_outputs(infer(scan, bundle=bundle, probabilities=True), places)
        for path in places.paths().values():
            if path.suffix == ".json":
                assert _without_time(output / path.name) == _without_time(path)
            else:
                assert (output / path.name).read_bytes() == path.read_bytes(), path.name
        row = next(case for case in summary.cases if case.case == name)
        assert row.volumes_ml == {label.name: label.volume_ml for label in result.statistics}
    expected = {path.name for path in alone.iterdir()} | {"run.jsonl", "summary.csv", "summary.json"}
    assert {path.name for path in output.iterdir()} == expected
    before = (output / "run.jsonl").read_bytes()
    again = run_batch([scans], output, bundle=bundle, settings=Settings(probabilities=True), workers=workers)
    assert again.earlier == 4
    assert (output / "run.jsonl").read_bytes() == before
    assert [(case.case, case.status, case.code) for case in again.cases] == [
        (case.case, case.status, case.code) for case in summary.cases
    ]


def test_a_signal_ends_every_engine_within_seconds_and_the_next_run_finishes(
    workers: Workers, bundle: Path, tmp_path: Path
) -> None:
    class Stop(Silence):
        def ended(self, case: Case, entry: Entry) -> None:  # noqa: ARG002 - as its base
            nonlocal stopped
            if not stopped:
                stopped = time.monotonic()
                os.kill(os.getpid(), signal.SIGTERM)

    def stop(number: int, _frame: object) -> None:
        raise Interrupted(number)

    scans, output, stopped = _scans(tmp_path / "in", "a", "b", "c", "d", "e"), tmp_path / "out", 0.0
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Interrupted):
            run_batch([scans], output, bundle=bundle, workers=workers, listener=Stop())
        took = time.monotonic() - stopped
    finally:
        signal.signal(signal.SIGTERM, before)
    assert took < 30  # seconds on an idle machine; five cases take longer where the signal is ignored
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    states = [case["status"] for case in json.loads((output / "summary.json").read_text())["cases"]]
    assert "done" in states
    assert {"interrupted", "waiting"} & set(states)
    done = states.count("done")
    summary = run_batch([scans], output, bundle=bundle)
    assert summary.counts == {"done": 5}
    assert summary.earlier == done


def test_a_case_that_kills_its_worker_is_tried_once_more_alone_and_then_fails(
    make_pool: Callable[[Factory], Pool], bundle: Path, tmp_path: Path
) -> None:
    cases = find_cases([_scans(tmp_path / "in", "a", "b", "c", "poison")]).cases
    cases = (cases[3], *cases[:3])
    output = tmp_path / "out"
    output.mkdir()
    ended: dict[str, Entry] = {}
    drive(
        make_pool(functools.partial(make_poisoned, bundle, output)),
        cases,
        on_start=lambda _case: None,
        on_entry=lambda _case, entry: ended.update({entry.case: entry}),
    )
    assert {name: (entry.event, entry.code) for name, entry in ended.items()} == {
        "a": ("done", 0),
        "b": ("done", 0),
        "c": ("done", 0),
        "poison": ("failed", 5),
    }
    tries = (output / "tries").read_text().splitlines()
    assert len(tries) == 2
    # Whoever was lost with it is also tried again alone, in the order of the inputs.
    assert tries[1] in {"2 done before", "3 done before"}


def test_a_case_without_memory_beside_others_is_done_alone(bundle: Path, tmp_path: Path) -> None:
    cases = find_cases([_scans(tmp_path / "in", "a", "b", "c", "large")]).cases
    output = tmp_path / "out"
    output.mkdir()
    ended: list[tuple[str, str]] = []
    run_threads(
        make_narrow(bundle, output),
        iter((cases[3], *cases[:3])),
        on_start=lambda _case: None,
        on_entry=lambda _case, entry: ended.append((entry.case, entry.event)),
    )
    assert ended == [("a", "done"), ("b", "done"), ("c", "done"), ("large", "done")]


def test_a_network_that_cannot_be_loaded_fails_once_and_not_for_each_case(
    workers: Workers, bundle: Path, tmp_path: Path
) -> None:
    broken = tiny_bundle(tmp_path, "broken")
    (broken / "models" / "model.pt").write_bytes((bundle / "models" / "model.pt").read_bytes()[:-1000])
    (broken / "manifest.json").unlink()
    with pytest.raises(BundleError):
        run_batch([_scans(tmp_path / "in", "a", "b")], tmp_path / "out", bundle=broken, workers=workers)
    states = [case["status"] for case in json.loads((tmp_path / "out" / "summary.json").read_text())["cases"]]
    assert states == ["waiting", "waiting"]


def test_a_worker_that_outlived_its_run_writes_nothing(bundle: Path, tmp_path: Path) -> None:
    (case,) = find_cases([_scans(tmp_path / "in", "a")]).cases
    output = tmp_path / "out"
    output.mkdir()
    with FolderLock(output) as lock:
        orphan = make_worker(bundle, Settings(), output, "the token of a run that was killed")
        assert orphan.run(case).code == 6
        assert [path.name for path in output.iterdir()] == [".run.lock"]
        assert make_worker(bundle, Settings(), output, lock.token).run(case).event == "done"


def test_parts_of_a_batch_are_disjoint_and_complete(bundle: Path, tmp_path: Path) -> None:
    scans = _scans(tmp_path / "in", *(f"case_{number}" for number in range(6)))
    for path in scans.iterdir():
        path.write_bytes(b"no scan")  # which case goes where is what counts
    parts = [
        [case.case for case in run_batch([scans], tmp_path / f"out{part}", bundle=bundle, shard=(part, 3)).cases]
        for part in (1, 2, 3)
    ]
    assert sorted(name for part in parts for name in part) == [f"case_{number}" for number in range(6)]
    assert all(len(part) < 6 for part in parts)


@pytest.mark.parametrize(
    ("workers", "settings", "kind"),
    [
        (Workers("local", address="auto"), Settings(), UsageError),
        (Workers(), Settings(overlap=1.0), UsageError),
        (Workers(), Settings(device="gpu"), UsageError),
        (Workers("ray", address="127.0.0.1:1"), Settings(), DeviceError),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(
    bundle: Path, tmp_path: Path, workers: Workers, settings: Settings, kind: type[Exception]
) -> None:
    if workers.engine == "ray":
        ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'medseg[ray]'")
        if ray.is_initialized():
            ray.shutdown()
    with pytest.raises(kind):
        run_batch([_scans(tmp_path / "in", "a")], tmp_path / "out", bundle=bundle, settings=settings, workers=workers)


def test_without_ray_one_line_says_what_to_install(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DeviceError, match=r"Ray is not installed; pip install 'medseg\[ray\]'") as refused:
        run_batch([_scans(tmp_path / "in", "a")], tmp_path / "out", bundle=bundle, workers=Workers("ray"))
    assert refused.value.exit_code == 8
