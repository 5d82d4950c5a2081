"""What became of a batch: a row for each case, as CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

import medseg
from medseg.batch.cases import Case
from medseg.batch.journal import Entry
from medseg.errors import (
    BundleError,
    DeviceError,
    InputError,
    MedsegError,
    MemoryBudgetError,
    OutputError,
    PartialError,
    UsageError,
)
from medseg.inference.record import DISCLAIMER
from medseg.io.write import OutputSet, Target

NAMES = ("summary.csv", "summary.json")

_QUALITY = ("score", "predicted_dice")

Status = Literal["done", "failed", "interrupted", "waiting"]

_ERRORS = {
    kind.exit_code: kind
    for kind in (MedsegError, UsageError, InputError, BundleError, MemoryBudgetError, OutputError, DeviceError)
}


class CaseSummary(BaseModel):
    """One case.

    Attributes:
        case: name.
        status: done, failed, interrupted, or waiting when the run was stopped before it.
        earlier: whether an earlier run computed it, and this one left it as it was.
        seconds: time spent on it, None when unknown.
        volumes_ml: label name to volume.
        quality: score and predicted_dice, where uncertainty was asked for.
        named: the patient's class, of a bundle that diagnoses.
        warnings: as in the case's record.
        code: exit code of the failure, 0 when there is none.
        message: the failure in one line.
        outputs: kind to path, relative to the batch's folder.
    """

    model_config = ConfigDict(frozen=True)

    case: str
    status: Status
    earlier: bool = False
    seconds: float | None = None
    volumes_ml: dict[str, float] = Field(default_factory=dict)
    quality: dict[str, float] = Field(default_factory=dict)
    named: str = ""
    warnings: tuple[str, ...] = ()
    code: int = 0
    message: str = ""
    outputs: dict[str, str] = Field(default_factory=dict)


class Summary(BaseModel):
    """A batch.

    Attributes:
        output: the batch's folder; not written to the files, which may move.
        bundle: name of the bundle.
        labels: names of its labels, background left out.
        counts: status to number of cases.
        earlier: how many of them stood since an earlier run.
        seconds: wall time of this run.
        cases: in the order of the inputs.
        notes: what was left out of the inputs.
    """

    model_config = ConfigDict(frozen=True)

    output: Path = Field(exclude=True)
    medseg: str = medseg.__version__
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    disclaimer: str = DISCLAIMER
    bundle: str
    labels: tuple[str, ...]
    counts: dict[str, int]
    earlier: int
    seconds: float
    cases: tuple[CaseSummary, ...]
    notes: tuple[str, ...] = ()

    def error(self) -> MedsegError | None:
        """What the command line ends with: None when every case is done."""
        failed = [case for case in self.cases if case.status == "failed"]
        if not failed:
            return None
        if len(self.cases) == 1:
            return _ERRORS.get(failed[0].code, MedsegError)(failed[0].case, failed[0].message)
        codes = {case.code for case in failed}
        problem = f"{len(failed)} of {len(self.cases)} cases failed"
        remedy = f"see {self.output / NAMES[0]}"
        if len(failed) < len(self.cases):
            return PartialError(self.output, problem, remedy)
        kind = _ERRORS.get(codes.pop(), MedsegError) if len(codes) == 1 else InputError
        return kind(self.output, problem, remedy)

    def to_csv(self) -> str:
        """A row for each case: status, code, seconds, volumes in ml, score, predicted Dice, warnings, message."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        volumes = [f"{name}_ml" for name in self.labels]
        quality = [name for name in _QUALITY if any(name in case.quality for case in self.cases)]
        diagnosed = ["class"] if any(case.named for case in self.cases) else []
        columns = ["case", "status", "earlier", "code", "seconds", *diagnosed, *volumes, *quality]
        writer.writerow([*columns, "warnings", "message", "labels_file"])
        for case in self.cases:
            writer.writerow(
                [case.case, case.status, "yes" if case.earlier else "no", case.code]
                + ["" if case.seconds is None else f"{case.seconds:.3f}"]
                + ([case.named] if diagnosed else [])
                + [case.volumes_ml.get(name, "") for name in self.labels]
                + [case.quality.get(name, "") for name in quality]
                + ["; ".join(case.warnings), case.message, case.outputs.get("labels", "")]
            )
        return text.getvalue()

    def write(self) -> None:
        """Write summary.csv and summary.json into the batch's folder, both or none.

        Raises:
            OutputError: they cannot be written.
        """
        texts = (self.to_csv(), self.model_dump_json(indent=2) + "\n")
        with OutputSet() as files:
            for name, text in zip(NAMES, texts, strict=True):
                files.add_bytes(Target(self.output / name, overwrite=True), text.encode("utf-8", "surrogateescape"))


def summarize(
    cases: Sequence[Case],
    entries: Mapping[str, Entry],
    earlier: Mapping[str, Entry],
    *,
    output: Path,
    bundle: str,
    labels: Sequence[str],
    seconds: float,
    notes: Sequence[str],
    disclaimer: str = DISCLAIMER,
) -> Summary:
    """Make the summary.

    Args:
        cases: all cases of the batch.
        entries: journal lines of this run, by case.
        earlier: journal lines of an earlier run that still hold, by case.
        output: the batch's folder.
        bundle: its name.
        labels: names of the bundle's labels, background left out.
        seconds: wall time of this run.
        notes: what was left out of the inputs.
        disclaimer: what the bundle's results say of themselves.
    """
    rows = [_row(case, entries.get(case.name), earlier.get(case.name)) for case in cases]
    return Summary(
        output=output,
        disclaimer=disclaimer,
        bundle=bundle,
        labels=tuple(labels),
        counts=dict(Counter(row.status for row in rows)),
        earlier=sum(row.earlier for row in rows),
        seconds=round(seconds, 3),
        cases=tuple(rows),
        notes=tuple(notes),
    )


def _row(case: Case, now: Entry | None, before: Entry | None) -> CaseSummary:
    entry = now or before
    if entry is None or entry.event == "started":
        return CaseSummary(case=case.name, status="waiting")
    folder = Path(case.name).parent
    return CaseSummary(
        case=case.name,
        status=entry.event,
        earlier=now is None,
        seconds=round(sum(entry.seconds.values()), 3) if entry.seconds else None,
        volumes_ml=entry.volumes_ml,
        quality=entry.quality,
        named=entry.named,
        warnings=entry.warnings,
        code=entry.code,
        message=entry.message,
        outputs={kind: (folder / file.name).as_posix() for kind, file in entry.outputs.items()},
    )
