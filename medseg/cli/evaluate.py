"""``medseg evaluate``."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.errors import InputError, PartialError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medseg.evaluation.compare import Evaluation, Metric
    from medseg.io.write import Target

_NAMED = 20
_DECIMALS: dict[Metric, int] = {"dice": 4, "hd95_mm": 2, "nsd": 4, "volume_error_ml": 3, "volume_error_percent": 1}


def evaluate(
    prediction: Annotated[Path, typer.Option("--prediction", help="Folder of segmentations, or one file.")],
    reference: Annotated[Path, typer.Option("--reference", help="Folder of reference labels, or one file.")],
    *,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Scores to write: .csv (cases and labels) or .json (all).")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Label values to evaluate, e.g. 1,2; default: all.")] = None,
    tolerance: Annotated[float, typer.Option(help="Tolerance of NSD in mm.")] = 1.0,
    split: Annotated[
        Path | None, typer.Option(help="JSON file with a list of case names for each part, e.g. train and val.")
    ] = None,
    part: Annotated[str, typer.Option(help="Part of the split to evaluate.")] = "val",
    classification: Annotated[
        bool,
        typer.Option(
            "--classification", help="Score the classes of patients: records against a data set with patients.csv."
        ),
    ] = False,
    confusion: Annotated[
        Path | None, typer.Option(help="With --classification: also draw the confusion matrix to this .png file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all scores as JSON on stdout, and only that.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress display and no table.")] = False,
) -> None:
    """Compare segmentations with reference labels: Dice, HD95, NSD and volume error.

    Files are paired by case name; the suffixes _seg and _0000 do not matter. Label names come from dataset.json.

    With --classification, --prediction is a folder of medseg infer or batch of a bundle that diagnoses, --reference the
    data set's folder: accuracy, AUC, confusion matrix, lesions one by one, Dice of organ and lesion.

    To try:

    - medseg evaluate --prediction results --reference Task04/labelsTr --split split.json -o scores.csv
    - medseg evaluate --classification --prediction results --reference phantom --confusion confusion.png

    Exit codes: 0 every case, 2 usage, 3 no case or a missing path, 6 output, 7 written, but some cases failed.
    """
    from medseg.io.write import reserve, write_bytes

    if classification:
        if labels is not None:
            raise UsageError("--labels", "not with --classification", "leave it out")
        inputs = [path for path in (reference, split) if path is not None]
        _classification(
            prediction,
            reference,
            split,
            part,
            targets=[
                reserve(path, overwrite=overwrite, inputs=inputs, suffixes=suffixes)
                for path, suffixes in ((output, (".csv", ".json")), (confusion, (".png",)))
                if path is not None
            ],
            as_json=as_json,
            quiet=quiet,
        )
        return
    if confusion is not None:
        raise UsageError("--confusion", "given without --classification", "add it")
    values = _values(labels)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UsageError("--tolerance", f"must be a finite number of mm, 0 or more, got {tolerance:g}")
    target = None
    if output is not None:
        inputs = [path for path in (prediction, reference, split) if path is not None]
        target = reserve(output, overwrite=overwrite, inputs=inputs, suffixes=(".csv", ".json"))
    evaluation = _run(prediction, reference, values, tolerance, split, part, quiet=quiet)
    _warn(evaluation)
    undone = len(evaluation.missing) + len(evaluation.failed)
    if not evaluation.cases:
        if undone == 1 and evaluation.failed:
            raise InputError(evaluation.failed[0].case, evaluation.failed[0].problem)
        raise InputError(prediction, f"none of {undone} cases could be evaluated", "see the warnings above")
    record = json.dumps({"medseg": _version(), **evaluation.to_record()}, indent=2, allow_nan=False) + "\n"
    if target is not None:
        text = evaluation.to_csv() if target.path.suffix.lower() == ".csv" else record
        write_bytes(target, text.encode())
    if as_json:
        sys.stdout.write(record)
    elif not quiet:
        _print_table(evaluation)
        if target is not None:
            print(f"scores: {target.path}")
    if undone:
        raise PartialError(
            prediction,
            f"{undone} of {undone + len(evaluation.cases)} cases could not be evaluated",
            "see the warnings above",
        )


def _run(
    prediction: Path,
    reference: Path,
    labels: list[int] | None,
    tolerance: float,
    split: Path | None,
    part: str,
    *,
    quiet: bool,
) -> Evaluation:
    """Evaluate with a progress bar on stderr, which a file or a pipe does not see."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from medseg.evaluation.compare import evaluate as compare
    from medseg.io.read import read_labels
    from medseg.io.split import read_part

    cases = read_part(split, part) if split is not None else None
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        return compare(
            prediction,
            reference,
            read=read_labels,
            labels=labels,
            tolerance_mm=tolerance,
            cases=cases,
            progress=lambda done, total, case: bar.update(task, completed=done, total=total, description=case),
        )


