"""``medseg batch``."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medseg.bundles.locate import DEFAULT_BUNDLE
from medseg.cli.options import (
    AssignUids,
    Backend,
    Bundles,
    Device,
    Flips,
    Metadata,
    Overlap,
    Precision,
    Register,
    Trust,
    Weights,
)
from medseg.errors import UsageError

if TYPE_CHECKING:
    from medseg.batch.cases import Case, Found
    from medseg.batch.journal import Entry
    from medseg.batch.plan import Plan
    from medseg.batch.summary import Summary

_ROWS = 40


def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help='Folder, pattern in quotes ("data/*/ct.nii.gz"), volume, DICOM folder, or CSV manifest.',
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results; made if it is not there.")],
    *,
    bundle: Bundles = None,
    weight: Weights = None,
    device: Device = "auto",
    backend: Backend = "auto",
    precision: Precision = "auto",
    overlap: Overlap = None,
    tta: Flips = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the probability of each class.")
    ] = False,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Also write how sure each voxel is, and score each case.")
    ] = False,
    trust: Trust = False,
    metadata: Metadata = None,
    register: Register = False,
    evidence: Annotated[
        bool,
        typer.Option("--evidence", help="Also write where the class named sees its evidence: bundles that diagnose."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on with scans that are not what the bundle was trained on.")
    ] = False,
    fix_gantry_tilt: Annotated[
        bool, typer.Option("--fix-gantry-tilt", help="Resample DICOM series of a tilted gantry to right angles.")
    ] = False,
    series: Annotated[
        str | None,
        typer.Option(help="Of DICOM cases with several series: the number in the list of medseg inspect, or largest."),
    ] = None,
    assign_uids: AssignUids = False,
    dicom_seg: Annotated[
        bool, typer.Option("--dicom-seg", help="Also write a DICOM Segmentation of each DICOM scan, CASE_seg.dcm.")
    ] = False,
    rtstruct: Annotated[
        bool, typer.Option("--rtstruct", help="Also write a DICOM RT Structure Set, CASE_seg_rtstruct.dcm.")
    ] = False,
    recursive: Annotated[bool, typer.Option("-r", "--recursive", help="Also search subfolders.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine's CPUs, or actors on a Ray cluster.")
    ] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="This machine, or a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster: auto, HOST:PORT; without it, one is started here.")
    ] = None,
    cpus_per_actor: Annotated[int, typer.Option(min=1, help="Cores of each Ray actor.")] = 4,
    shard: Annotated[
        str | None, typer.Option(help="I/N: the I-th of N parts only, e.g. of a job array; each its own folder.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try those again that failed because of their scan.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files in the way that no run in this folder has made.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Compute every case again.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout, and only that.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Segment many scans; a run that was stopped or killed goes on when it is started again.

    Writes CASE_seg.nii.gz, CASE_seg.json and CASE_seg.png for each case, and run.jsonl, summary.csv and
    summary.json for all. A case that fails does not stop the others.

    To try:

    - medseg batch imagesTs/ -o results
    - medseg batch "study/*/ct.nii.gz" -o results --workers 4
    - medseg batch studies/ -o results --dicom-seg
    - medseg batch cases.csv -o /shared/results --engine ray --address auto

    Exit codes: 0 all done, 7 some failed, else as medseg infer; 130 and 143 stopped by a signal.
    """
    from medseg.batch.run import Workers, run_batch
    from medseg.batch.worker import Settings

    if trust:
        print("warning: --trust: code that comes with the bundle may run", file=sys.stderr)
    # What a library prints must not come before the JSON.
    with contextlib.redirect_stdout(sys.stderr), _Display(quiet=quiet or json_) as display:
        summary = run_batch(
            inputs,
            output,
            bundle=bundle or DEFAULT_BUNDLE,
            weights=weight,
            settings=Settings(
                device,
                overlap,
                tta,
                probabilities,
                force,
                uncertainty,
                fix_gantry_tilt,
                dicom_seg,
                rtstruct,
                backend,
                precision,
                trust,
                series,
                assign_uids,
                metadata=None if metadata is None else str(metadata.absolute()),
                align=register,
                evidence=evidence,
            ),
            workers=Workers(engine, workers, address, cpus_per_actor),
            recursive=recursive,
            shard=_shard(shard),
            overwrite=overwrite,
            restart=restart,
            retry_failed=retry_failed,
            listener=display,
        )
    if json_:
        print(summary.model_dump_json(indent=2))
    elif not quiet:
        _print(summary)
    if (error := summary.error()) is not None:
        raise error


