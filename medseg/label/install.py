"""``medseg label install``: MONAI Label beside medseg, in the environment that medseg runs in.

The engine runs inside the server, so that both need one environment: another one would hold a second copy of torch.
MONAI Label 0.8.5 as it is declared would bring numpy 1 and its own torch; so its packages come from the extra
``label`` of medseg, everything that is installed already is held at its version, and MONAI Label itself comes alone.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import DeviceError
from medseg.label.serve import stand_ins

PACKAGE = "monailabel==0.8.5"
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
_CONSTRAINTS = "constraints.txt"
_TRIED = (3, 11)
_OFFLINE = ("NewConnectionError", "name resolution", "Failed to establish", "ConnectTimeout", "No route to host")
_CONFLICT = ("ResolutionImpossible", "conflicting dependencies")
_STALE = "does not provide the extra"


@dataclass(frozen=True)
class Step:
    """A command of the installation and what it is for."""

    title: str
    command: tuple[str, ...]


def steps(constraints: Path = Path(_CONSTRAINTS)) -> tuple[Step, ...]:
    """The commands, in order.

    Args:
        constraints: file that holds what is installed, one name==version a line.
    """
    install = (*_PIP, "install", "--retries", "1")
    return (
        Step("packages of the server", (*install, "--constraint", str(constraints), "medseg[label]")),
        Step("MONAI Label", (*install, "--no-deps", PACKAGE)),
        Step("does it import", (sys.executable, "-c", "import medseg.label.server")),
    )


def listing() -> tuple[str, ...]:
    """The command that lists what is installed, as constraints."""
    return (*_PIP, "list", "--format", "freeze")


def script() -> str:
    """The installation as lines for a shell."""
    first, *rest = (shlex.join(step.command) for step in steps())
    path = os.pathsep.join(stand_ins())
    rest[-1] = f"PYTHONPATH={shlex.quote(path)} {rest[-1]}"
    return "\n".join([f"{shlex.join(listing())} > {_CONSTRAINTS}", first, *rest])


def install(environment: Mapping[str, str], report: Callable[[str], None]) -> None:
    """Install what is missing; nothing that is installed changes its version.

    Args:
        environment: variables of pip's processes.
        report: told each line.

    Raises:
        DeviceError: pip is not there, cannot reach the package index, or something cannot be installed.
    """
    if sys.version_info[:2] != _TRIED:
        report(f"note: MONAI Label 0.8.5 was tried with Python {_TRIED[0]}.{_TRIED[1]} only")
    with tempfile.TemporaryDirectory(prefix="medseg-label-") as folder:
        constraints = Path(folder) / _CONSTRAINTS
        code, held = _lines(listing(), environment, lambda _line: None)
        if code:
            raise DeviceError("pip", "does not run in this environment", f"{sys.executable} -m ensurepip")
        constraints.write_text("\n".join(line for line in held if "==" in line) + "\n", encoding="utf-8")
        todo = steps(constraints)
        for number, step in enumerate(todo, start=1):
            report(f"{number}/{len(todo)} {step.title}")
            path = os.pathsep.join([*stand_ins(), *filter(None, [environment.get("PYTHONPATH")])])
            code, said = _lines(step.command, {**environment, "PYTHONPATH": path}, _changes(report))
            if any(_STALE in line for line in said):
                raise DeviceError("medseg", "was installed before it had the extra label", "pip install it again")
            if code:
                raise _failure(step, said)


def _changes(report: Callable[[str], None]) -> Callable[[str], None]:
    """Passes on what pip does, and not the long list of what is there already."""

    def tell(line: str) -> None:
        if not line.startswith("Requirement already satisfied"):
            report(f"    {line}")

    return tell


def _lines(
    command: Sequence[str], environment: Mapping[str, str], tell: Callable[[str], None]
) -> tuple[int, list[str]]:
    """Exit code and lines of a command; it ends with this process."""
    found = []
    with subprocess.Popen(  # noqa: S603
        command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout or ():
                found.append(line.rstrip())
                tell(found[-1])
        except BaseException:
            process.kill()
            raise
    return process.returncode, found


def _failure(step: Step, said: Sequence[str]) -> DeviceError:
    text = "\n".join(said)
    last = next((line for line in reversed(said) if line.strip()), "no reason given")
    if any(word in text for word in _OFFLINE):
        return DeviceError(
            step.title, "the package index cannot be reached", "connect to the network, or set PIP_INDEX_URL"
        )
    if any(word in text for word in _CONFLICT):
        problem = "would change a package that is installed, and nothing installed is changed"
        return DeviceError(step.title, problem, "install medseg into a fresh environment and run this there")
    return DeviceError(step.title, f"failed ({last.strip()})", "see the lines above, or --dry-run for the commands")
