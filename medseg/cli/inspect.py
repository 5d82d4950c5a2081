"""``medseg inspect``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from medseg.inference.inspection import Inspection, SeriesRow, VolumeFacts


def inspect(
    path: Annotated[Path, typer.Argument(help="Scan: .nii, .nii.gz, .mha, .mhd, .nrrd, DICOM folder, file or .zip.")],
    *,
    series: Annotated[
        str | None, typer.Option(help="DICOM series to read: its number in the list, its UID or a part of it.")
    ] = None,
    descriptions: Annotated[
        bool, typer.Option("--descriptions", help="Show the series' descriptions; they may name the patient.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
) -> None:
    """Show what a file or folder holds: format, geometry, intensities, DICOM series, and the bundles it suits.

    Nothing is written. The patient's name and numbers are never shown.

    To try:

    - medseg inspect scan.nii.gz
    - medseg inspect study/ --descriptions
    - medseg inspect study/ --series 2 --json

    Exit codes: 0 read, 2 usage, 3 not a scan that medseg reads, 5 memory.
    """
    from medseg.inference.inspection import inspect as look

    found = look(path, series=series, descriptions=descriptions)
    if json_:
        print(found.model_dump_json(indent=2))
        return
    for warning in found.warnings:
        print(f"warning: {path}: {warning}", file=sys.stderr)
    _print(found)


def _print(found: Inspection) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{found.name}  {_format(found)}", style="bold"))
    if found.series:
        _print_series(console, found.series)
    rest = [f"{count} {kind}" for kind, count in sorted(found.others.items())]
    if found.not_dicom:
        rest.append(f"{found.not_dicom} files that are not DICOM")
    if rest:
        console.print(Text(f"also there: {', '.join(rest)}"))
    if found.volume is None:
        console.print(Text("choose a series with --series N to see its voxels"))
        return
    _print_volume(console, found.volume)
    for bundle in found.bundles:
        fits = "suits" if not bundle.unsuitable else "does not suit"
        reasons = f": {'; '.join(bundle.unsuitable)}" if bundle.unsuitable else ""
        console.print(Text(f"{fits} {bundle.name}{reasons}"))


def _format(found: Inspection) -> str:
    return {"nifti": "NIfTI", "itk": "MetaImage or NRRD", "dicom": "DICOM"}[found.format]


def _print_series(console: Console, series: tuple[SeriesRow, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    described = any(row.description is not None for row in series)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("no.", "series", "modality", "images", "voxels", "spacing mm", "UID ends in", "remarks"):
        table.add_column(name, overflow="fold", justify="right" if name in {"no.", "images"} else "left")
    if described:
        table.add_column("description", overflow="fold")
    for row in series:
        remarks = row.problem
        if row.volumes > 1:
            remarks = f"4D, {row.volumes} volumes: choose one with --volume"
        elif row.gantry_tilt_degrees:
            remarks = f"gantry tilt of {row.gantry_tilt_degrees:.1f} degrees: needs --fix-gantry-tilt"
        cells = [
            str(row.number),
            "" if row.series_number is None else str(row.series_number),
            row.modality,
            str(row.images),
            _sizes(row.shape or (row.columns, row.rows)),
            _sizes(row.spacing_mm or ()),
            row.uid[-12:],
            remarks,
        ]
        table.add_row(*(Text(cell) for cell in (*cells, row.description or "")[: 8 + described]))
    if not console.is_terminal:  # a file or a pipe: as wide as it needs to be
        console = Console(highlight=False, width=max(80, Console(width=10_000).measure(table).maximum))
    console.print(table)


def _print_volume(console: Console, volume: VolumeFacts) -> None:
    from rich.table import Table
    from rich.text import Text

    low, *_, high = volume.percentiles.values()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "voxels": _sizes(volume.shape) + (f", {volume.channels} channels" if volume.channels > 1 else ""),
        "spacing mm": _sizes(volume.spacing_mm),
        "extent mm": _sizes(volume.extent_mm),
        "orientation": volume.orientation
        + (f", oblique by {volume.oblique_degrees:.1f} degrees" if volume.oblique_degrees >= 0.05 else ""),
        "affine": "\n".join("  ".join(f"{value:10.4f}" for value in row) for row in volume.affine[:3]),
        "stored as": volume.dtype,
        "intensities": f"{volume.minimum:g} to {volume.maximum:g}, 98 % within {low:g} to {high:g}",
        "modality": f"{volume.modality or 'unknown'} ({volume.modality_is})",
    }
    for name, text in rows.items():
        table.add_row(name, Text(text))
    console.print(table)


def _sizes(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
