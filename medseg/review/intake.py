"""Folders that become cases: imported beside the page, so that it answers at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg.batch.journal import NAME as JOURNAL
from medseg.errors import InputError, MedsegError
from medseg.review.store.models import User
from medseg.review.store.repo import Store
from medseg.review.worklist import Import, import_batch, import_folder

log = logging.getLogger(__name__)

SUBJECT = "medseg:import"
"""`User.subject` under which the audit trail lists what was imported at the start."""


@dataclass(frozen=True)
class Progress:
    """What an import has come to.

    Attributes:
        running: whether it is still at work.
        problems: what was left out, one sentence each.
    """

    running: bool
    problems: tuple[str, ...]


class Intake:
    """Imports the scans of some folders, in a thread.

    Args:
        store: the store.
        folders: with scans, or with the output of `medseg batch`, whose scans are looked for in the other folders.
    """

    def __init__(self, store: Store, folders: Sequence[Path]) -> None:
        self._store, self._folders = store, tuple(dict.fromkeys(folder.absolute() for folder in folders))
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._problems: tuple[str, ...] = ()

    def start(self) -> None:
        """Look for new scans; nothing happens while an import is at work."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._thread = threading.Thread(target=self._work, name="medseg-intake", daemon=True)
            self._thread.start()

    def progress(self) -> Progress:
        """How far it is."""
        with self._lock:
            thread = self._thread
        return Progress(thread is not None and thread.is_alive(), self._problems)

    def wait(self) -> None:
        """Until the import that is at work has ended."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        by = self._store.sign_in(SUBJECT, "medseg import")
        problems: list[str] = []
        # Batches first: their cases then have their results, and the folders of their scans are known already.
        for folder in sorted(self._folders, key=lambda one: not (one / JOURNAL).is_file()):
            try:
                found = self._import(folder, by)
            except MedsegError as error:
                problems.append(f"{folder.name}: {error.problem}")
            except Exception as error:
                log.debug("import failed", exc_info=True)
                problems.append(f"{folder.name}: internal error ({type(error).__name__}); please report it")
            else:
                problems += found.problems
            self._problems = tuple(problems)

    def _import(self, folder: Path, by: User) -> Import:
        if (folder / JOURNAL).is_file():
            others = [one for one in self._folders if one != folder and one.is_dir()] or [folder]
            return import_batch(self._store, folder, others, by=by)
        try:
            return import_folder(self._store, folder, by=by)
        except InputError:
            if folder == self._store.folder:  # the data folder may hold scans, and need not
                return Import((), 0, ())
            raise
