"""Checks of a folder of labelled cases: that files are there, grids agree, and values mean something."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, MedsegError
from medseg.io import geometry
from medseg.io.read import read_labels, read_volume
from medseg.io.split import read_split
from medseg.io.volume import Volume
from medseg.training.dataset import GRID_TOLERANCE, Dataset, grid_shift, read_dataset


@dataclass(frozen=True)
class LabelledScan:
    """A scan and its label map, on one grid.

    Attributes:
        volume: the scan.
        labels: (X, Y, Z).
        shift: largest distance of the two grids' corners, in voxels.
    """

    volume: Volume
    labels: NDArray[np.integer]
    shift: float


def read_pair(images: Sequence[Path], label: Path, *, channels: int, values: Collection[int]) -> LabelledScan:
    """Read a scan and its label map and hold them against one another.

    Args:
        images: one file for each channel, or one of all channels.
        label: the label map.
        channels: how many channels the scan should have.
        values: label values that mean something.

    Raises:
        InputError: unreadable, another number of channels, another shape, a grid more than a voxel off, or a value
            that means nothing.
    """
    volume = read_volume(images if len(images) > 1 else images[0], channels=channels)
    labels, affine = read_labels(label)
    if labels.shape != volume.shape:
        raise InputError(label, f"grid {labels.shape} differs from its image's {volume.shape}", "resample it")
    shift = grid_shift(volume.shape, volume.affine, affine)
    if shift > 1:
        raise InputError(label, f"lies {shift:.3g} voxels off its image", "give both the same header")
    unknown = sorted({int(value) for value in np.unique(labels)} - set(values))
    if unknown:
        raise InputError(
            label, f"label values {unknown[:5]} mean nothing in this data set", "name them, or remove them"
        )
    return LabelledScan(volume, labels, shift)


@dataclass
class Findings:
    """What was found in a data set folder.

    Attributes:
        name: the data set's name.
        cases: labelled cases.
        channels: name of each channel.
        labels: value to name.
        cases_with: in how many cases each label occurs.
        volume_ml: mean volume of each label where it occurs, in millilitres.
        ignored: cases that hold voxels to be ignored.
        spacing: smallest and largest voxel size along the canonical axes, mm.
        shape: smallest and largest size along the canonical axes, voxels.
        problems: what keeps a case from being trained on, a line each.
        warnings: what is worth knowing, a line each.
    """

    name: str
    cases: int
    channels: tuple[str, ...]
    labels: dict[int, str]
    cases_with: dict[int, int] = field(default_factory=dict)
    volume_ml: dict[int, float] = field(default_factory=dict)
    ignored: int = 0
    spacing: tuple[list[float], list[float]] = ((), ())  # type: ignore[assignment]
    shape: tuple[list[int], list[int]] = ((), ())  # type: ignore[assignment]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_dataset(
    root: Path, *, split: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Findings:
    """Read every case of a folder and say what is in it, and what is wrong.

    Args:
        root: folder in MSD or nnU-Net raw layout.
        split: split file whose names are looked up too.
        progress: called with (cases done, all).

    Raises:
        InputError: the folder cannot be read as a data set at all; what is wrong with cases is in the findings.
    """
    dataset = read_dataset(root)
    found = Findings(dataset.name, len(dataset.cases), dataset.channels, dict(dataset.labels))
    values = [*dataset.labels, *([] if dataset.ignore is None else [dataset.ignore])]
    spacings, shapes = [], []
    volumes: dict[int, list[float]] = {value: [] for value in dataset.labels if value}
    for done, case in enumerate(dataset.cases, start=1):
        try:
            pair = read_pair(case.images, case.label, channels=len(dataset.channels), values=values)
        except MedsegError as err:
            found.problems.append(str(err))
        else:
            if pair.shift > GRID_TOLERANCE:
                found.problems.append(f"{case.label}: lies {pair.shift:.2g} voxels off its image")
            order = geometry.AxisOrder.to_canonical(pair.volume.affine)
            spacing = geometry.spacing(order.affine(pair.volume.affine, pair.volume.shape))
            spacings.append(spacing)
            shapes.append(order.shape(pair.volume.shape))
            counts = Counter(
                dict(zip(*(part.tolist() for part in np.unique(pair.labels, return_counts=True)), strict=True))
            )
            for value, sizes in volumes.items():
                if counts[value]:
                    sizes.append(counts[value] * float(np.prod(spacing)) / 1000)
            found.ignored += bool(dataset.ignore is not None and counts[dataset.ignore])
        if progress is not None:
            progress(done, len(dataset.cases))
    if spacings:
        found.spacing = (np.min(spacings, axis=0).round(3).tolist(), np.max(spacings, axis=0).round(3).tolist())
        found.shape = (np.min(shapes, axis=0).tolist(), np.max(shapes, axis=0).tolist())
    found.cases_with = {value: len(sizes) for value, sizes in volumes.items()}
    found.volume_ml = {value: float(np.mean(sizes)) for value, sizes in volumes.items() if sizes}
    found.warnings += [
        f"no case holds {dataset.labels[value]}" for value, count in found.cases_with.items() if not count
    ]
    found.warnings += _counts(dataset)
    if split is not None:
        found.problems += _split_problems(dataset, split)
    return found


def _counts(dataset: Dataset) -> list[str]:
    """Where dataset.json and the folders disagree about what there is."""
    described: dict[str, Any] = json.loads((dataset.root / "dataset.json").read_text(encoding="utf-8"))
    lines = []
    stated = described.get("numTraining")
    if isinstance(stated, int) and stated != len(dataset.cases):
        lines.append(f"dataset.json speaks of {stated} training cases, {len(dataset.cases)} are listed")
    used = {path.resolve() for case in dataset.cases for path in (*case.images, case.label)}
    for folder in ("imagesTr", "labelsTr"):
        files = (dataset.root / folder).glob("*") if (dataset.root / folder).is_dir() else ()
        extra = [path.name for path in files if not path.name.startswith(".") and path.resolve() not in used]
        if extra:
            lines.append(f"{len(extra)} files in {folder} belong to no labelled case ({min(extra)}, ...)")
    return lines


def _split_problems(dataset: Dataset, split: Path) -> list[str]:
    names = {case.name for case in dataset.cases}
    lines = []
    for part, wanted in read_split(split).items():
        missing = [name for name in wanted if name not in names]
        if missing:
            lines.append(f"{split}: {len(missing)} cases of part {part!r} are not there ({missing[0]}, ...)")
    return lines
