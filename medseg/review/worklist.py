"""Cases come in: from a folder of scans, from the output of `medseg batch`, or one by one as uploads."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from medseg.batch.cases import find_cases, label_map_of
from medseg.batch.journal import Journal
from medseg.batch.worker import labels_path
from medseg.errors import InputError, MedsegError
from medseg.inference.inspection import guess_modality
from medseg.inference.phases import PhaseVolume
from medseg.inference.record import Record
from medseg.io.archive import is_archive
from medseg.io.files import sha256_of, split_suffix
from medseg.io.geometry import corner_shift, spacing
from medseg.io.read import GRID_TOLERANCE, read_labels, read_volume
from medseg.io.volume import Volume
from medseg.io.write import NIFTI_SUFFIXES, OutputSet
from medseg.report.palette import label_colours
from medseg.review.derived import LARGE_VOXELS, REDUCED, made_once, write_image, write_reduced
from medseg.review.masks import screen_values, write_grid, write_map, write_mask
from medseg.review.saving import adopt
from medseg.review.store.models import Case, Label, Prediction, User, new_id
from medseg.review.store.repo import Store

log = logging.getLogger(__name__)

_MANY = 10_000  # more channels than any bundle has
EXPORTS = "exports"
"""Folder inside the data folder for data sets that the page exports."""


@dataclass(frozen=True)
class Import:
    """What an import did.

    Attributes:
        added: new cases.
        known: how many scans were cases already.
        problems: scans or results that were left out, one sentence each.
    """

    added: tuple[str, ...]
    known: int
    problems: tuple[str, ...]


def import_folder(
    store: Store, folder: Path, *, by: User, recursive: bool = False, references: Path | None = None
) -> Import:
    """Add the scans of a folder, with the segmentations ``<name>_seg.nii.gz`` that lie beside them.

    A label map ``<name>_label.nii.gz`` beside a scan becomes the reference to compare with. Scans stay where they are;
    what is no NIfTI volume of one channel is converted into the data folder. When the folder is the data folder itself,
    what the store keeps in it is left out.

    Args:
        store: the store.
        folder: with scans.
        by: who imports.
        recursive: search its subfolders too.
        references: folder of label maps to compare with, each named as its scan: labelsTr beside imagesTr.

    Raises:
        InputError: no folder, or no scan in it. PermissionError: a reader may not.
    """
    found = find_cases([folder], recursive=recursive)
    own = {store.folder / case for case in (row.case.id for row in store.worklist())} | {store.folder / EXPORTS}
    scans = {case.name: case.scans for case in found.cases if own.isdisjoint((case.scans[0], *case.scans[0].parents))}
    results = {name: Path(labels_path(folder, name)) for name in scans}
    made = _import(store, scans, results, by=by)
    if references is None:
        return made
    problems = list(made.problems)
    for case_id in made.added:
        name = store.case(case_id).name
        file = next((path for suffix in NIFTI_SUFFIXES if (path := references / (name + suffix)).is_file()), None)
        try:
            if file is not None:
                add_reference(store, case_id, file, by=by)
        except MedsegError as error:
            problems.append(f"{name}: {error.problem}")
    return Import(made.added, made.known, tuple(problems))


def import_batch(store: Store, output: Path, scans: Sequence[Path], *, channels: int = 1, by: User) -> Import:
    """Add the cases that `medseg batch` finished.

    Args:
        store: the store.
        output: the batch's folder, with its journal.
        scans: the folders or files that the batch was given.
        channels: files of a case.
        by: who imports.

    Raises:
        InputError: no journal, or no scan. PermissionError: a reader may not.
    """
    journal = Journal.read(output)
    done = {name for name, history in journal.cases.items() if history.done is not None}
    if not done:
        raise InputError(output, "no finished case of medseg batch here", "give the folder that holds run.jsonl")
    found = find_cases(scans, channels=channels, recursive=True, output=output)
    files = {case.name: case.scans for case in found.cases if case.name in done}
    if done - set(files):  # files CASE_0000, CASE_0001 ... are one case of a bundle with several channels or phases
        grouped = find_cases(scans, channels=_MANY, partial=True, recursive=True, output=output)
        files |= {case.name: case.scans for case in grouped.cases if case.name in done - set(files)}
    lost = [f"{name}: its scan was not found" for name in sorted(done - set(files))]
    made = _import(store, files, {name: labels_path(output, name) for name in files}, by=by)
    return Import(made.added, made.known, (*lost, *made.problems))


def import_upload(store: Store, file: Path, *, name: str, by: User) -> Case:
    """Add an uploaded scan: a NIfTI, MetaImage or NRRD file, or a zip archive of a DICOM series.

    Args:
        store: the store.
        file: the upload; it stays where it is, a converted copy becomes the case's image.
        name: pseudonym.
        by: who uploads.

    Raises:
        InputError, MemoryBudgetError: as `read_volume`. PermissionError: a reader may not.
    """
    return add_scan(store, (file,), name=name, by=by, copy=True)


def add_scan(
    store: Store, scans: Sequence[Path], *, name: str, by: User, copy: bool = False, record: Record | None = None
) -> Case:
    """Add one scan as a case.

    Args:
        store: the store.
        scans: one file or folder, or one for each channel.
        name: pseudonym.
        by: who adds it.
        copy: also copy the scan into the data folder: a NIfTI file without the identity that its header may hold,
            DICOM as it is, beside an image without identity.
        record: of a run on it, which knows the phase of the reference: this one is shown, otherwise the first channel.

    Raises:
        InputError, MemoryBudgetError: as `read_volume`; nothing is left behind.
        PermissionError: a reader may not.
    """
    file, channel = _shown(scans, record)
    volume = read_volume(file)
    if 0 < channel < len(volume.data):
        volume = replace(volume, data=volume.data[channel:])
    case_id = new_id()
    folder = store.folder / case_id
    folder.mkdir(mode=0o700)
    try:
        kept = split_suffix(file)[1].lower() in {".nii", ".nii.gz"} and len(volume.data) == 1 and not channel
        if copy or not kept or volume.source.format != "nifti":
            image = _convert(folder / "image.nii.gz", volume)
            sha256 = sha256_of(image)
        else:
            image, sha256 = file.absolute(), volume.source.sha256
        grid = write_grid(folder / "grid.nii.gz", volume)
        if volume.data[0].size > LARGE_VOXELS:
            write_reduced(folder / REDUCED, volume)
        sources = [scan.absolute() for scan in scans]
        dicom = volume.source.dicom
        if copy and dicom is not None:  # DICOM SEG and RTSTRUCT refer to the images, and copy the patient from them
            sources = [_keep(scans[0], folder)]
        elif copy:
            sources = [image if len(volume.data) == 1 else _convert(folder / "source.nii.gz", volume, channels=True)]
        return store.add_case(
            case_id,
            name=name,
            image=image,
            image_sha256=sha256,
            sources=sources,
            grid=grid,
            shape=volume.shape,
            spacing=[round(float(mm), 6) for mm in spacing(volume.affine)],
            modality=dicom.modality if dicom else _guessed(volume),
            by=by,
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def add_result(
    store: Store,
    case_id: str,
    labels: np.ndarray[Any, np.dtype[np.integer]],
    *,
    names: Mapping[int, str],
    model: str,
    version: str = "",
    record: Mapping[str, Any] | None = None,
    runtime_s: float | None = None,
    device: str = "",
    uncertainty: np.ndarray[Any, np.dtype[np.floating]] | None = None,
    evidence: np.ndarray[Any, np.dtype[np.floating]] | None = None,
    phases: PhaseVolume | None = None,
    by: User,
) -> Prediction:
    """Keep a model's label map; the first one of a case gives it its label table and its first version.

    Args:
        store: the store.
        case_id: the case.
        labels: (X, Y, Z) on the image's grid.
        names: value to name.
        model: name of the bundle.
        version: of the bundle.
        record: of the run.
        runtime_s: seconds that it took.
        device: on which it ran.
        uncertainty: entropy (X, Y, Z) of each voxel, 0 (sure) to 1.
        evidence: where a diagnosis sees its evidence (X, Y, Z), 0 to 1.
        phases: what the network saw, on the image's grid; kept to be looked at where there are several.
        by: who asked for it.

    Raises:
        InputError: no such case. OutputError: the file cannot be written. PermissionError: a reader may not.
    """
    case = store.case(case_id)
    shown = {value: name for value, name in names.items() if value != 0}
    prediction_id = new_id()
    path = store.folder / case_id / f"prediction_{prediction_id}.nii.gz"
    grid = store.file(case.grid_path)
    sha256 = write_mask(path, labels, grid, shown)
    unsure = None
    if uncertainty is not None:
        unsure = path.with_name(f"uncertainty_{prediction_id}.nii.gz")
        write_map(unsure, uncertainty, grid)
    seen = None
    if evidence is not None:
        seen = path.with_name(f"evidence_{prediction_id}.nii.gz")
        write_map(seen, evidence, grid)
    prediction = Prediction(
        id=prediction_id,
        case_id=case_id,
        model=model,
        bundle_version=version,
        mask_sha256=sha256,
        labels={str(value): name for value, name in shown.items()},
        record=dict(record or {}),
        runtime_s=runtime_s,
        device=device,
    )
    kept = {} if phases is None else _keep_phases(path.parent, prediction_id, phases)
    store.add_prediction(prediction, mask=path, uncertainty=unsure, evidence=seen, phases=kept, by=by)
    if store.set_labels(case_id, label_table(case_id, shown), by=by) and case.revision == 0:
        adopt(store, prediction_id, base_revision=0, by=by)
    return prediction


def _keep_phases(folder: Path, prediction_id: str, volume: PhaseVolume) -> dict[str, Path]:
    """Write the phases that are there as images of their own, each on the reference's grid; none for a single one."""
    kept: dict[str, Path] = {}
    there = [channel for channel, phase in enumerate(volume.phases) if phase is not None]
    for channel in there if len(there) > 1 else ():
        path = folder / f"phase_{prediction_id}_{channel}.nii.gz"
        made_once(path, partial(write_image, data=volume.data[channel], affine=volume.affine, whole=True))
        kept[volume.names[channel]] = path
    return kept


