"""Cases on this machine: threads that read ahead and write behind, and processes that each do so."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from medseg.batch.cases import Case
from medseg.batch.journal import Entry
from medseg.batch.worker import MEMORY, OnEntry, ReadScan, Settings, Worker
from medseg.bundles.ensemble import load_ensemble
from medseg.errors import Interrupted, MedsegError, MemoryBudgetError

if TYPE_CHECKING:
    from medseg.inference.run import Result

OnStart = Callable[[Case], None]
"""Called before the outputs of a case can appear."""

Progress = Callable[[Case, str, int, int], None]
"""Called with (case, stage, done, all) as a case goes on."""

Factory = Callable[[], Worker]
"""Makes a process's worker; it travels to that process."""

T = TypeVar("T")

_GRACE = 4.0
_STARTS = 3


def run_threads(
    worker: Worker,
    cases: Iterator[Case],
    *,
    on_start: OnStart,
    on_entry: OnEntry,
    progress: Progress | None = None,
    again: bool = True,
) -> None:
    """Compute cases in this thread, while one thread reads the next case and another writes the last one.

    In memory are at most the case computed, one that waits, and one that is being written.

    Args:
        worker: does the work.
        cases: taken from one at a time, in the reader's thread.
        on_start: called in the writer's thread.
        on_entry: called in the writer's thread; what it raises ends the run.
        progress: called in this thread.
        again: try a case that did not fit into memory once more alone.

    Raises:
        Interrupted: a signal came; the case being written was completed first, when that took no more than seconds.
    """
    reader, writer = _Lane("medseg-read"), _Lane("medseg-write")
    too_large: list[Case] = []
    current: Case | None = None
    writing: Future[None] = Future()
    writing.set_result(None)

    def finish(case: Case, outcome: tuple[ReadScan, Result] | Exception) -> None:
        if not isinstance(outcome, Exception):
            on_start(case)
            try:
                entry = worker.write(case, *outcome)
            except Exception as error:  # a case fails alone, whatever it fails of
                entry = worker.failed(case, error)
        else:
            entry = worker.failed(case, outcome)
        if entry.code == MEMORY and again:
            too_large.append(case)
        else:
            on_entry(case, entry)

    try:
        ahead = reader.submit(_read_next, worker, cases)
        while (item := ahead.result()) is not None:
            case, scan = item
            ahead = reader.submit(_read_next, worker, cases)
            current = case
            outcome = _compute(worker, case, scan, progress)
            writing.result()
            writing = writer.submit(finish, case, outcome)
            current = None
            del item, scan, outcome
        writing.result()
        for case in too_large:
            current = case
            on_start(case)
            on_entry(case, worker.run(case))
    except BaseException as error:
        wait([writing], timeout=_GRACE)
        if not writing.done():
            _remove_temporaries(worker.output)
        if isinstance(error, Interrupted) and current is not None:
            on_entry(current, Entry(event="interrupted", case=current.name))
        raise
    finally:
        reader.close()
        writer.close()


def _read_next(worker: Worker, cases: Iterator[Case]) -> tuple[Case, ReadScan | Exception] | None:
    """The next case with its scan, or with why it cannot be read; None after the last."""
    case = next(cases, None)
    if case is None:
        return None
    try:
        return case, worker.read(case)
    except Exception as error:  # a case fails alone, whatever it fails of
        return case, error


def _compute(
    worker: Worker, case: Case, scan: ReadScan | Exception, progress: Progress | None
) -> tuple[ReadScan, Result] | Exception:
    if isinstance(scan, Exception):
        return scan
    report = None if progress is None else lambda stage, done, total: progress(case, stage, done, total)
    try:
        return scan, worker.compute(case, scan, progress=report)
    except Exception as error:  # a case fails alone, whatever it fails of
        return error


class _Lane:
    """A thread that does one thing after the other, and does not keep the process alive."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Call a function in the thread."""
        future: Future[T] = Future()

        def call() -> None:
            try:
                future.set_result(function(*args))
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)

        self._work.put(call)
        return future

    def close(self) -> None:
        """End the thread after what was submitted."""
        self._work.put(None)

    def _serve(self) -> None:
        while (call := self._work.get()) is not None:
            call()
            del call  # an idle thread must not hold a scan


def _remove_temporaries(output: Path) -> None:
    """Remove what a writer of this process, which cannot be waited for, has not yet given its name."""
    for path in output.rglob(f".*.{os.getpid()}.tmp*"):
        with contextlib.suppress(OSError):
            path.unlink()


