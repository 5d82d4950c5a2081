"""Cases on a Ray cluster: actors hold the model, file names go out, lines come back.

No voxel goes through Ray: every node reads the scans and writes the outputs on storage that all of them share.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from medseg.batch.cases import Case
from medseg.batch.journal import Entry
from medseg.batch.local import Factory
from medseg.batch.worker import Worker
from medseg.errors import DeviceError, MedsegError

log = logging.getLogger(__name__)

_POLL = 1.0


class RayPool:
    """Actors on an existing cluster, or on one started for this run on this machine.

    An actor that died is started again, on another node where its own is gone. Ray itself never repeats a task: a
    case that may have killed its actor must not be tried beside others.

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
        self._ray = ray = _import_ray()
        self._tasks: dict[Any, tuple[int, Case]] = {}
        self._actors: list[Any] = []
        self._began = not ray.is_initialized()
        with _own_signals():
            try:
                if self._began:
                    ray.init(
                        address=address or "local",
                        include_dashboard=None if address else False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        configure_logging=False,
                    )
            except (ConnectionError, RuntimeError, ValueError, OSError) as err:
                reason = str(err).strip().partition("\n")[0]
                raise DeviceError("--address", f"no Ray cluster answers ({reason})", "check ray status") from err
        try:
            resources = ray.cluster_resources()
            gpus = int(resources.get("GPU", 0))
            use_gpu = gpus > 0 if gpu is None else gpu
            cores = int(resources.get("CPU", 0))
            fit = min(cores // cpus_per_actor, gpus) if use_gpu else cores // cpus_per_actor
            if fit < 1 or (actors or 1) > fit:
                asked = f"{actors or 1} x {cpus_per_actor} cores" + (" and a GPU" if use_gpu else "")
                raise DeviceError(
                    "--engine ray", f"{asked} asked for, the cluster has {cores} cores and {gpus} GPUs", "ask for less"
                )
            self.slots = min(actors or fit, most)
            remote = ray.remote(_Actor)
            self._actors = [
                remote.options(
                    num_cpus=cpus_per_actor,
                    num_gpus=1 if use_gpu else 0,
                    max_restarts=-1,
                    max_task_retries=0,
                    max_concurrency=self.depth + 1,
                ).remote(factory, cpus_per_actor)
                for _ in range(self.slots)
            ]
            checks = [actor.problem.remote() for actor in self._actors]
            while len(ray.wait(checks, num_returns=len(checks), timeout=_POLL)[0]) < len(checks):
                pass  # short waits: a signal's handler runs between them
            for problem in ray.get(checks):
                if problem is not None:
                    raise problem
        except ray.exceptions.RayError as err:
            self.close(interrupted=True)
            raise DeviceError(
                "--engine ray", f"the actors do not start ({type(err).__name__})", "see Ray's log"
            ) from err
        except BaseException:
            self.close(interrupted=True)
            raise

    def submit(self, slot: int, case: Case) -> None:
        """Give a case to an actor: its name and its paths."""
        self._tasks[self._actors[slot].run.remote(case)] = (slot, case)

    def wait(self) -> list[tuple[int, Entry | None]]:
        """Lines of cases that ended; None for an actor that died or whose node is gone, and that starts again."""
        if not self._tasks:
            return []
        ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=_POLL)
        happened: list[tuple[int, Entry | None]] = []
        for task in ready:
            if task not in self._tasks:
                continue  # of an actor whose death another task told
            slot, _ = self._tasks.pop(task)
            try:
                happened.append((slot, self._ray.get(task)))
            except self._ray.exceptions.RayTaskError as err:
                raise err.cause from None
            except self._ray.exceptions.RayError as err:
                log.info("actor %d: %s", slot, type(err).__name__)
                self._tasks = {task: place for task, place in self._tasks.items() if place[0] != slot}
                happened.append((slot, None))
        return happened

    def close(self, *, interrupted: bool = False) -> list[Entry]:
        """End the actors, and the cluster if it was started here; when interrupted, after what they are writing.

        Returns:
            Lines of cases that ended in the meantime.
        """
        entries: list[Entry] = []
        if interrupted and self._tasks:
            with contextlib.suppress(self._ray.exceptions.RayError):
                stops = [actor.stop.remote() for actor in self._actors]
                self._ray.wait(stops, num_returns=len(stops), timeout=4.0)
                ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
                for task in ready:
                    with contextlib.suppress(self._ray.exceptions.RayError):
                        entries.append(self._ray.get(task))
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)
        self._actors, self._tasks = [], {}
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
