"""A batch from its inputs to its summary."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import medseg
from medseg.batch.cases import Case, Found, find_cases
from medseg.batch.journal import Entry, Journal
from medseg.batch.local import ProcessPool, make_worker, run_threads
from medseg.batch.lock import FolderLock
from medseg.batch.plan import Plan, Planner, make_folders
from medseg.batch.pool import Pool, drive
from medseg.batch.summary import NAMES, Summary, summarize
from medseg.batch.worker import Settings, Worker
from medseg.bundles.ensemble import Ensemble, Loadable, load_ensemble
from medseg.bundles.locate import DEFAULT_BUNDLE
from medseg.errors import BundleError, OutputError, UsageError
from medseg.inference.record import disclaimer_of

Engine = Literal["local", "ray"]


class Listener(Protocol):
    """Hears of the work as it goes on; calls may come from another thread than the caller's, one at a time each."""

    def checked(self, done: int, total: int) -> None:
        """So many cases were compared with the journal."""

    def planned(self, found: Found, plan: Plan) -> None:
        """The work begins."""

    def stage(self, case: Case, stage: str, done: int, total: int) -> None:
        """A case goes on; with several workers this is not told."""

    def ended(self, case: Case, entry: Entry) -> None:
        """A case is done, failed or interrupted, and the journal says so."""


class Silence:
    """A listener that does nothing."""

    def checked(self, done: int, total: int) -> None:
        """Nothing."""

    def planned(self, found: Found, plan: Plan) -> None:
        """Nothing."""

    def stage(self, case: Case, stage: str, done: int, total: int) -> None:
        """Nothing."""

    def ended(self, case: Case, entry: Entry) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Where the work is done.

    Attributes:
        engine: this machine, or a Ray cluster.
        count: processes or actors; None for one process, or for as many actors as fit.
        address: of the Ray cluster; None starts one on this machine.
        cpus_per_actor: cores of each Ray actor.
    """

    engine: Engine = "local"
    count: int | None = None
    address: str | None = None
    cpus_per_actor: int = 4


def run_batch(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    bundle: Loadable | Sequence[Loadable] = DEFAULT_BUNDLE,
    weights: Sequence[float] | None = None,
    settings: Settings | None = None,
    workers: Workers | None = None,
    recursive: bool = False,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    retry_failed: bool = False,
    listener: Listener | None = None,
) -> Summary:
    """Segment many scans; what an earlier run in the same folder finished is not computed again.

    Args:
        inputs: folders, patterns, volumes and CSV manifests; see `find_cases`.
        output: the batch's folder, made when its parent exists.
        bundle: a bundle's name or folder, or a bundle from `load_bundle`; several are averaged.
        weights: a positive number for each of several bundles; None: all the same.
        settings: what is asked of every case.
        workers: where the work is done.
        recursive: also search subfolders of the inputs.
        shard: (i, n): only the i-th of n parts of the cases, i from 1; each part needs a folder of its own.
        overwrite: replace files that no earlier run in this folder vouches for.
        restart: compute every case again.
        retry_failed: also try those again that failed because of their scan.
        listener: told how the work goes on.

    Returns:
        What became of each case; a failed case raises nothing.

    Raises:
        MedsegError: before the first case is computed; or the journal cannot be written any more.
        Interrupted: a signal came. The summary is written, and running the same again goes on.
    """
    begin = time.perf_counter()
    settings, workers, listener = settings or Settings(), workers or Workers(), listener or Silence()
    loaded = load_ensemble(bundle, weights, trust=settings.trust)
    diagnoses = _check(loaded, settings, workers)
    folder = Path(output).absolute()
    found = find_cases(inputs, channels=loaded.spec.in_channels, partial=diagnoses, recursive=recursive, output=folder)
    cases = [case for case in found.cases if shard is None or _in_shard(case.name, shard)]
    if not cases and shard is None:
        raise UsageError("INPUT", "no case")
    _make(folder)
    worker = Worker(loaded, settings, folder)
    entries: dict[str, Entry] = {}
    with FolderLock(folder) as lock:
        journal = Journal.read(folder)
        if not journal.path.exists() and not (overwrite or restart):
            for name in NAMES:
                if (folder / name).exists():
                    raise OutputError(
                        folder / name, "exists and is not of an earlier run", "use --overwrite, or another folder"
                    )
        planner = Planner(
            folder, journal, worker.key, settings, overwrite=overwrite, restart=restart, retry_failed=retry_failed
        )
        plan = planner.plan(cases, progress=listener.checked)
        make_folders(folder, plan.todo)
        listener.planned(Found(tuple(cases), found.notes), plan)

        def on_start(case: Case) -> None:
            journal.append(worker.started(case))

        def on_entry(case: Case, entry: Entry) -> None:
            journal.append(entry)
            entries[case.name] = entry
            listener.ended(case, entry)

        def close() -> Summary:
            summary = summarize(
                cases,
                entries,
                plan.earlier,
                output=folder,
                bundle=loaded.name,
                labels=[name for value, name in _labels(loaded).items() if value],
                seconds=time.perf_counter() - begin,
                notes=found.notes,
                disclaimer=disclaimer_of(loaded.metadata),
            )
            summary.write()
            return summary

        try:
            if plan.todo:
                journal.begin(_description(worker, cases=len(cases), todo=len(plan.todo)))
                pool = _pool(worker, workers, plan.todo, lock.token)
                if pool is None:
                    todo = iter(plan.todo)
                    run_threads(worker, todo, on_start=on_start, on_entry=on_entry, progress=listener.stage)
                else:
                    drive(pool, plan.todo, on_start=on_start, on_entry=on_entry)
        except BaseException:
            with contextlib.suppress(OutputError):
                close()
            raise
        finally:
            journal.close()
        return close()


def _check(bundle: Ensemble, settings: Settings, workers: Workers) -> bool:
    """Refuse what would fail for every case, before the first one; whether the bundle diagnoses patients.

    Raises:
        UsageError: an option out of range, or options that contradict each other. BundleError: no weights.
        DeviceError: the device is not there.
    """
    if settings.overlap is not None and not 0 <= settings.overlap < 1:
        raise UsageError("--overlap", f"{settings.overlap} is not in [0, 1)", "0.5 is usual")
    if settings.tta and not any(member.bundle.spec.mirror_axes for member in bundle.members):
        raise UsageError("--tta", f"{bundle.name} allows no flips", "run it without --tta")
    from medseg.inference.run import check_diagnosing

    diagnoses = check_diagnosing(
        bundle,
        align=settings.align,
        patient=settings.metadata is not None,
        evidence=settings.evidence,
        backend=settings.backend,
    )
    for one in (member.bundle for member in bundle.members):
        if one.weights is None:
            raise BundleError(one.name, "has no weights", one.how_to_get_weights())
    if workers.count is not None and workers.count < 1:
        raise UsageError("--workers", f"{workers.count} is not a number of workers", "1 or more")
    if workers.engine == "ray":
        return diagnoses  # its nodes have other devices than this machine
    if workers.address is not None:
        raise UsageError("--address", "is the address of a Ray cluster", "add --engine ray")
    from medseg.inference.backends.host import check_choice
    from medseg.inference.device import choose_device

    kind = choose_device(settings.device).type
    check_choice(settings.backend, settings.precision, device=kind)
    if kind != "cpu" and (workers.count or 1) > 1:
        raise UsageError("--workers", "several processes are for CPUs", "use --engine ray for several GPUs")
    return diagnoses


def _labels(loaded: Ensemble) -> Mapping[int, str]:
    """The names of the label values that results hold."""
    from medseg.inference.diagnosis import classes_of, typed_labels

    codes = classes_of(loaded.members[0].bundle)
    return typed_labels(loaded.spec, list(codes)) if codes else loaded.spec.labels


def _make(folder: Path) -> None:
    """Make the batch's folder; its parent must be there."""
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as err:
        raise OutputError(folder, "a file, not a folder", "choose another folder") from err
    except FileNotFoundError as err:
        raise OutputError(folder, f"its folder {folder.parent} does not exist", "create it first") from err
    except OSError as err:
        raise OutputError(folder, f"cannot be made ({err.strerror or err})", "choose another folder") from err


