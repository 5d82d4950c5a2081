"""Training on several devices of this machine: one process for each, started and watched by torch.multiprocessing."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed, multiprocessing
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from medseg.errors import DeviceError, Interrupted, MedsegError, MemoryBudgetError, UsageError
from medseg.training.job import Job, Listeners, train_cases
from medseg.training.loop import Progress, stop_signals
from medseg.training.rank import Rank

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
_PATIENCE = timedelta(hours=12)  # reading the cases may take long; a rank that dies is noticed by its parent at once


@dataclass(frozen=True)
class _Meeting:
    """What the ranks share.

    Attributes:
        count: number of ranks.
        kind: "cpu" or "cuda"; rank n uses cuda:n.
        threads: CPU threads of each.
        folder: where they find one another.
        said: queue of (what, values) to the process that started them.
        stop: event that tells them to stop.
        levels: log levels of the root and of medseg.
    """

    count: int
    kind: str
    threads: int
    folder: str
    said: Any
    stop: Any
    levels: tuple[int, int]


def check_devices(count: int, device: str, batch_size: int) -> str:
    """The kind of device that `count` processes will use.

    Raises:
        UsageError: one single device was named, or the batch cannot be divided.
        DeviceError: fewer CUDA devices than asked for.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError("--device", f"{device!r} with --devices {count}", "use auto, cpu or cuda")
    if batch_size % count:
        raise UsageError("--batch-size", f"{batch_size} crops cannot be divided by {count} devices", "change one")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and found == 0):
        return "cpu"
    if found < count:
        raise DeviceError("--devices", f"{count} asked for, {found} CUDA devices found", "use fewer, or --device cpu")
    return "cuda"


def train_on_devices(job: Job, count: int, device: str, listeners: Listeners) -> Progress:
    """`train_cases` in `count` processes, each with its part of every batch; the leading one writes.

    Raises:
        MedsegError: what a rank raised. Interrupted: SIGINT or SIGTERM; the run is saved.
        MemoryBudgetError: a rank was killed.
    """
    kind = check_devices(count, device, job.config.batch_size)
    context = multiprocessing.get_context("spawn")
    said, stop = context.SimpleQueue(), context.Event()
    levels = logging.getLogger().level, logging.getLogger("medseg").level
    threads = max(torch.get_num_threads() // count, 1)
    ends: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="medseg-") as folder, stop_signals() as received:
        meeting = _Meeting(count, kind, threads, folder, said, stop, levels)
        started: Any = multiprocessing.start_processes(  # type: ignore[attr-defined,no-untyped-call]
            _rank, args=(job, meeting), nprocs=count, join=False, start_method="spawn"
        )
        try:
            done = False
            while not done:
                done = started.join(timeout=_POLL_SECONDS, grace_period=_GRACE_SECONDS)
                if received:
                    stop.set()
                _hear(said, listeners, ends)
        except ProcessException as err:
            _hear(said, listeners, ends)
            if isinstance(error := ends.get("error"), MedsegError):
                raise error from None
            # On a CPU the others notice by themselves that one is gone, so that nothing else kills them.
            killed = [process.exitcode == -signal.SIGKILL for process in started.processes]
            if any(killed) and (kind == "cpu" or isinstance(err, ProcessExitedException)):
                remedy = "lower --batch-size or --devices; --resume goes on from the last save"
                raise MemoryBudgetError(job.output, f"process {killed.index(True)} was killed", remedy) from err
            raise
        finally:
            for process in started.processes:
                if process.is_alive():
                    process.kill()
                process.join()
    if received or "stopped" in ends:
        raise Interrupted(received[0] if received else ends["stopped"])
    progress: Progress = ends["end"]
    return progress


def _hear(said: Any, listeners: Listeners, ends: dict[str, Any]) -> None:
    """Pass on what the ranks said so far; how each of them ended is kept in `ends`."""
    while not said.empty():
        what, values = said.get()
        if what in ("error", "end", "stopped"):
            ends.setdefault(what, values)
        elif (listener := getattr(listeners, what)) is not None:
            listener(*values)


def _rank(number: int, job: Job, meeting: _Meeting) -> None:
    """One process of the run."""
    logging.basicConfig(level=meeting.levels[0])
    logging.getLogger("medseg").setLevel(meeting.levels[1])
    logging.captureWarnings(capture=True)
    torch.set_num_threads(meeting.threads)
    rank = Rank(number, meeting.count, meeting.stop)

    def say(what: str) -> Any:
        return (lambda *values: meeting.said.put((what, values))) if rank.leads else None

    try:
        with _joined(rank, meeting) as device:
            listeners = Listeners(prepare=say("prepare"), start=say("start"), step=say("step"))
            end = train_cases(job, device, listeners, rank)
        if rank.leads:
            meeting.said.put(("end", end))
    except Interrupted as err:
        meeting.said.put(("stopped", err.number))
        _leave(0)
    except MedsegError as err:
        meeting.said.put(("error", err))
        _leave(err.exit_code)


def _leave(status: int) -> NoReturn:
    """End this process without taking the network apart.

    The error's traceback still holds it, and when it goes, gloo's thread can wait for Python's lock while Python waits
    for the thread.
    """
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def _joined(rank: Rank, meeting: _Meeting) -> Iterator[torch.device]:
    """The process group, and this rank's device."""
    device = torch.device("cuda", rank.number) if meeting.kind == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=Path(meeting.folder, "meeting").as_uri(),
        rank=rank.number,
        world_size=rank.count,
        timeout=_PATIENCE,
    )
    try:
        yield device
    except Interrupted:  # all ranks stopped after the same step; after an error the others may be gone
        distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()
