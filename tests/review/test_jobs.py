"""Runs from the queue, and corrected cases on their way to training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medseg.errors import InputError, UsageError
from medseg.io.read import read_labels, read_volume
from medseg.review.dataset import export_dataset
from medseg.review.jobs import JobQueue
from medseg.review.store.models import Job
from medseg.review.store.repo import Store
from medseg.review.worklist import add_result, import_folder
from medseg.training.dataset import read_dataset
from tests.builders import blob_scan, save_scan, tiny_bundle


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store.in_folder(tmp_path / "data")
    yield found
    found.close()


def add_scan(store: Store, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    save_scan(folder / "scan.nii.gz", blob_scan(), np.eye(4))
    (case,) = import_folder(store, folder, by=store.sign_in("local:anna", "Anna")).added
    return case


def wait_for(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end, "nothing happened within a minute"
        time.sleep(0.02)


def test_a_bundle_runs_on_a_case_and_gives_it_labels_and_a_first_version(store: Store, tmp_path: Path) -> None:
    anna, case = store.sign_in("local:anna", "Anna"), add_scan(store, tmp_path / "scans")
    queue = JobQueue(store)
    job = queue.submit(case, str(tiny_bundle(tmp_path)), by=anna, device="cpu")
    queue.start()
    wait_for(lambda: store.job(job.id).state not in {"queued", "running"})
    queue.stop()
    ended = store.job(job.id)
    assert (ended.state, ended.progress, ended.message) == ("done", 1.0, "")
    assert [row.name for row in store.labels(case)] == ["Anterior", "Posterior"]
    (version,) = store.versions(case)
    assert version.prediction_id == ended.prediction_id
    assert store.case(case).state == "new"
    assert store.prediction(ended.prediction_id).record["bundle"]["name"] == "tiny"


def test_runs_wait_in_order_can_be_stopped_and_fail_in_the_words_of_the_command_line(
    store: Store, tmp_path: Path
) -> None:
    anna, case = store.sign_in("local:anna", "Anna"), add_scan(store, tmp_path / "scans")
    begun = threading.Event()

    def infer(_scan: Path, *, bundle: str, progress: Callable[[str, int, int], None], **_: Any) -> SimpleNamespace:
        if bundle == "bad":
            raise InputError(tmp_path / "secret folder" / "scan.nii.gz", "damaged", "copy it again")
        if bundle == "bug":
            raise RuntimeError(str(tmp_path))
        for step in range(10_000):
            progress("network", step, 10_000)
            begun.set()
            time.sleep(0.005)
        raise AssertionError("nobody stopped the run")

    queue = JobQueue(store, infer=infer)
    jobs: list[Job] = [queue.submit(case, bundle, by=anna) for bundle in ("long", "never", "bad", "bug")]
    assert [queue.position(job.id) for job in jobs] == [0, 1, 2, 3]
    queue.start()
    assert begun.wait(60)
    queue.cancel(jobs[1].id, by=anna)
    assert queue.position(jobs[2].id) == 1
    queue.cancel(jobs[0].id, by=anna)
    wait_for(lambda: store.job(jobs[3].id).state == "failed")
    queue.stop()
    found = [store.job(job.id) for job in jobs]
    assert [job.state for job in found] == ["cancelled", "cancelled", "failed", "failed"]
    assert (found[2].message, found[2].code) == ("scan.nii.gz: damaged; copy it again", 3)
    assert (found[3].message, found[3].code) == ("internal error (RuntimeError); please report it", 1)
    assert store.versions(case) == []


def test_accepted_cases_become_a_data_set_that_training_reads(store: Store, tmp_path: Path) -> None:
    anna, case = store.sign_in("local:anna", "Anna"), add_scan(store, tmp_path / "scans")
    labels = (blob_scan() > 230).astype(np.uint8)
    add_result(store, case, labels, names={0: "background", 1: "bright"}, model="threshold", by=anna)
    options = {"name": "Corrected", "channel": "MRI", "by": anna}
    with pytest.raises(UsageError, match="is 'new'; export accepted"):
        export_dataset(store, [case], tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()
    store.add_review(case, 1, "accepted", by=anna)
    found = read_dataset(export_dataset(store, [case], tmp_path / "set", **options))
    assert (found.modality, dict(found.labels)) == ("MR", {0: "background", 1: "bright"})
    (files,) = found.cases
    assert np.array_equal(read_labels(files.label)[0], labels)
    assert np.array_equal(read_volume(files.images[0]).data[0], blob_scan())
    store.file(store.version(case, 1).path).write_bytes(b"changed")
    with pytest.raises(InputError, match="was changed since it was added"):
        export_dataset(store, [case], tmp_path / "again", **options)
