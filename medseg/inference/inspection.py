"""What a file or folder holds, and which bundles it suits: `medseg inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from medseg.bundles.locate import all_bundles, is_ensemble, weights_of
from medseg.bundles.spec import read_spec
from medseg.errors import BundleError, InputError
from medseg.inference.suitability import looks_like_labels, sample_of, unsuitable
from medseg.io import geometry
from medseg.io.files import case_name
from medseg.io.read import is_dicom_input, read_volume

if TYPE_CHECKING:
    from medseg.io.series import Contents
    from medseg.io.volume import Volume

Triple = tuple[float, float, float]

_PERCENTILES = (1, 5, 50, 95, 99)
_ANISOTROPIC = 3.0
_AIR_HU = -500.0
_LABELS = "label map"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SeriesRow(_Strict):
    """One image series of a DICOM folder or archive."""

    number: int = Field(description="Place in the list, from 1: what --series takes.")
    uid: str = Field(description="SeriesInstanceUID.")
    series_number: int | None
    modality: str
    images: int
    columns: int
    rows: int
    shape: tuple[int, int, int] | None = Field(description="Voxels (X, Y, Z); null when the images make no volume.")
    spacing_mm: Triple | None
    volumes: int = Field(description="More than 1 for a 4D series.")
    gantry_tilt_degrees: float
    problem: str = Field(description="Why the images make no volume; empty when they do.")
    description: str | None = Field(description="SeriesDescription, where it was asked for.")


class BundleFit(_Strict):
    """Whether a bundle that is ready was trained on scans like this one."""

    name: str
    unsuitable: tuple[str, ...] = Field(description="What lies outside; empty when the scan suits the bundle.")


class VolumeFacts(_Strict):
    """A scan as it would be read."""

    shape: tuple[int, int, int] = Field(description="Voxels (X, Y, Z).")
    channels: int = Field(description="Channels, or volumes of a 4D file.")
    spacing_mm: Triple
    extent_mm: Triple
    orientation: str = Field(description="Directions of the array's axes, e.g. RAS.")
    oblique_degrees: float = Field(description="Largest angle between an array axis and the nearest anatomical one.")
    affine: tuple[tuple[float, float, float, float], ...] = Field(description="Voxel index to RAS mm, row by row.")
    dtype: str = Field(description="Type of the stored values.")
    minimum: float
    maximum: float
    percentiles: dict[str, float] = Field(description="1 to 99, of at most a million voxels spread evenly.")
    modality: str = Field(description="CT, MR, ...; empty when unknown.")
    modality_is: str = Field(description="stated (DICOM) or guessed (by intensities).")


class Inspection(_Strict):
    """Everything `medseg inspect` says."""

    name: str
    format: str = Field(description="nifti, itk or dicom.")
    sha256: str = Field(description="As in the record of a run; empty when no volume was read.")
    series: tuple[SeriesRow, ...]
    others: dict[str, int] = Field(description="Other DICOM objects: kind to number.")
    not_dicom: int = Field(description="Files in the folder that are not DICOM.")
    volume: VolumeFacts | None = Field(description="Null when there are several series and none was chosen.")
    bundles: tuple[BundleFit, ...]
    warnings: tuple[str, ...]


def inspect(path: Path, *, series: str | None = None, descriptions: bool = False) -> Inspection:
    """Look at a scan: header, geometry, intensities, and the bundles that are ready for it.

    Args:
        path: any file or folder that `read_volume` takes.
        series: which DICOM series to read; without it, a folder of several is listed only.
        descriptions: also tell the series' descriptions, which may hold the patient's name.

    Raises:
        InputError: it cannot be read; of several series each says for itself why it cannot.
        UsageError: `series` fits nothing, or the scan is not DICOM.
    """
    dicom = is_dicom_input(path)
    rows: tuple[SeriesRow, ...] = ()
    others: dict[str, int] = {}
    ignored = 0
    if dicom:
        from medseg.io.dicom import listed

        with listed(path) as (contents, root):
            rows = tuple(_rows(contents, root, path, descriptions=descriptions))
            others, ignored = dict(contents.others), contents.ignored
    volume = None
    if series is not None or len(rows) < 2:
        tilted = bool(rows) and any(row.gantry_tilt_degrees > 0 for row in rows)
        volume = read_volume(path, series=series, fix_gantry_tilt=tilted)
    facts = _facts(volume) if volume is not None else None
    bundles = _fits(volume) if volume is not None and facts is not None and facts.modality != _LABELS else []
    return Inspection(
        name=case_name(path) if path.is_dir() else path.name,
        format="dicom" if dicom else volume.source.format if volume is not None else "",
        sha256=volume.source.sha256 if volume is not None else "",
        series=rows,
        others=others,
        not_dicom=ignored,
        volume=facts,
        bundles=tuple(bundles),
        warnings=(*volume.source.warnings, *_remarks(volume)) if volume is not None else (),
    )


def _rows(contents: Contents, root: Path, shown: Path, *, descriptions: bool) -> list[SeriesRow]:
    from medseg.io.stack import TILT_DEGREES, stack

    rows = []
    for number, series in enumerate(contents.volumes, start=1):
        found, problem = None, ""
        try:
            found = stack(series.frames, root, shown)
        except InputError as err:
            problem = err.problem
        rows_, columns = series.frames[0].shape
        tilt = found.tilt_degrees if found is not None and found.tilt_degrees > TILT_DEGREES else 0.0
        rows.append(
            SeriesRow(
                number=number,
                uid=series.uid,
                series_number=series.number,
                modality=series.modality,
                images=len(series.frames),
                columns=columns,
                rows=rows_,
                shape=found.shape if found is not None else None,
                spacing_mm=_triple(geometry.spacing(found.affine)) if found is not None else None,
                volumes=len(found.volumes) if found is not None else 0,
                gantry_tilt_degrees=round(tilt, 2),
                problem=problem,
                description=series.description if descriptions else None,
            )
        )
    return rows


def guess_modality(data: NDArray[np.float32]) -> str:
    """What (C, X, Y, Z) looks like: CT by its air, a label map, MR for other magnitudes; "" when nothing fits."""
    if data.min() < _AIR_HU and data.max() > 0:
        return "CT"
    if looks_like_labels(data):
        return _LABELS
    return "MR" if data.min() >= 0 and data.max() > 0 else ""


def _facts(volume: Volume) -> VolumeFacts:
    sample = sample_of(volume.data)
    stated = volume.source.dicom.modality if volume.source.dicom is not None else ""
    return VolumeFacts(
        shape=volume.shape,
        channels=volume.data.shape[0],
        spacing_mm=_triple(geometry.spacing(volume.affine)),
        extent_mm=_triple(geometry.extent_mm(volume.shape, volume.affine)),
        orientation=geometry.orientation(volume.affine),
        oblique_degrees=round(geometry.oblique_degrees(volume.affine), 2),
        affine=tuple(tuple(round(float(value), 6) for value in row) for row in volume.affine),  # type: ignore[misc]
        dtype=volume.source.dtype,
        minimum=float(volume.data.min()),
        maximum=float(volume.data.max()),
        percentiles={str(step): float(np.percentile(sample, step)) for step in _PERCENTILES},
        modality=stated or guess_modality(volume.data),
        modality_is="stated" if stated else "guessed",
    )


def _remarks(volume: Volume) -> list[str]:
    """What the reader had no reason to warn of, and a user may want to know."""
    size = geometry.spacing(volume.affine)
    found = []
    if size.max() >= _ANISOTROPIC * size.min():
        found.append(f"anisotropic voxels, {' x '.join(f'{length:.3g}' for length in size)} mm")
    if volume.data.min() == volume.data.max():
        found.append("all voxels have the same value")
    if min(volume.shape) == 1:
        found.append("a single slice")
    if looks_like_labels(volume.data):
        found.append("looks like a label map, not like a scan")
    return found


def _fits(volume: Volume) -> list[BundleFit]:
    """Each bundle with weights, and what about the scan it was not trained on."""
    found = []
    for root in all_bundles():
        if weights_of(root) is None or is_ensemble(root):
            continue
        try:
            spec = read_spec(root)
        except BundleError:
            continue  # medseg bundles list says what is wrong
        there = volume.data.shape[0]
        plural = "" if there == 1 else "s"
        reasons = [] if there == spec.in_channels else [f"{there} channel{plural} instead of {spec.in_channels}"]
        found.append(BundleFit(name=root.name, unsuitable=(*reasons, *unsuitable(volume, spec))))
    return found


def _triple(values: NDArray[np.float64]) -> Triple:
    x, y, z = (round(float(value), 6) for value in values)
    return x, y, z