def _in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Whether a case belongs to a part; the same on every machine and for every order of the inputs."""
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    return number % shard[1] == shard[0] - 1


def _description(worker: Worker, *, cases: int, todo: int) -> dict[str, object]:
    """What the journal says of a run."""
    return {
        "medseg": medseg.__version__,
        "bundle": worker.bundle.name,
        "bundle_version": worker.bundle.version,
        "weights_sha256": worker.key.weights_sha256,
        "settings_sha256": worker.key.settings_sha256,
        "settings": asdict(worker.settings),
        "cases": cases,
        "todo": todo,
    }


def _pool(worker: Worker, workers: Workers, todo: Sequence[Case], token: str) -> Pool | None:
    """The workers; None when this process is to do the work itself."""
    if workers.engine == "local" and (workers.count or 1) == 1:
        worker.load()  # a network that cannot be loaded fails here, not once for each case
        return None
    bundles, weights = worker.bundle.source()
    factory = functools.partial(make_worker, bundles, worker.settings, worker.output, token, weights=weights)
    if workers.engine == "local":
        return ProcessPool(factory, min(workers.count or 1, len(todo)))
    from medseg.batch.ray import RayPool

    device = worker.settings.device.partition(":")[0]
    return RayPool(
        factory,
        address=workers.address,
        actors=workers.count,
        most=len(todo),
        cpus_per_actor=workers.cpus_per_actor,
        gpu=None if device == "auto" else device == "cuda",
    )
