"""A folder of synthetic patients in the Medical Segmentation Decathlon's layout, with patients.csv beside it.

DIR/dataset.json            modality, labels, classes, the list of cases; written last
DIR/patients.csv            case, age, sex, class, remark
DIR/phantom.json            seed and options: what a second run into the folder is held against
DIR/split.json              parts, where they are asked for
DIR/imagesTr/CASE.nii.gz    int16 HU, the phases along the fourth axis
DIR/labelsTr/CASE.nii.gz    uint8
DIR/truth/CASE.json         look, subtype, place, size; written when the case is complete
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import OutputError
from medseg.phantom import SYNTHETIC
from medseg.phantom.pancreas import LABELS, PHASES, Case, Options, make_case
from medseg.phantom.patients import CODES, TYPES

GENERATOR = 1
"""Raised when the same seed gives other bytes than before."""


def case_name(number: int) -> str:
    """The name of a case in files and tables."""
    return f"pancreas_{number:05d}"


def write_dataset(
    root: Path,
    cases: int,
    seed: int,
    options: Options | None = None,
    *,
    split: Sequence[tuple[str, int]] = (),
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write patients 0 .. `cases` - 1 of a seed; those that the folder holds already are kept.

    Args:
        root: the folder, made if it is not there.
        cases: how many; a larger number later adds the others.
        seed: of the data set.
        options: see `Options`; None: the default ones.
        split: name and number of cases of each part, in the order of the cases; empty: no split.json.
        workers: processes that make cases.
        progress: called with (done, all).

    Returns:
        How many cases were made now.

    Raises:
        OutputError: the folder holds another data set, or cannot be written.
        ValueError: the parts do not add up to the cases.
    """
    if split and sum(count for _, count in split) != cases:
        raise ValueError(f"the parts hold {sum(count for _, count in split)} cases, not {cases}")
    options = options or Options()
    try:
        _claim(root, {"remark": SYNTHETIC, "generator": GENERATOR, "seed": seed, "options": asdict(options)})
        missing = [number for number in range(cases) if not (root / "truth" / f"{case_name(number)}.json").is_file()]
        done = cases - len(missing)
        for _ in _made(root, missing, seed, options, workers):
            done += 1
            if progress is not None:
                progress(done, cases)
        _write_tables(root, cases, split)
    except OSError as err:
        raise OutputError(root, f"cannot be written ({err.strerror or err})", "check the folder and the disk") from err
    return len(missing)


def _claim(root: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or find it made with the same settings."""
    path = root / "phantom.json"
    text = json.dumps(settings, indent=2) + "\n"
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise OutputError(root, "holds phantoms of another seed or other options", "choose another folder")
    elif root.exists() and any(root.iterdir()):
        raise OutputError(root, "holds other files", "choose another folder")
    for folder in ("imagesTr", "labelsTr", "truth"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    _write(path, text.encode())


def _made(root: Path, numbers: Sequence[int], seed: int, options: Options, workers: int) -> Iterator[None]:
    """Make cases; yields after each."""
    if workers <= 1 or len(numbers) < 2:
        for number in numbers:
            write_case(root, seed, number, options)
            yield
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(numbers)), mp_context=context, initializer=_leave_signals)
    try:
        for future in as_completed([pool.submit(write_case, root, seed, number, options) for number in numbers]):
            future.result()
            yield
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the work


def write_case(root: Path, seed: int, number: int, options: Options) -> None:
    """Make one case and write its files, the truth last."""
    case, name = make_case(seed, number, options), case_name(number)
    images = np.ascontiguousarray(np.moveaxis(case.phases, 0, -1))
    _write(root / "imagesTr" / f"{name}.nii.gz", nifti_bytes(images, case.grid.affine))
    _write(root / "labelsTr" / f"{name}.nii.gz", nifti_bytes(case.labels, case.grid.affine))
    truth = {"remark": SYNTHETIC, "case": name, "seed": seed, "number": number, **truth_of(case)}
    _write(root / "truth" / f"{name}.json", (json.dumps(truth, indent=2) + "\n").encode())


def truth_of(case: Case) -> dict[str, Any]:
    """What is known of a case; lengths in mm, volumes in ml."""
    voxel = float(np.prod(case.grid.spacing)) / 1000
    none = case.plan.look == "normal"
    return {
        "class": case.patient.type,
        "look": case.patient.look,
        "subtype": case.plan.subtype,
        "age": case.patient.age,
        "sex": case.patient.sex,
        "site": None if none else round(case.plan.site, 4),
        "radius_mm": None if none else round(case.plan.radius, 3),
        "pancreas_ml": round(voxel * int((case.labels == 1).sum()), 3),
        "lesion_ml": round(voxel * int((case.labels > 1).sum()), 3),
        "motion_mm": {name: case.motion[phase].round(3).tolist() for phase, name in enumerate(PHASES)},
    }


def nifti_bytes(data: NDArray[Any], affine: NDArray[np.float64]) -> bytes:
    """A gzipped NIfTI-1 file; the same data are the same bytes."""
    import nibabel as nib

    image: Any = nib.Nifti1Image(data, affine)  # type: ignore[no-untyped-call]
    image.header["descrip"] = SYNTHETIC.encode()
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


def _write_tables(root: Path, cases: int, split: Sequence[tuple[str, int]]) -> None:
    """patients.csv, split.json, README.md and dataset.json, from the truth of each case."""
    names = [case_name(number) for number in range(cases)]
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("case", "age", "sex", "class", "remark"))
    for name in names:
        truth = json.loads((root / "truth" / f"{name}.json").read_text(encoding="utf-8"))
        rows.writerow((name, truth["age"], truth["sex"], truth["class"], SYNTHETIC))
    _write(root / "patients.csv", table.getvalue().encode())
    _write(root / "README.md", _README.encode())
    if split:
        ends = np.cumsum([count for _, count in split]).tolist()
        parts = {part: names[end - count : end] for (part, count), end in zip(split, ends, strict=True)}
        _write(root / "split.json", (json.dumps(parts, indent=1) + "\n").encode())
    described = {
        "name": "Pancreas phantom",
        "description": f"Multi-phase CT of the pancreas, {SYNTHETIC}",
        "reference": f"made by medseg phantom pancreas; {SYNTHETIC}",
        "licence": "Apache-2.0",
        "tensorImageSize": "4D",
        "modality": {str(phase): f"CT {name}" for phase, name in enumerate(PHASES)},
        "labels": {str(value): name for value, name in LABELS.items()},
        "classes": {kind.code: kind.name for kind in TYPES},
        "numTraining": cases,
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names],
    }
    _write(root / "dataset.json", (json.dumps(described, indent=1) + "\n").encode())


_README = f"""# Pancreas phantom: {SYNTHETIC}

Drawn by `medseg phantom pancreas`; no patient is behind any of these files. Images hold the phases {", ".join(PHASES)}
along the fourth axis in HU. `patients.csv` holds age, sex and class ({", ".join(CODES)}), `truth/` what was drawn.
"""


def _write(path: Path, data: bytes) -> None:
    """A whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        with suppress(FileNotFoundError):
            aside.unlink()
