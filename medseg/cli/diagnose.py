"""``medseg diagnose``: the class of one patient, and how well the patients of a data set are classified."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.errors import UsageError

if TYPE_CHECKING:
    from medseg.io.volume import Volume

app = typer.Typer(
    help="Diagnoses: classes of patients from multi-phase CT, age and sex. Research use only.", no_args_is_help=True
)

BundleName = Annotated[str, typer.Option("-b", "--bundle", help="Bundle that diagnoses: a name, or a run's folder.")]
DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores.")]


@app.command()
def patient(
    scans: Annotated[
        list[str],
        typer.Argument(help="One file that holds all phases, or PHASE=FILE for each one there is, e.g. A=a.nii.gz."),
    ],
    *,
    bundle: BundleName,
    age: Annotated[float | None, typer.Option(min=0, max=120, help="Years; left out: unknown.")] = None,
    sex: Annotated[str, typer.Option(help="male, female or unknown.")] = "unknown",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file; default: stdout.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    device: DeviceName = "auto",
    threads: Threads = 0,
) -> None:
    """Classify one patient. Phases that are missing, and an unknown age or sex, are allowed.

    The report holds the probability of each class with and without age and sex, volumes, and flags where segmentation
    and class disagree. A bundle that was trained on phantoms says so in it: synthetic data, not for clinical use.
    """
    import math

    import torch

    from medseg.bundles.load import load_bundle
    from medseg.inference.device import choose_device
    from medseg.inference.diagnosis import PatientData, diagnose
    from medseg.inference.preprocess import preprocess
    from medseg.io.write import reserve, write_bytes
    from medseg.training.assess import diagnosing_network, patient_json

    if sex not in ("male", "female", "unknown"):
        raise UsageError("--sex", f"{sex!r} is not known", "use male, female or unknown")
    if threads:
        torch.set_num_threads(threads)
    target = None if output is None else reserve(output, overwrite=overwrite, suffixes=(".json",))
    loaded = load_bundle(bundle)
    network, classes = diagnosing_network(loaded)
    place = choose_device(device)
    volume, phases = _read(scans, loaded.spec.channels)
    told = PatientData(math.nan if age is None else age, ("male", "female", "unknown").index(sex), phases)
    found = diagnose(preprocess(volume, loaded.spec).image, network.to(place), loaded.spec, told, place)
    report = patient_json(found, list(classes), loaded, told)
    if target is None:
        print(report.decode(), end="")
    else:
        write_bytes(target, report)


@app.command()
def dataset(
    data: Annotated[Path, typer.Option("--data", help="Folder of a data set with patients.csv.")],
    *,
    bundle: BundleName,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON of all figures.")] = None,
    table: Annotated[Path | None, typer.Option(help="CSV with a row for each patient.")] = None,
    split: Annotated[Path | None, typer.Option(help="JSON file of parts; default: all cases.")] = None,
    part: Annotated[str, typer.Option(help="Part of the split.")] = "test",
    phases: Annotated[str, typer.Option(help="Phases that are shown, e.g. V or A,V; default: all.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
    device: DeviceName = "auto",
    threads: Threads = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Classify the patients of a data set and compare with the truth, with and without age and sex.

    Example: medseg diagnose dataset --data phantom --split phantom/split.json --bundle runs/first -o scores.json
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from medseg.bundles.load import load_bundle
    from medseg.inference.device import choose_device
    from medseg.io.split import read_part
    from medseg.io.write import OutputSet, reserve
    from medseg.training.assess import assess, diagnosing_network, patient_table, summarise
    from medseg.training.dataset import read_dataset
    from medseg.training.patients import read_patients

    if threads:
        torch.set_num_threads(threads)
    places = [
        reserve(path, overwrite=overwrite, suffixes=(suffix,))
        for path, suffix in ((output, ".json"), (table, ".csv"))
        if path is not None
    ]
    loaded = load_bundle(bundle)
    network, classes = diagnosing_network(loaded)
    place = choose_device(device)
    found_set = read_dataset(data)
    cases = found_set.cases if split is None else found_set.part(read_part(split, part))
    patients = read_patients(data, classes, [case.name for case in cases])
    shown = _phases(phases.split(","), loaded.spec.channels, "--phases") if phases else ()
    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("patients", total=len(cases))
        assessed = assess(
            loaded,
            network.to(place),
            cases,
            patients,
            place,
            phases=shown,
            progress=lambda done, _all: bar.update(task, completed=done),
        )
    codes = list(classes)
    figures = {
        "model": loaded.name,
        "data": found_set.name,
        "reference": found_set.reference,
        **summarise(assessed, codes),
    }
    files = {".json": (json.dumps(figures, indent=2) + "\n").encode(), ".csv": patient_table(assessed, codes)}
    with OutputSet() as outputs:
        for target in places:
            outputs.add_bytes(target, files[target.path.suffix.lower()])
    if not quiet:
        _print(figures)


def _read(scans: Sequence[str], channels: Sequence[str]) -> tuple[Volume, tuple[bool, ...]]:
    """The scan with all channels of the bundle, zeros where a phase is absent, and which ones are there."""
    from dataclasses import replace

    import numpy as np

    from medseg.io.read import read_volume

    given = [scan.partition("=") for scan in scans]
    if len(scans) == 1 and (not given[0][1] or Path(scans[0]).exists()):
        return read_volume(scans[0], channels=len(channels)), (True,) * len(channels)
    there = _phases([phase for phase, _, _ in given], channels, "SCANS")
    if sum(there) != len(given) or not all(path for _, _, path in given):
        raise UsageError("SCANS", "one file for each phase is needed", "write A=arterial.nii.gz V=venous.nii.gz")
    paths = {number: path for phase, _, path in given if (number := _channel(phase, channels)) is not None}
    volume = read_volume([paths[channel] for channel in sorted(paths)], channels=len(paths))
    data = np.zeros((len(channels), *volume.shape), dtype=np.float32)
    data[sorted(paths)] = volume.data
    return replace(volume, data=data), there


def _phases(words: Sequence[str], channels: Sequence[str], option: str) -> tuple[bool, ...]:
    """Which of a bundle's channels are named."""
    numbers = [_channel(word, channels) for word in words]
    for word, number in zip(words, numbers, strict=True):
        if number is None:
            raise UsageError(option, f"{word!r} is no phase of the bundle", f"it has {', '.join(channels)}")
    return tuple(number in numbers for number in range(len(channels)))