def _classification(
    prediction: Path,
    reference: Path,
    split: Path | None,
    part: str,
    *,
    targets: Sequence[Target],
    as_json: bool,
    quiet: bool,
) -> None:
    """Score the classes of patients, write what was asked for, and print."""
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from medseg.evaluation.cohort import judge_cohort, patient_table, summarise
    from medseg.io.split import read_part
    from medseg.io.write import OutputSet
    from medseg.report.confusion import render_confusion

    cases = read_part(split, part) if split is not None else None
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or as_json or not console.is_terminal) as bar:
        task = bar.add_task("patients", total=None)
        cohort = judge_cohort(
            prediction,
            reference,
            cases=cases,
            progress=lambda done, total, _case: bar.update(task, completed=done, total=total),
        )
    for failure in cohort.failed:
        print(f"warning: {failure.case}: {failure.problem}", file=sys.stderr)
    if cohort.missing:
        more = f" and {len(cohort.missing) - _NAMED} more" if len(cohort.missing) > _NAMED else ""
        print(f"warning: no record for {', '.join(cohort.missing[:_NAMED])}{more}", file=sys.stderr)
    undone = len(cohort.missing) + len(cohort.failed)
    if not cohort.patients:
        raise InputError(prediction, f"none of {undone} patients could be scored", "see the warnings above")
    codes = list(cohort.classes)
    figures = {
        "medseg": _version(),
        "disclaimer": " ".join(cohort.disclaimers),
        "classes": dict(cohort.classes),
        **summarise(cohort.patients, codes),
        "not_scored": [*cohort.missing, *(failure.case for failure in cohort.failed)],
    }
    text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
    matrix = np.array(figures["confusion"]["rows_truth_columns_named"])
    with OutputSet() as outputs:
        for target in targets:
            suffix = target.path.suffix.lower()
            if suffix == ".png":
                line = f"balanced accuracy {_interval(figures['balanced_accuracy'])}, {len(cohort.patients)} patients"
                picture = render_confusion(matrix, codes, title=prediction.name, lines=[line, *cohort.disclaimers])
                outputs.add_bytes(target, picture)
            else:
                outputs.add_bytes(
                    target, (patient_table(cohort.patients, codes) if suffix == ".csv" else text).encode()
                )
    if as_json:
        sys.stdout.write(text)
    elif not quiet:
        _print_classification(figures)
        for target in targets:
            print(f"  {target.path}")
    if undone:
        total = undone + len(cohort.patients)
        raise PartialError(prediction, f"{undone} of {total} patients could not be scored", "see the warnings above")


def _print_classification(figures: Mapping[str, Any]) -> None:
    """The main figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("figure")
    table.add_column("value (95 % interval)")
    blind, lesion = figures["without_metadata"], figures["lesion"]
    rows = [
        ("accuracy", figures["accuracy"]),
        ("balanced accuracy", figures["balanced_accuracy"]),
        ("mean AUC, one against the rest", figures["mean_auc"]),
        ("accuracy without age and sex", blind and blind["accuracy"]),
        ("gain from age and sex", figures["gain_from_metadata"]),
        ("Dice of the organ", figures["dice"]["organ"]),
        ("Dice of the lesion", figures["dice"]["lesion"]),
    ]
    if lesion is not None:
        rows += [
            (f"patients whose lesion of {lesion['at_least_ml']} ml or more was found", lesion["sensitivity"]),
            ("patients without a lesion in whom none was found", lesion["specificity"]),
        ]
        rows += [
            (f"lesions found at up to {rate} false ones a patient", value)
            for rate, value in lesion["sensitivity_at_false_positives"].items()
        ]
    for name, value in rows:
        text = _interval(value) if isinstance(value, dict) else "-" if value is None else f"{value:.3f}"
        table.add_row(name, text)
    Console(soft_wrap=True, highlight=False).print(table)
    print(f"{figures['patients']} patients. {figures['disclaimer']}")


def _interval(estimate: Mapping[str, float | None]) -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def _values(text: str | None) -> list[int] | None:
    """Label values from ``1,2``."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError("--labels", f"must be values of 1 or more, separated by commas, got {text!r}", "e.g. 1,2")
    return sorted({int(part) for part in parts})


def _warn(evaluation: Evaluation) -> None:
    """Name on stderr what could not be compared."""
    alone = not evaluation.cases and len(evaluation.failed) == 1 and not evaluation.missing
    for failure in () if alone else evaluation.failed:
        print(f"warning: {failure.case}: {failure.problem}", file=sys.stderr)
    for problem, cases in (("no prediction for", evaluation.missing), ("no reference for", evaluation.extra)):
        if cases:
            rest = f" and {len(cases) - _NAMED} more (--json names all)" if len(cases) > _NAMED else ""
            print(f"warning: {problem} {', '.join(cases[:_NAMED])}{rest}", file=sys.stderr)


def _print_table(evaluation: Evaluation) -> None:
    """Print the summary; in a pipe as wide as it needs to be."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    titles: dict[Metric, str] = {
        "dice": "Dice",
        "hd95_mm": "HD95, mm",
        "nsd": f"NSD at {evaluation.tolerance_mm:g} mm",
        "volume_error_ml": "volume, ml",
        "volume_error_percent": "volume, %",
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("label, metric", no_wrap=True, max_width=28)
    for column in ("mean", "median", "std", "worst"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("worst case", overflow="fold")
    table.add_column("cases", justify="right", no_wrap=True)
    label: tuple[int | None, str] | None = None
    for row in evaluation.summary:
        if (row.value, row.name) != label:
            label = (row.value, row.name)
            table.add_section()
            table.add_row(Text(row.name if row.value is None else f"{row.value} {row.name}", style="bold"))
        numbers = [_number(value, _DECIMALS[row.metric]) for value in (row.mean, row.median, row.std, row.worst)]
        count = f"{row.count} + {row.infinite} inf" if row.infinite else str(row.count)
        cells = (f"  {titles[row.metric]}", *numbers, row.worst_case or "-", count)
        table.add_row(*(Text(cell) for cell in cells))
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(80, Console(width=1000).measure(table).maximum))
    console.print(table)


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else "inf" if math.isinf(value) else f"{value:.{decimals}f}"


def _version() -> str:
    import medseg

    return medseg.__version__
