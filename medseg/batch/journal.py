"""run.jsonl: what was done, one line a case, on disk before the next step; so a killed run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medseg.batch.fingerprint import Fingerprint
from medseg.errors import OutputError

NAME = "run.jsonl"

Event = Literal["started", "done", "failed", "interrupted"]


class OutputFile(BaseModel):
    """A file that was written."""

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str


class Entry(BaseModel):
    """One line: what became of a case. Files stand without their folders, and nothing of a header is kept.

    Attributes:
        event: started (its outputs may appear from now on), done, failed or interrupted.
        case: the case's name.
        time: UTC, ISO 8601.
        medseg: version.
        bundle: the bundle's name.
        weights_sha256: of the bundle's weights.
        settings_sha256: of the options and the bundle's configuration.
        scan: fingerprint of the case's files, None when they could not be read.
        sha256: of the files' bytes in the reader's order; "" when they were not read to the end.
        forced: done: an unsuitable scan was let through; failed: --force was given.
        outputs: kind to file.
        seconds: wall time of each stage.
        volumes_ml: label name to volume.
        warnings: as in the record.
        quality: score and predicted_dice, where uncertainty was asked for.
        named: the patient's class, of a bundle that diagnoses.
        code: exit code of the failure.
        message: the failure in one line.
    """

    model_config = ConfigDict(frozen=True)

    event: Event
    case: str
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    medseg: str = ""
    bundle: str = ""
    weights_sha256: str = ""
    settings_sha256: str = ""
    scan: Fingerprint | None = None
    sha256: str = ""
    forced: bool = False
    outputs: dict[str, OutputFile] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    volumes_ml: dict[str, float] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    quality: dict[str, float] = Field(default_factory=dict)
    named: str = ""
    code: int = 0
    message: str = ""


@dataclass(slots=True)
class History:
    """What a journal knows of a case.

    Attributes:
        last: the last line.
        end: the last line that says done or failed.
        done: the last line that says done.
    """

    last: Entry
    end: Entry | None = None
    done: Entry | None = None


@dataclass
class Journal:
    """The journal of a folder; its lock is held by the caller.

    Attributes:
        path: the file, which appears with the first line.
        cases: what it says of each case.
    """

    path: Path
    cases: dict[str, History] = field(default_factory=dict)
    _handle: int = field(default=-1, repr=False)

    @classmethod
    def read(cls, folder: Path) -> Journal:
        """Read the journal of a folder, if it has one; a last line that was torn by a kill does not count.

        Raises:
            OutputError: it cannot be read, or another line is damaged.
        """
        journal = cls(folder / NAME)
        try:
            lines = journal.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return journal
        except OSError as err:
            raise OutputError(journal.path, f"cannot be read ({err.strerror or err})", "check the disk") from err
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn
            try:
                content = json.loads(line)
                if content["event"] != "run":
                    journal._note(Entry.model_validate(content))
            except (ValueError, KeyError, TypeError, ValidationError) as err:
                raise OutputError(
                    journal.path,
                    f"line {number} is not one of a batch's journal",
                    "move it away, or choose another folder",
                ) from err
        return journal

    def begin(self, description: Mapping[str, Any]) -> None:
        """Open for writing, cut off a torn line, and write a line that describes this run.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            content = self.path.read_bytes()
            os.ftruncate(self._handle, content.rfind(b"\n") + 1)
        except OSError as err:
            raise OutputError(self.path, f"cannot be written ({err.strerror or err})", "check the folder") from err
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(json.dumps({"event": "run", "time": time, "pid": os.getpid(), **description}))

    def append(self, entry: Entry) -> None:
        """Write a line; it is on disk when this returns.

        Raises:
            OutputError: it cannot be written. The line then is not there, not even in part.
        """
        known = entry.model_dump(mode="json", exclude_defaults=True)
        self._write(json.dumps({"event": entry.event, "case": entry.case, "time": entry.time, **known}))
        self._note(entry)

    def close(self) -> None:
        """Close the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _write(self, text: str) -> None:
        line = text.encode() + b"\n"
        before = os.fstat(self._handle).st_size
        try:
            # One call: a signal's handler runs before it or after it, never between two halves of a line.
            written = os.write(self._handle, line)
            if written == len(line):
                os.fsync(self._handle)
                return
            problem = "no space left on the disk"
        except OSError as err:
            problem = f"cannot be written ({err.strerror or err})"
        os.ftruncate(self._handle, before)
        raise OutputError(self.path, problem, "make room, then run it again: it goes on where it stopped")

    def _note(self, entry: Entry) -> None:
        known = self.cases.get(entry.case)
        history = History(entry, known.end if known else None, known.done if known else None)
        if entry.event in {"done", "failed"}:
            history.end = entry
        if entry.event == "done":
            history.done = entry
        self.cases[entry.case] = history