def add_reference(store: Store, case_id: str, file: Path, *, by: User) -> None:
    """Give a case a reference label map to compare with; a copy on the image's grid is kept.

    Raises:
        InputError: no such case, or a file that is no label map on the image's grid.
        OutputError: it cannot be written. PermissionError: a reader may not.
    """
    case = store.case(case_id)
    labels = _on_grid(store, case, file)
    path = store.folder / case_id / f"reference_{new_id()}.nii.gz"
    sha256 = write_mask(path, labels, store.file(case.grid_path), ())
    try:
        store.set_reference(case_id, path, sha256, by=by)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def label_table(case_id: str, names: Mapping[int, str]) -> list[Label]:
    """The rows of a case's label table, coloured as the pictures are.

    Raises:
        UsageError: more labels than the viewer can draw.
    """
    screen = screen_values(names)
    colours = label_colours(len(screen))
    return [
        Label(case_id=case_id, value=value, name=names[value], r=red, g=green, b=blue, screen_value=screen[value])
        for value, (red, green, blue) in zip(sorted(screen), colours, strict=True)
    ]


def _import(store: Store, scans: Mapping[str, Sequence[Path]], results: Mapping[str, Path], *, by: User) -> Import:
    added, known, problems = [], 0, []
    there = {store.file(row.case.sources[0]) for row in store.worklist()}
    for name, files in scans.items():
        if files[0].absolute() in there:
            known += 1
            continue
        result = results[name]
        record = _record(result.with_name(split_suffix(result)[0] + ".json")) if result.exists() else None
        try:
            case = add_scan(store, files, name=name, by=by, record=record)
        except MedsegError as error:
            problems.append(f"{name}: {error.problem}")
            continue
        added.append(case.id)
        try:
            _add_file(store, case, result, record, by=by)
        except MedsegError as error:
            problems.append(f"{result.name}: {error.problem}")
        if (reference := label_map_of(files[0])) is not None:
            try:
                add_reference(store, case.id, reference, by=by)
            except MedsegError as error:
                problems.append(f"{reference.name}: {error.problem}")
    log.info("imported %d cases, %d known, %d problems", len(added), known, len(problems))
    return Import(tuple(added), known, tuple(problems))


