"""Failures with a known cause: one class for each exit code of the command line.

A message is one line: the subject (a file, a bundle), what is wrong, what to do.
"""

from __future__ import annotations

from pathlib import Path


class MedsegError(Exception):
    """A failure with a known cause.

    Args:
        subject: the file, bundle or option that the failure is about.
        problem: what was found, and what was expected.
        remedy: what the user can do; empty when nothing can be said.
    """

    exit_code = 1

    def __init__(self, subject: Path | str, problem: str, remedy: str = "") -> None:
        self.subject, self.problem, self.remedy = str(subject), problem, remedy
        text = f"{subject}: {problem}" + (f"; {remedy}" if remedy else "")
        super().__init__(" ".join(text.split("\n")))

    def __reduce__(self) -> tuple[type[MedsegError], tuple[str, str, str]]:
        """Keep the three parts when the error crosses a process border."""
        return type(self), (self.subject, self.problem, self.remedy)


class Interrupted(BaseException):
    """SIGINT or SIGTERM stopped the work; what was to be saved is saved.

    Not a KeyboardInterrupt, which the command line's library would swallow with an exit code of its own.

    Args:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.exit_code = 128 + number
        super().__init__(number)


class UsageError(MedsegError):
    """An option's value is out of range, or options contradict each other."""

    exit_code = 2


class InputError(MedsegError):
    """The scan is missing, damaged, unsupported or implausible."""

    exit_code = 3


class BundleError(MedsegError):
    """The bundle or its weights are missing, incomplete, damaged, untrusted or not made for this input."""

    exit_code = 4


class MemoryBudgetError(MedsegError):
    """The work does not fit into host or device memory, after all fallbacks."""

    exit_code = 5


class OutputError(MedsegError):
    """The output cannot be written: no folder, no permission, no space, or it exists."""

    exit_code = 6


class PartialError(MedsegError):
    """Some cases were done and some failed."""

    exit_code = 7


class DeviceError(MedsegError):
    """The requested device, or an optional package, is not there."""

    exit_code = 8
