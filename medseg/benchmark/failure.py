"""A failure that crossed a process border as a line and an exit code."""

from __future__ import annotations

from medseg.errors import (
    BundleError,
    DeviceError,
    InputError,
    MedsegError,
    MemoryBudgetError,
    OutputError,
    UsageError,
)

_KINDS: dict[int, type[MedsegError]] = {
    kind.exit_code: kind for kind in (UsageError, InputError, BundleError, MemoryBudgetError, OutputError, DeviceError)
}


def error_of(text: str, exit_code: int) -> MedsegError:
    """The failure as it would be raised in this process; its text is the same."""
    subject, _, rest = text.partition(": ")
    problem, _, remedy = rest.partition("; ")
    return _KINDS.get(exit_code, MedsegError)(subject, problem, remedy)


def last_line(text: str) -> str:
    """What a process that died said last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no word of why"
