"""Making a data set's folder, case by case; a run that was killed goes on where it was."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg.batch.lock import FolderLock
from medseg.datasets.check import LabelledScan, read_pair
from medseg.datasets.plan import CasePlan, Plan
from medseg.datasets.registry import planner
from medseg.datasets.source import Source, check_room, open_source
from medseg.errors import InputError, MedsegError, OutputError, PartialError
from medseg.io.files import split_suffix
from medseg.io.write import reserve, write_bytes, write_labels

log = logging.getLogger(__name__)

_STATE = "prepare.json"
_SAME_GRID = 0.01  # voxels


@dataclass
class Prepared:
    """What was made.

    Attributes:
        root: the folder.
        title: the data set's name.
        made: cases made by this run.
        kept: cases that an earlier run had made.
        parts: cases of each part of split.json; empty where no split is published.
        warnings: what is worth knowing, a line each.
    """

    root: Path
    title: str
    made: int = 0
    kept: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def prepare(name: str, path: Path, root: Path, *, progress: Callable[[int, int, str], None] | None = None) -> Prepared:
    """Make a folder that `medseg train` reads from what a data set's site hands out.

    Each case is checked (readable, one grid, known label values) and appears whole or not at all; dataset.json is
    written last, when all cases are there.

    Args:
        name: a data set of `registry.names()`.
        path: folder or archive as it was downloaded.
        root: folder to make; one that an earlier run for the same data set began is completed.
        progress: called with (cases done, all, the case's name) before each case.

    Raises:
        UsageError: no such data set.
        InputError: the source is not this data set, or lacks files.
        PartialError: some cases cannot be used; the others are made, and another run tries only those.
        OutputError: the folder holds something else, or cannot be written.
    """
    plan_of = planner(name)
    if not path.exists():
        raise InputError(path, "no such file", "check the path")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise OutputError(root, f"cannot be made ({err.strerror})", "choose another folder") from err
    _claim(root, name)
    with FolderLock(root):
        for leftover in root.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with open_source(path, root) as source:
            return _make(source, plan_of(source), root, progress)


def _claim(root: Path, name: str) -> None:
    """Keep two data sets out of one folder."""
    state = root / _STATE
    if state.exists():
        try:
            held = json.loads(state.read_text(encoding="utf-8"))["dataset"]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise OutputError(state, f"cannot be read ({err!r})", "choose another folder") from err
        if held != name:
            raise OutputError(root, f"holds the data set {held}", "choose another folder")
    elif any(root.iterdir()):
        raise OutputError(root, "is not empty, and was not made by medseg data prepare", "choose another folder")
    else:
        write_bytes(reserve(state), (json.dumps({"dataset": name}) + "\n").encode())


def _make(source: Source, plan: Plan, root: Path, progress: Callable[[int, int, str], None] | None) -> Prepared:
    result = Prepared(root, plan.title)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(exist_ok=True)
    todo = [case for case in plan.cases if not _is_made(case, root)]
    result.kept = len(plan.cases) - len(todo)
    check_room(root, sum(source.sizes[name] for case in todo for name in (*case.images, case.label)))
    failed: list[MedsegError] = []
    for done, case in enumerate(plan.cases):
        if progress is not None:
            progress(done, len(plan.cases), case.name)
        if _is_made(case, root):
            continue
        try:
            result.warnings += _make_case(source, plan, case, root)
            result.made += 1
        except InputError as err:
            failed.append(err)
    if failed and result.made + result.kept == 0 and len(failed) == 1:
        raise failed[0]
    if failed:
        named = "; ".join(str(error) for error in failed[:3]) + ("; ..." if len(failed) > 3 else "")
        remedy = "repair the download and run the same command again"
        raise PartialError(source.path, f"{len(failed)} of {len(plan.cases)} cases cannot be used: {named}", remedy)
    if plan.expected is not None and plan.expected != len(plan.cases):
        result.warnings.append(f"{len(plan.cases)} cases, but the site hands out {plan.expected}")
    names = {case.name for case in plan.cases}
    parts = {part: [name for name in wanted if name in names] for part, wanted in plan.parts.items()}
    absent = sum(len(wanted) for wanted in plan.parts.values()) - sum(len(found) for found in parts.values())
    if absent:
        result.warnings.append(f"{absent} cases of the published split are not in {source.path.name}")
    result.parts = {part: len(found) for part, found in parts.items()}
    if parts:
        write_bytes(reserve(root / "split.json", overwrite=True), (json.dumps(parts, indent=2) + "\n").encode())
    described = json.dumps(_described(plan), indent=2, ensure_ascii=False) + "\n"
    write_bytes(reserve(root / "dataset.json", overwrite=True), described.encode())
    return result


def _files(case: CasePlan) -> tuple[list[str], str]:
    """Names of a case's files below the data set's folder: images, label map."""
    if len(case.images) == 1:
        images = [f"imagesTr/{case.name}{split_suffix(case.images[0])[1]}"]
    else:
        images = [f"imagesTr/{case.name}_{i:04d}{split_suffix(name)[1]}" for i, name in enumerate(case.images)]
    return images, f"labelsTr/{case.name}.nii.gz"


def _is_made(case: CasePlan, root: Path) -> bool:
    """The label map is put in its place last."""
    return (root / _files(case)[1]).exists()


def _make_case(source: Source, plan: Plan, case: CasePlan, root: Path) -> list[str]:
    """One case, checked in a folder of its own and then moved; what is worth knowing about it."""
    images, label = _files(case)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as name:
        work = Path(name)
        copies = [work / Path(image).name for image in images]
        for member, copy in zip(case.images, copies, strict=True):
            source.copy(member, copy)
        given = work / f"given_{split_suffix(case.label)[0]}{split_suffix(case.label)[1]}"
        source.copy(case.label, given)
        values = plan.labels if plan.remap is None else range(256)
        try:
            pair = read_pair(copies, given, channels=len(plan.channels), values=values)
        except MedsegError as err:
            raise InputError(f"case {case.name}", err.problem, err.remedy) from err
        ready = _label_map(pair, plan, given, work / "label.nii.gz")
        for copy, image in zip(copies, images, strict=True):
            copy.replace(root / image)
        ready.replace(root / label)
    if pair.shift > _SAME_GRID:
        return [f"case {case.name}: its label map lay {pair.shift:.2g} voxels off and has the image's header now"]
    return []


def _label_map(pair: LabelledScan, plan: Plan, given: Path, target: Path) -> Path:
    """The label map to keep: the one given, or one with other values or on the image's exact grid."""
    if plan.remap is None and pair.shift <= _SAME_GRID and split_suffix(given)[1] == ".nii.gz":
        return given
    table = np.arange(256, dtype=np.uint8)
    if plan.remap is not None:
        table[:] = 0
        for value, becomes in plan.remap.items():
            table[value] = becomes
    return write_labels(target, table[pair.labels], pair.volume, names=dict(plan.labels))


def _described(plan: Plan) -> dict[str, Any]:
    """dataset.json, in the layout of the Medical Segmentation Decathlon."""
    training = []
    for case in plan.cases:
        images, label = _files(case)
        named = [f"./{image}" for image in images]
        training.append({"image": named[0] if len(named) == 1 else named, "label": f"./{label}"})
    return {
        "name": plan.title,
        "reference": plan.reference,
        "licence": plan.licence,
        "modality": {str(i): channel for i, channel in enumerate(plan.channels)},
        "labels": {str(value): label for value, label in plan.labels.items()},
        "numTraining": len(training),
        "training": training,
    }
