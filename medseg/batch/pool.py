"""Sharing cases out to workers that may die."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from medseg.batch.cases import Case
from medseg.batch.journal import Entry
from medseg.batch.local import OnStart
from medseg.batch.worker import MEMORY, OnEntry
from medseg.errors import Interrupted

_DIED = "the worker process died, most likely for lack of memory; use a machine with more memory, or fewer workers"


class Pool(Protocol):
    """Workers, each with the model in memory.

    Attributes:
        slots: how many there are.
        depth: how many cases a worker may hold.
    """

    slots: int
    depth: int

    def ready(self, slot: int) -> bool:
        """Whether a worker takes cases."""

    def submit(self, slot: int, case: Case) -> None:
        """Give a case to a worker."""

    def wait(self) -> list[tuple[int, Entry | None]]:
        """Lines of cases that ended; None for a worker that died with what it held, and was replaced."""

    def close(self, *, interrupted: bool = False) -> list[Entry]:
        """End the workers; the lines of cases that ended in the meantime."""


def drive(pool: Pool, cases: Sequence[Case], *, on_start: OnStart, on_entry: OnEntry) -> None:
    """Compute cases on a pool, which is closed in the end.

    A case whose worker died, or that did not fit into memory, is tried once more when all others are done, and
    then as the only one.

    Raises:
        Interrupted: a signal came; what was being written is complete.
    """
    waiting, alone = deque(cases), deque[Case]()
    held: list[list[Case]] = [[] for _ in range(pool.slots)]
    try:
        while waiting or any(held):
            for depth in range(1, pool.depth + 1):  # every worker gets its first case before one gets its second
                for slot, mine in enumerate(held):
                    if waiting and len(mine) < depth and pool.ready(slot):
                        mine.append(waiting.popleft())
                        on_start(mine[-1])
                        pool.submit(slot, mine[-1])
            for slot, entry in pool.wait():
                if entry is None:
                    alone += held[slot]
                    held[slot] = []
                elif (case := _taken(held[slot], entry)) is not None:
                    if entry.code == MEMORY:
                        alone.append(case)
                    else:
                        on_entry(case, entry)
        while alone:
            while (free := next((slot for slot in range(pool.slots) if pool.ready(slot)), None)) is None:
                pool.wait()
            case = alone.popleft()
            held[free].append(case)
            pool.submit(free, case)
            while held[free]:
                for slot, entry in pool.wait():
                    if slot == free and entry is None:
                        held[free] = []
                        on_entry(case, Entry(event="failed", case=case.name, code=MEMORY, message=_DIED))
                    elif entry is not None and _taken(held[free], entry):
                        on_entry(case, entry)
    except Interrupted:
        for entry in pool.close(interrupted=True):
            for mine in held:
                if case := _taken(mine, entry):
                    on_entry(case, entry)
        for case in [case for mine in held for case in mine]:
            on_entry(case, Entry(event="interrupted", case=case.name))
        raise
    except BaseException:
        pool.close(interrupted=True)
        raise
    pool.close()


def _taken(held: list[Case], entry: Entry) -> Case | None:
    """The case that a line is about, taken off those that its worker holds."""
    for place, case in enumerate(held):
        if case.name == entry.case:
            return held.pop(place)
    return None