def _shown(scans: Sequence[Path], record: Record | None) -> tuple[Path, int]:
    """The file that is shown of a scan, and its channel: the reference of a diagnosis, whose grid the result has."""
    phases = record.diagnosis.phases if record is not None and record.diagnosis is not None else ()
    for place, phase in enumerate(phases):
        if phase.reference and len(scans) == 1 and len(phases) > 1:
            return scans[0], place
        if phase.reference:
            return next((scan for scan in scans if scan.name == phase.file), scans[0]), 0
    return scans[0], 0


def _add_file(store: Store, case: Case, mask: Path, record: Record | None, *, by: User) -> None:
    """Add the segmentation file of a scan, if there is one.

    Raises:
        InputError: it is not on the scan's grid, or cannot be read.
    """
    if not mask.exists():
        return
    labels = _on_grid(store, case, mask)
    found = sorted({int(value) for value in np.unique(labels)} - {0})
    names = {value: f"label {value}" for value in found}
    if record is None:
        add_result(store, case.id, labels, names=names, model="unknown model", by=by)
        return
    names = names | {label.value: label.name for label in record.labels}
    add_result(
        store,
        case.id,
        labels,
        names=names,
        model=record.bundle.name,
        version=record.bundle.version,
        record=record.model_dump(mode="json"),
        runtime_s=sum(record.seconds.values()),
        device=record.device,
        uncertainty=_map(mask, "uncertainty", labels.shape),
        evidence=None if record.diagnosis is None else _map(mask, "evidence", labels.shape),
        by=by,
    )


