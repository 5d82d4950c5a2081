"""``medseg infer``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from medseg.inference.record import Record, UncertaintyRecord
    from medseg.inference.run import Result
    from medseg.io.patients import PatientFacts


def infer(
    scans: Annotated[
        list[Path],
        typer.Argument(
            help="Scan: .nii, .nii.gz, .mha, .mhd, .nrrd, DICOM folder, file or .zip; one for each channel, in order, "
            "or one for each phase that there is."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Label map to write (.nii.gz, .nii), or a folder. Default: beside the scan."
        ),
    ] = None,
    *,
    bundle: Bundles = None,
    weight: Weights = None,
    device: Device = "auto",
    backend: Backend = "auto",
    precision: Precision = "auto",
    overlap: Overlap = None,
    tta: Flips = False,
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Also write the probability of each class, NAME_probabilities.nii.gz."),
    ] = False,
    uncertainty: Annotated[
        Path | None,
        typer.Option(
            help="Also write how sure each voxel is, 0 to 1, to this file (.nii.gz, .nii), and score the case."
        ),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(
            help="Also write where the class named sees its evidence, 0 to 1, to this file (.nii.gz, .nii), for a "
            "bundle that diagnoses."
        ),
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="Also write the measurements as a table to this CSV file.")
    ] = None,
    volume: Annotated[
        int | None, typer.Option("--volume", min=0, help="Which volume of a 4D file to take, counted from 0.")
    ] = None,
    series: Annotated[
        str | None,
        typer.Option(
            help="DICOM series: its number in the list of medseg inspect, its UID or a part of it, or largest."
        ),
    ] = None,
    fix_gantry_tilt: Annotated[
        bool, typer.Option("--fix-gantry-tilt", help="Resample a DICOM series of a tilted gantry to right angles.")
    ] = False,
    assign_uids: AssignUids = False,
    dicom_seg: Annotated[
        Path | None, typer.Option(help="Also write a DICOM Segmentation of a DICOM scan to this .dcm file.")
    ] = None,
    rtstruct: Annotated[
        Path | None, typer.Option(help="Also write a DICOM RT Structure Set of a DICOM scan to this .dcm file.")
    ] = None,
    phase: Annotated[
        list[str] | None,
        typer.Option(
            help="Phase of each scan, in order, e.g. A or V, for a bundle that diagnoses. Default: by the files' names."
        ),
    ] = None,
    register: Register = False,
    age: Annotated[
        str | None, typer.Option(metavar="YEARS", help="Age of the patient, for a bundle that diagnoses.")
    ] = None,
    sex: Annotated[str | None, typer.Option(help="F or M, for a bundle that diagnoses.")] = None,
    metadata: Metadata = None,
    trust: Trust = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although the scan is not what the bundle was trained on.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the record as JSON on stdout, and nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors and warnings only.")] = False,
) -> None:
    """Segment one scan onto its own grid.

    Writes the label map SCAN_seg.nii.gz (same shape and affine as the scan), the record SCAN_seg.json (what was
    done, volumes in ml, warnings) and the picture SCAN_seg.png; all of them or none.

    To try:

    - medseg infer scan.nii.gz
    - medseg infer scan.nii.gz -o results --probabilities --statistics volumes.csv
    - medseg infer t1.nii.gz t2.nii.gz --bundle two_channels --json
    - medseg infer study/ --series 2 --dicom-seg study_seg.dcm --rtstruct study_rt.dcm
    - medseg infer arterial.nii.gz venous.nii.gz --bundle mdpformer_pancreas --phase A --phase V --age 63 --sex F
    - medseg infer scan.nii.gz --bundle one --bundle two --weight 2 --weight 1 --uncertainty unsure.nii.gz

    Exit codes: 0 done, 2 usage, 3 scan, 4 bundle or unsuitable scan, 5 memory, 6 output, 8 device.
    """
    from medseg.report.outputs import reserve_outputs, write_outputs

    patient = _patient(scans[0], age, sex, metadata)
    places = reserve_outputs(
        scans,
        output,
        overwrite=overwrite,
        probabilities=probabilities,
        statistics=statistics,
        uncertainty=uncertainty,
        evidence=evidence,
        dicom_seg=dicom_seg,
        rtstruct=rtstruct,
    )
    if trust:
        print("warning: --trust: code that comes with the bundle may run", file=sys.stderr)
    with _Display(quiet=quiet or json_) as display:
        display.stage("load medseg", 0, 1)
        from medseg.inference.run import infer as run

        display.stage("load medseg", 1, 1)
        result = run(
            scans if len(scans) > 1 else scans[0],
            bundle=bundle or DEFAULT_BUNDLE,
            weights=weight,
            device=device,
            backend=backend,
            precision=precision,
            overlap=overlap,
            tta=tta,
            probabilities=probabilities,
            uncertainty=uncertainty is not None,
            evidence=evidence is not None,
            force=force,
            volume_index=volume,
            series=series,
            fix_gantry_tilt=fix_gantry_tilt,
            refer=dicom_seg is not None or rtstruct is not None,
            phases=phase or (),
            align=register,
            patient=patient,
            trust=trust,
            assign_uids=assign_uids,
            progress=display.stage,
        )
        display.stage("write", 0, 1)
        result = write_outputs(result, places)
        display.stage("write", 1, 1)
    for warning in result.record.warnings:
        print(f"warning: {scans[0]}: {warning}", file=sys.stderr)
    if json_:
        print(result.record.model_dump_json(indent=2))
    elif not quiet:
        _print(result, {kind: path.parent for kind, path in places.paths().items()})


def _patient(scan: Path, age: str | None, sex: str | None, metadata: Path | None) -> PatientFacts | None:
    """What is known of the patient; None when nothing was said."""
    from medseg.io.files import patient_names
    from medseg.io.patients import facts_of, read_patients, told_facts

    if metadata is None:
        return None if age is None and sex is None else told_facts(age, sex)
    if age is not None or sex is not None:
        raise UsageError("--metadata", "given with --age or --sex", "give one or the other")
    return facts_of(read_patients(metadata), metadata, *patient_names(scan))


def _print(result: Result, folders: Mapping[str, Path]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from medseg.report.findings import diagnosis_lines

    record = result.record
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for name, justify in (("label", "left"), ("volume ml", "right"), ("voxels", "right"), ("pieces", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for label in record.labels if record.diagnosis is None else [one for one in record.labels if one.voxels]:
        table.add_row(Text(label.name), f"{label.volume_ml:.3f}", str(label.voxels), str(label.components))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(
        Text(
            f"{record.bundle.summary}; {record.device}, {_computed(record)}, {record.windows} windows, "
            f"{sum(record.seconds.values()):.1f} s. {record.disclaimer}"
        )
    )
    for line in diagnosis_lines(record):
        console.print(Text(line))
    if record.uncertainty is not None:
        console.print(Text(_quality(record.uncertainty)))
    for kind, name in record.outputs.items():
        console.print(Text(f"{kind.replace('_', ' '):>18}  {folders[kind] / name}"))


def _computed(record: Record) -> str:
    """Back ends and precisions."""
    return ", ".join(dict.fromkeys(f"{one.name} {one.precision}" for one in record.backends))


def _quality(sure: UncertaintyRecord) -> str:
    """How good the segmentation is likely to be, in one line."""
    text = f"score {sure.score:.3f}"
    if sure.uncertain_share is not None:
        text += f", {100 * sure.uncertain_share:.1f} % of the voxels found are uncertain"
    if (predicted := sure.predicted_dice) is not None:
        text += f"; predicted mean Dice {predicted.mean:.2f} ({predicted.lower:.2f} to {predicted.upper:.2f})"
    return text


class _Display:
    """Rich progress on stderr: one line a stage, with a bar where windows are counted."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def stage(self, name: str, done: int, total: int) -> None:
        """Progress of one stage."""
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total)
        task = self._bar.tasks[self._tasks[name]]
        if total == 1 and task.total and task.total > 1:
            return  # the end of a stage that counted its own windows
        self._bar.update(self._tasks[name], completed=done, total=total)
