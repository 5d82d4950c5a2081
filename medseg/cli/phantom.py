"""``medseg phantom``: synthetic patients with known truth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.errors import UsageError

if TYPE_CHECKING:
    from medseg.phantom.pancreas import Options

app = typer.Typer(
    help="Phantoms: synthetic patients with known truth. Synthetic data, not for clinical use.", no_args_is_help=True
)


@app.callback()
def _group() -> None:
    """Keeps the name of the only command."""


@app.command()
def pancreas(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the data set; a second run adds to it.")],
    *,
    cases: Annotated[int, typer.Option(min=1, max=100_000, help="Number of patients; the nine classes take turns.")],
    seed: Annotated[int, typer.Option(min=0, help="Patient i of a seed is the same whatever --cases is.")] = 0,
    split: Annotated[
        str, typer.Option(help="Cases of the parts train, val, test for split.json, e.g. 360,90,270.")
    ] = "",
    look_alikes: Annotated[
        bool,
        typer.Option("--look-alikes/--no-look-alikes", help="Some types look like others, as in docs/pancreas.md."),
    ] = True,
    hard: Annotated[bool, typer.Option("--hard", help="Lesions up to 40 % smaller in radius.")] = False,
    noise_scale: Annotated[float, typer.Option(min=0.0, max=10.0, help="Noise; 1 is 17 HU.")] = 1.0,
    motion_scale: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="Shift between the phases; 1 is 1.5 mm along each axis.")
    ] = 1.0,
    abdomen: Annotated[
        bool, typer.Option("--abdomen", help="The whole abdomen at 2 mm, not the region of the pancreas at 3 mm.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that make cases.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")] = False,
) -> None:
    """Make three-phase CT of synthetic patients with lesions of the pancreas. Synthetic data, not for clinical use.

    The folder is a data set for medseg train, with patients.csv (age, sex, class), truth/ and a picture of one patient
    of each class. The same seed gives the same files; a run that was stopped goes on where it was.

    Example: medseg phantom pancreas --cases 720 --split 360,90,270 -o phantom

    Exit codes: 0 done, 2 usage, 6 output.
    """
    from rich.console import Console
    from rich.progress import Progress

    from medseg.phantom import SYNTHETIC
    from medseg.phantom.dataset import write_dataset
    from medseg.phantom.pancreas import Options
    from medseg.phantom.patients import CODES, ceilings

    options = Options(look_alikes, hard, noise_scale, motion_scale, abdomen)
    parts = _parts(split, cases)
    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("phantoms", total=cases)
        made = write_dataset(
            output,
            cases,
            seed,
            options,
            split=parts,
            workers=workers,
            progress=lambda done, _all: bar.update(task, completed=done),
        )
    if made:
        _write_preview(output / "preview.png", min(cases, len(CODES)), seed, options)
    if not quiet:
        best = ceilings(lookalikes=look_alikes)
        print(f"{output}: {cases} cases, {made} made now; {SYNTHETIC}")
        print(
            f"highest accuracy that any reader can reach: {best.look:.3f} from the picture, "
            f"{best.look_age_sex:.3f} with age and sex, {best.age_sex:.3f} from age and sex alone"
        )


def _parts(text: str, cases: int) -> list[tuple[str, int]]:
    if not text:
        return []
    names = ("train", "val", "test")
    counts = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if len(counts) > len(names) or min(counts) < 0 or sum(counts) != cases:
        raise UsageError("--split", f"{text!r} is not up to three numbers that add up to {cases}", "e.g. 360,90,270")
    return [(name, count) for name, count in zip(names, counts, strict=False) if count]


def _write_preview(path: Path, cases: int, seed: int, options: Options) -> None:
    """One row for each of the first patients, who are of different classes."""
    from medseg.io.write import reserve, write_bytes
    from medseg.phantom import SYNTHETIC
    from medseg.phantom.pancreas import LABELS, PHASES, make_case
    from medseg.report.sheet import Row, render_sheet

    rows = []
    for number in range(cases):
        case = make_case(seed, number, options)
        patient = case.patient
        look = "" if patient.look == patient.type else f", looks like {patient.look}"
        size = "" if not case.plan.radius else f", {case.plan.subtype}, radius {case.plan.radius:.0f} mm"
        caption = f"{patient.type}{look}{size}; {patient.sex}, {patient.age} years"
        rows.append(Row(case.phases, case.labels, case.grid.affine, caption))
    data = render_sheet(rows, columns=PHASES, names=LABELS, title=f"Pancreas phantom, seed {seed}", line=SYNTHETIC)
    write_bytes(reserve(path, overwrite=True), data)