def _shard(text: str | None) -> tuple[int, int] | None:
    """Number and count of parts from ``3/16``."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError("--shard", f"{text!r} is not a part", "e.g. 3/16 is the third of 16")
    return int(found[1]), int(found[2])


def _print(summary: Summary) -> None:
    """Print a row for each case, the failed ones first when there are too many, and the counts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cases = sorted(summary.cases, key=lambda case: case.status == "done")
    shown = summary.cases if len(cases) <= _ROWS else cases[:_ROWS]
    few = len(summary.labels) <= 4
    diagnosed = any(case.named for case in summary.cases)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("case", overflow="fold")
    table.add_column("status")
    table.add_column("s", justify="right")
    if diagnosed:
        table.add_column("class")
    for name in summary.labels if few else ("labels found",):
        table.add_column(f"{name} ml" if few else name, justify="right")
    table.add_column("remarks", overflow="fold")
    for case in shown:
        found = case.volumes_ml.values()
        cells = [f"{case.volumes_ml[name]:.2f}" if name in case.volumes_ml else "" for name in summary.labels]
        if not few:
            cells = [f"{sum(volume > 0 for volume in found)} of {len(summary.labels)}" if found else ""]
        seconds = "" if case.seconds is None else f"{case.seconds:.1f}"
        status = f"{case.status}, earlier" if case.earlier else case.status
        remarks = case.message or "; ".join(case.warnings)
        named = [case.named] if diagnosed else []
        table.add_row(*(Text(cell) for cell in (case.case, status, seconds, *named, *cells, remarks)))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(80, Console(width=10_000).measure(table).maximum))
    console.print(table)
    if len(cases) > len(shown):
        print(f"... {len(cases) - len(shown)} more in summary.csv")
    counts = ", ".join(f"{count} {status}" for status, count in sorted(summary.counts.items()))
    earlier = f" ({summary.earlier} of them earlier)" if summary.earlier else ""
    print(f"{counts}{earlier}; {summary.bundle}, {summary.seconds:.1f} s. {summary.disclaimer}")
    print(f"  {summary.output / 'summary.csv'}")


class _Display:
    """Progress on stderr: a bar on a terminal, a line for each case in a file or a pipe."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, left="")
        self._todo = self._done = 0
        self._begin = time.monotonic()

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def checked(self, done: int, total: int) -> None:
        """Cases are compared with the journal."""
        self._bar.update(self._task, completed=done, total=total, description="checking what is done")

    def planned(self, found: Found, plan: Plan) -> None:
        """The work begins."""
        self._todo, self._begin = len(plan.todo), time.monotonic()
        self._bar.update(self._task, completed=0, total=self._todo, description="loading")
        for note in found.notes:
            self._line(f"note: {note}")
        failed = sum(entry.event == "failed" for entry in plan.earlier.values())
        done = len(plan.earlier) - failed
        before = f", {done} done earlier" if done else ""
        before += f", {failed} failed earlier and not tried again (--retry-failed does)" if failed else ""
        self._line(f"{len(found.cases)} case{'s' if len(found.cases) != 1 else ''}{before}")

    def stage(self, case: Case, stage: str, done: int, total: int) -> None:
        """A case goes on."""
        share = f" {done}/{total}" if total > 1 else ""
        self._bar.update(self._task, description=f"{case.name}: {stage}{share}")

    def ended(self, case: Case, entry: Entry) -> None:
        """A case has ended."""
        self._done += 1
        if self._done == 1:  # what it took to load the model says nothing about the cases
            self._begin = max(self._begin, time.monotonic() - sum(entry.seconds.values()))
        left = self._left()
        self._bar.update(self._task, completed=self._done, left=left)
        place = f"[{self._done}/{self._todo}] {case.name}"
        if entry.event == "failed":
            self._line(f"{place}: failed, code {entry.code}: {entry.message}")
        elif not self._console.is_terminal:
            seconds = f" in {sum(entry.seconds.values()):.1f} s" if entry.seconds else ""
            self._line(f"{place}: {entry.event}{seconds}{left and f'; {left}'}")

    def _left(self) -> str:
        """Time to the end, from the mean so far."""
        if not 0 < self._done < self._todo:
            return ""
        seconds = round((time.monotonic() - self._begin) / self._done * (self._todo - self._done))
        hours, minutes = seconds // 3600, seconds % 3600 // 60
        if hours:
            return f"about {hours} h {minutes:02} min left"
        return f"about {minutes} min {seconds % 60:02} s left" if minutes else f"about {seconds} s left"

    def _line(self, text: str) -> None:
        """Print a line above the bar, or to the file."""
        if self._quiet:
            return
        if self._console.is_terminal:
            self._console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)