def _channel(word: str, channels: Sequence[str]) -> int | None:
    """The channel that a word means: its name ("CT V"), or the name's last word; None where there is none."""
    word = word.strip().casefold()
    for number, name in enumerate(channels):
        if word and word in (name.casefold(), name.casefold().split()[-1]):
            return number
    return None


def _print(figures: Mapping[str, Any]) -> None:
    """The main figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    without = figures["without_metadata"]
    for name, estimate in (
        ("accuracy", figures["accuracy"]),
        ("balanced accuracy", figures["balanced_accuracy"]),
        ("mean AUC", figures["mean_auc"]),
        ("accuracy without age and sex", without["accuracy"]),
        ("gain from age and sex", figures["gain_from_metadata"]),
    ):
        table.add_row(name, _text(estimate["value"]), f"{_text(estimate['low'])} to {_text(estimate['high'])}")
    for name, value in (
        ("Dice of the organ", figures["dice"]["organ"]),
        ("Dice of the lesion", figures["dice"]["lesion"]),
        ("sensitivity for a lesion", figures["lesion"]["sensitivity"]),
        ("specificity", figures["lesion"]["specificity"]),
    ):
        table.add_row(name, _text(value), "")
    Console().print(table)
    print(f"{figures['patients']} patients of {figures['data']}; {figures['reference'] or 'research use only'}")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