class ProcessPool:
    """Worker processes, each with the model and its share of the cores.

    Args:
        factory: makes the worker in its process.
        slots: how many processes.

    Raises:
        MedsegError: what the factory raised. MemoryBudgetError: the processes die before they are ready.
    """

    depth = 2
    """Cases that a worker holds: one that it computes, one that it reads."""

    def __init__(self, factory: Factory, slots: int) -> None:
        self.slots = slots
        self._factory = factory
        self._threads = max(1, _cores() // slots)
        self._context = multiprocessing.get_context("spawn")
        self._failed_starts = 0
        self._workers: list[_Process] = []
        try:
            for _ in range(slots):
                self._workers.append(self._start())
            while not any(worker.ready for worker in self._workers):
                self.wait()
        except BaseException:
            self.close(interrupted=True)
            raise

    def ready(self, slot: int) -> bool:
        """Whether a worker takes cases: they wait in its pipe until it has loaded the model."""
        return slot < self.slots

    def submit(self, slot: int, case: Case) -> None:
        """Give a case to a worker; should the worker be dead, `wait` tells."""
        with contextlib.suppress(OSError):
            self._workers[slot].pipe.send(case)

    def wait(self) -> list[tuple[int, Entry | None]]:
        """Wait for something to happen: lines of cases that ended; None for a worker that died and was replaced."""
        slot_of: dict[Any, int] = {}
        for slot, worker in enumerate(self._workers):
            slot_of[worker.pipe] = slot_of[worker.process.sentinel] = slot
        happened: list[tuple[int, Entry | None]] = []
        for slot in sorted({slot_of[thing] for thing in wait_for_any(list(slot_of), timeout=1.0)}):
            worker = self._workers[slot]
            alive, messages = worker.receive()
            for message in messages:
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, Entry):
                    happened.append((slot, message))
                else:
                    worker.ready = True
                    self._failed_starts = 0
            if not alive:
                self._replace(slot)
                happened.append((slot, None))
        return happened

    def close(self, *, interrupted: bool = False) -> list[Entry]:
        """End the workers; when interrupted, after what they are writing.

        Returns:
            Lines of cases that ended in the meantime.
        """
        for worker in self._workers:
            if interrupted:
                worker.process.terminate()
            else:
                with contextlib.suppress(OSError):
                    worker.pipe.send(None)
        entries: list[Entry] = []
        for worker in self._workers:
            worker.process.join(_GRACE + 1)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            entries += [message for message in worker.receive()[1] if isinstance(message, Entry)]
            worker.pipe.close()
        self._workers = []
        return entries

    def _start(self) -> _Process:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._factory, self._threads), daemon=True)
        with _interrupt_held_back():
            process.start()
        theirs.close()
        return _Process(process, ours)

    def _replace(self, slot: int) -> None:
        worker = self._workers[slot]
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS:
                raise MemoryBudgetError("--workers", "the processes die while they load the model", "use fewer workers")
        worker.process.join()
        worker.pipe.close()
        self._workers[slot] = self._start()


class _Process:
    """A worker process as its parent sees it."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe
        self.ready = False

    def receive(self) -> tuple[bool, list[Any]]:
        """Whether it lives, and all that it sent."""
        alive = self.process.is_alive()  # first: what a dead process sent before is in the pipe
        messages = []
        try:
            while self.pipe.poll():
                messages.append(self.pipe.recv())
        except (EOFError, OSError):
            alive = False
        return alive, messages


def make_worker(
    bundle: Path | Sequence[Path],
    settings: Settings,
    output: Path,
    token: str,
    *,
    weights: Sequence[float] | None = None,
) -> Worker:
    """A worker with its models in memory, for a process of its own.

    Raises:
        BundleError: a bundle cannot be loaded.
    """
    worker = Worker(load_ensemble(bundle, weights, trust=settings.trust), settings, output, token=token)
    worker.load()
    return worker


def _serve(pipe: Connection, factory: Factory, threads: int) -> None:
    """A worker process: cases come in, lines go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    try:
        import torch

        torch.set_num_threads(threads)
        worker = factory()
        pipe.send("ready")
        run_threads(
            worker,
            iter(pipe.recv, None),
            on_start=lambda _case: None,
            on_entry=lambda _case, entry: pipe.send(entry),
            again=False,
        )
    except MedsegError as error:
        pipe.send(error)
    except (Interrupted, EOFError, OSError):
        pass  # told to end, or nobody listens any more


@contextlib.contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Hold SIGINT back for a moment; a process started now never gets it: the terminal sends it to all of them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


def _end_with(sentinel: int) -> None:
    """End this process when its parent does, even killed: nobody would record what it still writes."""
    wait_for_any([sentinel])
    os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
