"""``medseg data``: public data sets made ready, and any data set checked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.errors import InputError

if TYPE_CHECKING:
    from medseg.datasets.check import Findings

app = typer.Typer(help="Data sets: list public ones, make their folders, check any.", no_args_is_help=True)

_NAMED = 20


@app.callback()
def group() -> None:
    """Data sets: list public ones, make their folders, check any."""


@app.command("list")
def list_(
    *,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
) -> None:
    """The public data sets that medseg can make ready, with site, licence, split and the bundles they are for.

    Example: medseg data list

    Exit codes: 0 listed.
    """
    from medseg.datasets import registry

    known = [registry.about(name) for name in registry.names()]
    if json_:
        print(json.dumps([asdict(about) for about in known], indent=2))
        return
    for about in known:
        print(f"{about.name}: {about.title}")
        rows = {"cases": f"{about.cases}, {about.modality}", "site": about.site, "licence": about.licence}
        rows |= {"size": about.size, "split": about.split, "bundles": ", ".join(about.bundles)}
        for row, text in rows.items():
            if text:
                print(f"  {row:<8} {text}")


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A data set of medseg data list.")],
    source: Annotated[Path, typer.Argument(help="What its site hands out: zip, tar, tar.gz or folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make; a second run completes it.")],
    *,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")] = False,
) -> None:
    """Make a folder that medseg train reads from a public data set as it was downloaded.

    Every case is checked: files, grids, label values. A run that was stopped or killed goes on where it was.

    Example: medseg data prepare synapse RawData.zip -o data/synapse

    Exit codes: 0 done, 2 usage, 3 source, 6 output, 7 some cases failed, each is named; 130 and 143
    stopped by a signal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from medseg.datasets.prepare import prepare as make

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        done = make(
            name,
            source,
            output,
            progress=lambda count, total, case: bar.update(task, completed=count, total=total, description=case),
        )
    _warn(done.warnings)
    if not quiet:
        earlier = f", {done.kept} were there" if done.kept else ""
        parts = ", ".join(f"{count} {part}" for part, count in done.parts.items())
        print(f"{done.root}: {done.title}, {done.made} cases made{earlier}; split.json: {parts or 'none published'}")
        split = f" --split {done.root / 'split.json'}" if parts else ""
        print(f"next: medseg train --data {done.root}{split} -o RUN")


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="Folder in MSD or nnU-Net raw layout.")],
    *,
    split: Annotated[Path | None, typer.Option(help="Split file whose case names are looked up too.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")] = False,
) -> None:
    """Read every case of a data set: what is in it, and what would keep it from being trained on.

    Example: medseg data check Task04_Hippocampus

    Exit codes: 0 fit for training, 3 problems, the first is named.
    """
    from rich.console import Console
    from rich.progress import Progress

    from medseg.datasets.check import check_dataset

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        found = check_dataset(
            data, split=split, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if json_:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print(found)
    _warn(found.warnings)
    if found.problems:
        for line in found.problems[1:_NAMED]:
            typer.echo(f"warning: {line}", err=True)
        raise InputError(data, f"{len(found.problems)} problems, the first: {found.problems[0]}", "repair the data set")


def _warn(lines: list[str]) -> None:
    for line in lines[:_NAMED]:
        typer.echo(f"warning: {line}", err=True)
    if len(lines) > _NAMED:
        typer.echo(f"warning: and {len(lines) - _NAMED} more of the kind", err=True)


def _print(found: Findings) -> None:
    print(f"{found.name}: {found.cases} cases, channels {', '.join(found.channels)}")
    if found.spacing[0]:
        low, high = ([f"{value:g}" for value in bound] for bound in found.spacing)
        print(f"voxels  {' x '.join(low)} to {' x '.join(high)} mm")
        low, high = ([str(value) for value in bound] for bound in found.shape)
        print(f"size    {' x '.join(low)} to {' x '.join(high)} voxels")
    print("label   in cases   mean ml")
    for value, count in found.cases_with.items():
        print(f"{value:>5}   {count:>8}   {found.volume_ml.get(value, 0.0):>7.4g}   {found.labels[value]}")
    if found.ignored:
        print(f"voxels to be ignored in {found.ignored} cases")
