"""Runs of bundles on cases: one worker, in the order of arrival, with progress and a way to stop."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medseg.errors import MedsegError
from medseg.io.patients import told_facts
from medseg.review.store.models import Case, Job, User
from medseg.review.store.repo import Store
from medseg.review.worklist import add_result

log = logging.getLogger(__name__)

MOST_WAITING = 32

_STAGES = {"bundle": 0.0, "read": 0.03, "preprocess": 0.08, "network": 0.1, "restore": 0.9, "measure": 0.97}
"""Share of a run that is over when a stage begins."""

_SHARE = {"network": 0.8}
_NOTE_EVERY_S = 0.5
_POLL_S = 1.0


class _CancelledError(Exception):
    """Somebody asked to stop the run."""


class JobQueue:
    """Takes jobs from the store and runs them, one at a time, in a thread.

    Args:
        store: the store.
        infer: `medseg.inference.run.infer` when None.
        name: of this worker, the same after a restart.
    """

    def __init__(self, store: Store, *, infer: Callable[..., Any] | None = None, name: str = "") -> None:
        self._store, self._infer = store, infer
        self._name = name or socket.gethostname()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="medseg-jobs", daemon=True)

    def start(self) -> None:
        """Begin to work; runs that this worker had begun before it was stopped are marked as failed."""
        self._store.end_lost_jobs(self._name)
        self._thread.start()

    def stop(self) -> None:
        """Stop at the next window; the run is marked as cancelled, waiting ones stay in the queue."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def submit(
        self,
        case_id: str,
        bundle: str,
        *,
        by: User,
        device: str = "auto",
        force: bool = False,
        uncertainty: bool = False,
        evidence: bool = False,
        phases: Mapping[str, str] | None = None,
        align: bool = False,
        age: float | None = None,
        sex: str | None = None,
    ) -> Job:
        """Queue a run of a bundle.

        Args:
            case_id: the case; of several phases that of the reference, whose grid the result has.
            bundle: its name or folder.
            by: who asks.
            device: see `medseg.inference.run.infer`.
            force: go on with a scan that is not what the bundle was trained on.
            uncertainty: also keep how sure each voxel is.
            evidence: also keep where a diagnosis sees its evidence.
            phases: for a bundle that diagnoses, the bundle's channel to the case that is this phase; None: the case's
                own file holds all there are.
            align: register the phases rigidly first.
            age: of the patient, years; forgotten when the run has ended, as `sex` is.
            sex: F or M.

        Raises:
            UsageError: the queue is full, no such age or sex. InputError: no such case. PermissionError: a reader may
                not.
        """
        told_facts(age, sex)
        for one in (phases or {}).values():
            self._store.case(one)
        options: dict[str, Any] = {"device": device, "force": force, "uncertainty": uncertainty}
        options |= {"evidence": evidence, "align": align, "phases": dict(phases or {})}
        if age is not None or sex is not None:
            options["patient"] = {"age": age, "sex": sex}
        job = self._store.add_job(case_id, bundle, options, most=MOST_WAITING, by=by)
        self._wake.set()
        return job

    def position(self, job_id: str) -> int:
        """How many jobs run or wait before this one; 0 for one that runs or has ended."""
        job = self._store.job(job_id)
        if job.state != "queued":
            return 0
        waiting = [*self._store.jobs(state="queued"), *self._store.jobs(state="running")]
        return sum(other.number < job.number for other in waiting)

    def cancel(self, job_id: str, *, by: User) -> None:
        """See `Store.cancel_job`."""
        self._store.cancel_job(job_id, by=by)

    def _work(self) -> None:
        while not self._stop.is_set():
            job = self._store.take_job(self._name)
            if job is None:
                self._wake.wait(_POLL_S)
                self._wake.clear()
                continue
            self._run(job)

    def _run(self, job: Job) -> None:
        """Run one job to whichever end; nothing that happens in it stops the worker."""
        log.info("job %s: case %s, bundle begins", job.id, job.case_id)
        try:
            prediction = self._segment(job)
        except _CancelledError:
            self._store.end_job(job.id, "cancelled", message="cancelled")
        except MedsegError as error:
            subject = Path(error.subject).name or error.subject
            message = f"{subject}: {error.problem}" + (f"; {error.remedy}" if error.remedy else "")
            self._store.end_job(job.id, "failed", message=message, code=error.exit_code)
        except MemoryError:
            self._store.end_job(job.id, "failed", message="out of memory; use a smaller scan", code=5)
        except Exception as error:
            log.debug("job %s failed", job.id, exc_info=True)
            message = f"internal error ({type(error).__name__}); please report it"
            self._store.end_job(job.id, "failed", message=message, code=1)
        else:
            self._store.end_job(job.id, "done", prediction_id=prediction)
        log.info("job %s: %s", job.id, self._store.job(job.id).state)

    def _segment(self, job: Job) -> str:
        """Run the bundle and keep its result; the prediction's identifier."""
        from medseg.inference import run  # torch loads here, not with the page
        from medseg.inference.phases import PhaseVolume

        infer = self._infer or run.infer
        case, by = self._store.case(job.case_id), self._store.user(job.created_by)
        told = 0.0

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal told
            if self._stop.is_set():
                raise _CancelledError
            if time.monotonic() - told < _NOTE_EVERY_S and done < total:
                return
            told = time.monotonic()
            part = _STAGES.get(stage, 0.0) + _SHARE.get(stage, 0.0) * done / max(total, 1)
            if self._store.note_progress(job.id, round(part, 3), stage):
                raise _CancelledError

        asked = job.options
        phases, patient = asked.get("phases") or {}, asked.get("patient")
        sources = [_single(self._store.case(one)) for one in phases.values()] if phases else case.sources
        files = [self._store.file(source) for source in sources]
        result = infer(
            files if len(files) > 1 else files[0],
            bundle=job.bundle,
            device=asked.get("device", "auto"),
            force=bool(asked.get("force")),
            uncertainty=bool(asked.get("uncertainty")),
            evidence=bool(asked.get("evidence")),
            phases=list(phases),
            align=bool(asked.get("align")),
            patient=told_facts(patient["age"], patient["sex"]) if patient else None,
            progress=progress,
        )
        record = result.record
        of_patient = result.volume if isinstance(result.volume, PhaseVolume) else None
        prediction = add_result(
            self._store,
            case.id,
            result.label_map,
            names=result.labels,
            model=record.bundle.name,
            version=record.bundle.version,
            record=record.model_dump(mode="json"),
            runtime_s=sum(record.seconds.values()),
            device=record.device,
            uncertainty=result.uncertainty,
            evidence=result.evidence,
            phases=of_patient,
            by=by,
        )
        return prediction.id


def _single(case: Case) -> str:
    """The file that stands for a case as one phase: the one that is shown, where it is one of several."""
    return case.image_path if case.image_path in case.sources else case.sources[0]
