"""What is still to do: which cases the journal vouches for, and which files are in the way."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medseg.batch.cases import Case, identity
from medseg.batch.fingerprint import unchanged
from medseg.batch.journal import Entry, History, Journal
from medseg.batch.worker import Key, Settings, labels_path
from medseg.errors import InputError, OutputError, UsageError
from medseg.io.files import sha256_of
from medseg.io.write import reserve
from medseg.report.outputs import outputs_beside

_TEMPORARY = re.compile(r"\.(.+)\.\d+\.(?:tmp|old)(\.nii\.gz|\.[^.]+)")
_OF_THE_SCAN = {InputError.exit_code, 4}


@dataclass
class Plan:
    """What a run has to do.

    Attributes:
        todo: cases to compute.
        earlier: lines of an earlier run that still hold: case name to the line (done or failed).
    """

    todo: list[Case] = field(default_factory=list)
    earlier: dict[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Planner:
    """Compares cases with what an earlier run left.

    Attributes:
        output: the batch's folder.
        journal: its journal.
        key: of the bundle and the settings.
        settings: what is asked of every case.
        overwrite: replace files that the journal does not vouch for.
        restart: compute everything again.
        retry_failed: also try those again whose scan or bundle was at fault.
    """

    output: Path
    journal: Journal
    key: Key
    settings: Settings
    overwrite: bool = False
    restart: bool = False
    retry_failed: bool = False

    def plan(self, cases: Sequence[Case], *, progress: Callable[[int, int], None] | None = None) -> Plan:
        """Sort the cases into those to do and those done before.

        Raises:
            OutputError: files are in the way that may not be replaced.
            UsageError: an output would replace an input.
        """
        plan = Plan()
        inputs = {identity(scan) for case in cases for scan in case.scans}
        blocked: list[tuple[Path, str]] = []
        for number, case in enumerate(cases):
            history = self.journal.cases.get(case.name)
            if history is not None and (entry := self._holds(case, history)):
                plan.earlier[case.name] = entry
            else:
                plan.todo.append(case)
                blocked += self._in_the_way(case, history, inputs)
            if progress is not None:
                progress(number + 1, len(cases))
        if blocked and not (self.overwrite or self.restart):
            path, reason = blocked[0]
            more = f" (and {len(blocked) - 1} more files)" if len(blocked) > 1 else ""
            raise OutputError(path, f"{reason}{more}", "use --overwrite to replace it, or another folder")
        return plan

    def _holds(self, case: Case, history: History) -> Entry | None:
        """The earlier line that makes computing the case needless."""
        entry = history.end
        if self.restart or entry is None or history.last is not entry or case.problem or entry.scan is None:
            return None
        if not self._same_key(entry):
            return None
        if entry.event == "failed":
            stands = entry.code in _OF_THE_SCAN and entry.forced == self.settings.force and not self.retry_failed
        else:
            stands = (self.settings.force or not entry.forced) and self._intact(case, entry)
        try:
            return entry if stands and unchanged(case.scans, entry.scan, entry.sha256) else None
        except InputError:
            return None

    def _same_key(self, entry: Entry) -> bool:
        return Key(entry.weights_sha256, entry.settings_sha256) == self.key

    def _intact(self, case: Case, entry: Entry) -> bool:
        folder = labels_path(self.output, case.name).parent
        return bool(entry.outputs) and all(
            _sha256(folder / file.name) == file.sha256 for file in entry.outputs.values()
        )

    def _in_the_way(
        self, case: Case, history: History | None, inputs: set[tuple[int, int] | str]
    ) -> list[tuple[Path, str]]:
        """Files that the case would replace and that are not its own, each with the reason."""
        places = outputs_beside(
            labels_path(self.output, case.name),
            probabilities=self.settings.probabilities,
            uncertainty=self.settings.uncertainty,
            evidence=self.settings.evidence,
            dicom_seg=self.settings.dicom_seg,
            rtstruct=self.settings.rtstruct,
        )
        found = []
        for kind, path in places.paths().items():
            if not os.path.lexists(path):
                continue
            if identity(path) in inputs:
                raise UsageError(path, "an output would replace this scan", "choose another folder")
            if path.is_dir() or (path.exists() and not path.is_file()):
                raise OutputError(path, "a folder, device or pipe of that name exists", "choose another folder")
            if reason := self._reason(history, kind, path):
                found.append((path, reason))
        return found

    def _reason(self, history: History | None, kind: str, path: Path) -> str:
        """Why a file may not be replaced; "" when it is an earlier run's own and nobody changed it since."""
        if history is None or (history.done is None and history.last.event == "failed"):
            return "exists and is not of an earlier run"
        if history.last.event in {"started", "interrupted"}:
            return ""  # that run was stopped while it wrote
        if history.done is None or kind not in history.done.outputs:
            return "exists and is not of an earlier run"
        if not self._same_key(history.done):
            return "was made with another bundle or other options"
        if _sha256(path) != history.done.outputs[kind].sha256:
            return "was changed since it was written"
        return ""


def make_folders(output: Path, cases: Sequence[Case]) -> None:
    """Create the subfolders of the outputs and remove what killed runs left in them.

    Raises:
        OutputError: a folder cannot be made or written.
    """
    for folder in sorted({labels_path(output, case.name).parent for case in cases} | {output}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            leftovers = [found for name in os.listdir(folder) if (found := _TEMPORARY.fullmatch(name))]  # noqa: PTH208
        except OSError as err:
            raise OutputError(folder, f"cannot be made ({err.strerror or err})", "choose another folder") from err
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(folder, "the folder cannot be written to", "choose another folder")
        for found in leftovers:
            reserve(folder / f"{found[1]}{found[2]}", overwrite=True)


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except InputError:
        return ""
