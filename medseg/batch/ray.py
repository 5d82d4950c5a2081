"""Cases on a Ray cluster: actors hold the model, file names go out, lines come back.

No voxel goes through Ray: every node reads the scans and writes the outputs on storage that all of them share.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from medseg.batch.cases import Case
from medseg.batch.journal import Entry
from medseg.batch.local import Factory
from medseg.batch.worker import Worker
from medseg.errors import DeviceError, Interrupted, MedsegError

log = logging.getLogger(__name__)

_POLL = 1.0
_PATIENCE = 600.0
_ANSWER = 5.0


class RayPool:
    """Actors on an existing cluster, or on one started for this run on this machine.

    An actor that died is replaced by a new one, on another node where its own is gone; no case waits for one that
    finds no place. Ray itself restarts and repeats nothing: a case that may have killed its actor must not be tried
    beside others.

    Args:
        factory: makes the worker in its actor.
        address: of the cluster ("auto", "host:6379", "ray://host:10001"); None starts one here.
        actors: how many; None for as many as fit.
        most: more are not needed.
        cpus_per_actor: cores that each takes.
        gpu: whether each takes one GPU: True, False, or None for "where the cluster has any".

    Raises:
        DeviceError: Ray is not installed, the cluster cannot be reached or lacks what was asked for.
        MedsegError: what the factory raised.
    """

    depth = 2
    """Cases that an actor holds: while it computes one it reads the next."""

    def __init__(
        self,
        factory: Factory,
        *,
        address: str | None = None,
        actors: int | None = None,
        most: int,
        cpus_per_actor: int = 1,
        gpu: bool | None = None,
    ) -> None:
        self._ray = _import_ray()
        self._tasks: dict[Any, tuple[int, Case]] = {}
        self._checks: dict[Any, int] = {}
        self._actors: list[Any] = []
        self._ready: list[bool] = []
        self._last_ready = time.monotonic()
        self._began = not self._ray.is_initialized()
        if self._began:
            _connect(self._ray, address)
        try:
            self.slots, self._options = self._places(actors, cpus_per_actor, gpu=gpu, most=most)
            self._factory, self._threads = factory, cpus_per_actor
            self._actors, self._ready = [None] * self.slots, [False] * self.slots
            for slot in range(self.slots):
                self._start(slot)
            while not any(self._ready):
                self.wait()
        except BaseException:
            self.close(interrupted=True)
            raise

    def ready(self, slot: int) -> bool:
        """Whether the actor has loaded its model."""
        return self._ready[slot]

    def submit(self, slot: int, case: Case) -> None:
        """Give a case to an actor: its name and its paths."""
        self._tasks[self._actors[slot].run.remote(case)] = (slot, case)

    def wait(self) -> list[tuple[int, Entry | None]]:
        """Lines of cases that ended; None for an actor that died or whose node is gone, and that was replaced.

        Raises:
            DeviceError: for long no actor has found a place.
        """
        if any(self._ready):
            self._last_ready = time.monotonic()
        elif time.monotonic() - self._last_ready > _PATIENCE:
            raise DeviceError("--engine ray", f"no actor started in {_PATIENCE:.0f} s", "see ray status and Ray's logs")
        waiting = [*self._tasks, *self._checks]
        finished, _ = self._ray.wait(waiting, num_returns=1, timeout=_POLL)
        happened: list[tuple[int, Entry | None]] = []
        for task in finished:
            slot = self._checks.pop(task) if task in self._checks else self._tasks.pop(task)[0]
            try:
                answer = self._ray.get(task)
            except self._ray.exceptions.RayTaskError as err:
                raise err.cause from None
            except self._ray.exceptions.RayError as err:
                log.info("actor %d: %s", slot, type(err).__name__)
                self._forget(slot)
                self._start(slot)
                happened.append((slot, None))
                continue
            if isinstance(answer, MedsegError):
                raise answer
            self._ready[slot] = True
            if answer is not None:
                happened.append((slot, answer))
        return happened

    def _places(
        self,
        actors: int | None,
        cores_each: int,
        *,
        gpu: bool | None,
        most: int,
    ) -> tuple[int, dict[str, float | int]]:
        """How many actors there will be, and what Ray is to give to each."""
        resources = self._ray.cluster_resources()
        cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        use_gpu = gpus > 0 if gpu is None else gpu
        fit = min(cores // cores_each, gpus) if use_gpu else cores // cores_each
        if fit < 1 or (actors or 1) > fit:
            asked = f"{actors or 1} x {cores_each} cores" + (" and a GPU" if use_gpu else "")
            raise DeviceError(
                "--engine ray", f"{asked} asked for, the cluster has {cores} cores and {gpus} GPUs", "ask for less"
            )
        return min(actors or fit, most), {
            "num_cpus": cores_each,
            "num_gpus": int(use_gpu),
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": self.depth + 1,
        }

    def _start(self, slot: int) -> None:
        """Start an actor; it is ready when its check answers."""
        self._ready[slot] = False
        self._actors[slot] = self._ray.remote(_Actor).options(**self._options).remote(self._factory, self._threads)
        self._checks[self._actors[slot].problem.remote()] = slot

    def _forget(self, slot: int) -> None:
        """Drop what a lost actor held."""
        self._ray.kill(self._actors[slot], no_restart=True)
        self._tasks = {task: place for task, place in self._tasks.items() if place[0] != slot}
        self._checks = {task: place for task, place in self._checks.items() if place != slot}

    def close(self, *, interrupted: bool = False) -> list[Entry]:
        """End the actors, and the cluster if it was started here; when interrupted, after what they are writing.

        Returns:
            Lines of cases that ended in the meantime.
        """
        entries: list[Entry] = []
        if interrupted and self._tasks:
            with contextlib.suppress(self._ray.exceptions.RayError):
                stops = [actor.stop.remote() for slot, actor in enumerate(self._actors) if self._ready[slot]]
                self._ray.wait(stops, num_returns=len(stops), timeout=4.0)
                ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
                for task in ready:
                    with contextlib.suppress(self._ray.exceptions.RayError):
                        entries.append(self._ray.get(task))
        for actor in self._actors:
            if actor is not None:
                self._ray.kill(actor, no_restart=True)
        self._actors, self._tasks, self._checks = [], {}, {}
        if self._began:
            self._ray.shutdown()
        return [entry for entry in entries if entry.event != "interrupted"]


class _Actor:
    """A worker on a node."""

    def __init__(self, factory: Factory, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._problem: MedsegError | None = None
        self._worker: Worker | None = None
        try:
            self._worker = factory()
        except MedsegError as error:
            self._problem = error

    def problem(self) -> MedsegError | None:
        """Why there is no worker; None when all is well."""
        return self._problem

    def run(self, case: Case) -> Entry:
        """Read, compute and write one case."""
        if self._worker is None:
            raise self._problem or RuntimeError("no worker")
        return self._worker.run(case)

    def stop(self) -> None:
        """Write no more; returns when nothing is being written."""
        if self._worker is not None:
            self._worker.stop()


def _import_ray() -> Any:
    """The ray package, its usage reports switched off: a run makes no call that nobody asked for.

    Raises:
        DeviceError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as err:
        raise DeviceError("--engine ray", "Ray is not installed", "pip install 'medseg[ray]'") from err
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Join the cluster, or start one on this machine.

    Raises:
        DeviceError: nothing answers there.
    """
    found = re.fullmatch(r"(?:ray://)?\[?([^\s/]+?)\]?:(\d{1,5})", address or "")
    try:
        if found:  # Ray would wait for minutes
            socket.create_connection((found[1], int(found[2])), timeout=_ANSWER).close()
        with _own_signals():
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError, OverflowError) as err:
        reason = str(err).strip().partition("\n")[0]
        raise DeviceError("--address", f"no Ray cluster answers ({reason})", "check ray status") from err
    except SystemExit:  # what Ray makes of SIGTERM while it starts
        raise Interrupted(signal.SIGTERM) from None


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the signal handlers of the caller, which Ray replaces by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
