"""``medseg bundles calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.errors import UsageError

if TYPE_CHECKING:
    from medseg.training.calibrate import Fit
    from medseg.training.dataset import CaseFiles


def calibrate(
    name: Annotated[str, typer.Argument(help="A name of medseg bundles list, or a bundle's folder.")],
    data: Annotated[Path, typer.Option(help="Data set with labels, in the layout of medseg train.")],
    *,
    split: Annotated[Path, typer.Option(help="JSON file with a list of case names for each part.")],
    part: Annotated[str | None, typer.Option(help="Part to fit to, one that the weights have not seen.")] = None,
    fold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER=PART",
            help="The run of a cross-validation fold, and the part that it held out; several times. Instead of --part, "
            "or beside it: then the folds give the prediction of the Dice, and the part the temperature.",
        ),
    ] = None,
    report_part: Annotated[
        str | None, typer.Option(help="Another part, to see how well the result holds there.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Voxels within this many mm of a structure count.")] = 5.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder that gets a calibrated copy. Default: change the bundle."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle of that name in --output.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and only that.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress display and no text.")] = False,
) -> None:
    """Fit a bundle's temperature and its prediction of the Dice to cases with labels, and write both into it.

    The label maps of the bundle stay the same; its probabilities then mean what they say, and medseg infer
    --uncertainty predicts the mean Dice of a case. Every case is predicted twice.

    Example: medseg bundles calibrate my_bundle --data Task04 --split split.json --part heldout --report-part val

    Exit codes: 0 done, 2 usage, 3 data, 4 bundle, 5 memory, 6 bundle cannot be written, 8 device.
    """
    import math

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    if not (math.isfinite(margin) and margin >= 0):
        raise UsageError("--margin", f"{margin:g} is not a number of mm, 0 or more", "5 is usual")
    from medseg.bundles.ensemble import load_ensemble
    from medseg.io.split import read_split
    from medseg.training.calibrate import Labelled, check_writable, write_calibration
    from medseg.training.calibrate import calibrate as fit_to
    from medseg.training.dataset import read_dataset

    model = load_ensemble(name)
    check_writable(model, output=output, overwrite=overwrite)
    dataset, parts = read_dataset(data), read_split(split)

    def cases(wanted: str) -> tuple[CaseFiles, ...]:
        if wanted not in parts:
            raise UsageError(split, f"no part {wanted!r}; it has {', '.join(parts) or 'none'}", "choose another")
        return dataset.part(parts[wanted])

    folds = [Labelled(load_ensemble(folder), cases(held)) for folder, held in map(_fold, fold or ())]
    own = [] if part is None else [Labelled(model, cases(part))]
    if not folds and not own:
        remedy = "name the part that the weights have not seen, or the folds"
        raise UsageError("--part, --fold", "neither is given", remedy)
    others = () if report_part is None else cases(report_part)
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        found = fit_to(
            model,
            own or folds,
            line=folds if own else (),
            report=others,
            margin_mm=margin,
            device=device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    root = write_calibration(model, found, output=output, overwrite=overwrite)
    if json_:
        print(json.dumps({"bundle": str(root), **found.to_record()}, indent=2, allow_nan=False))
    elif not quiet:
        _print(found, root)


def _fold(text: str) -> tuple[str, str]:
    """Folder and part from ``FOLDER=PART``."""
    folder, _, part = text.rpartition("=")
    if not folder or not part:
        raise UsageError("--fold", f"{text!r} is not FOLDER=PART", "e.g. runs/fold0=fold0")
    return folder, part


def _print(found: Fit, root: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("", "cases", "ECE before", "after", "NLL before", "after", "Dice", "Spearman", "off by", "in interval")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for title, one in (("fit", found.fitted), ("report", found.reported)):
        if one is not None:
            numbers = (one.ece_before, one.ece_after, one.nll_before, one.nll_after, one.dice)
            rank = "-" if one.spearman is None else f"{one.spearman:.2f}"
            table.add_row(
                title,
                str(one.cases),
                *(f"{number:.4f}" for number in numbers),
                rank,
                f"{one.dice_error:.4f}",
                f"{100 * one.covered:.0f} %",
            )
    Console(width=max(Console().width, 110), highlight=False).print(table)
    line = found.calibration.dice
    print(f"temperature {found.calibration.temperature:.4f}")
    if line is not None:
        print(
            f"predicted mean Dice {line.intercept:.4f} + {line.slope:.4f} x score, "
            f"deviation {line.deviation:.4f}, {line.cases} cases"
        )
    print(f"written into {root}")