def _map(mask: Path, kind: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.floating]] | None:
    """The map of uncertainty or evidence that `medseg batch` wrote beside a segmentation; None without one.

    Raises:
        InputError: it cannot be read, or has another shape.
    """
    file = mask.with_name(f"{split_suffix(mask)[0]}_{kind}.nii.gz")
    if not file.exists():
        return None
    found = read_volume(file)
    if found.data.shape != (1, *shape):
        raise InputError(file, "not on the scan's grid", "run the model again")
    values: np.ndarray[Any, np.dtype[np.floating]] = found.data[0]
    return values


def _on_grid(store: Store, case: Case, file: Path) -> np.ndarray[Any, np.dtype[np.integer]]:
    """A label map (X, Y, Z) that lies on a case's grid.

    Raises:
        InputError: it does not, or cannot be read.
    """
    labels, affine = read_labels(file)
    _, grid = read_labels(store.file(case.grid_path))
    near = GRID_TOLERANCE * float(spacing(grid).min())
    if labels.shape != tuple(case.shape) or corner_shift(labels.shape, grid, affine) > near:
        raise InputError(file, "not on the scan's grid", "run the model again, or give the label map of this scan")
    return labels


def _guessed(volume: Volume) -> str:
    """CT or MR by the look of the scan: presets and units follow from it; "" when it could be anything."""
    found = guess_modality(volume.data)
    return found if found in {"CT", "MR"} else ""


def _record(path: Path) -> Record | None:
    """The record beside a segmentation; None without one."""
    try:
        return Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None


def _keep(upload: Path, folder: Path) -> Path:
    """Copy an uploaded DICOM archive, file or folder into a case's folder; nothing of it is ever served."""
    if upload.is_dir():
        return Path(shutil.copytree(upload, folder / "dicom"))
    kept = folder / ("dicom.zip" if is_archive(upload) else "dicom.dcm")
    shutil.copyfile(upload, kept)
    kept.chmod(0o600)
    return kept


def _convert(path: Path, volume: Volume, *, channels: bool = False) -> Path:
    """Write the first channel, or all of them, as NIfTI without identity, float32."""
    with OutputSet() as files:
        files.add_float(path, volume.data if channels else volume.data[0], volume)
    return path
