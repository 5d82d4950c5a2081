"""Folders of labelled cases: the Medical Segmentation Decathlon's layout and nnU-Net's raw layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.errors import InputError
from medseg.io import geometry
from medseg.io.files import split_suffix

GRID_TOLERANCE = 0.1
"""Largest distance, in voxels, between the corners of the grids of a scan and its label map."""

_IGNORED, _HIGHEST = "ignore", 254


@dataclass(frozen=True)
class CaseFiles:
    """One labelled case: a file for each channel (or one file of several channels) and its label map."""

    name: str
    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class Dataset:
    """What dataset.json says, with the files that were found.

    Attributes:
        root: the folder.
        name: the data set's name.
        channels: name of each channel ("MRI", "CT", "T1", ...).
        labels: value to name, 0 (background) included; without the one to be ignored.
        ignore: value of voxels that were not annotated, or None.
        cases: the labelled cases, by name.
        reference: credit, as the file gives it.
        licence: licence, as the file gives it.
    """

    root: Path
    name: str
    channels: tuple[str, ...]
    labels: Mapping[int, str]
    cases: tuple[CaseFiles, ...]
    reference: str = ""
    licence: str = ""
    ignore: int | None = None

    @property
    def modality(self) -> str:
        """What the channel names say: CT, MR, or an empty string."""
        words = " ".join(self.channels).upper()
        if words == "CT":
            return "CT"
        return "MR" if any(word in words for word in ("MR", "T1", "T2", "FLAIR", "ADC")) else ""

    def part(self, names: Sequence[str]) -> tuple[CaseFiles, ...]:
        """The named cases, in the given order.

        Raises:
            InputError: a name has no case.
        """
        by_name = {case.name: case for case in self.cases}
        missing = [name for name in names if name not in by_name]
        if missing:
            raise InputError(self.root, f"{len(missing)} cases of the split are missing ({missing[0]}, ...)")
        return tuple(by_name[name] for name in names)


def grid_shift(shape: Sequence[int], affine: geometry.Affine, other: geometry.Affine) -> float:
    """Largest distance between the corners of two grids of one shape, in voxels."""
    return float(geometry.corner_shift(shape, affine, other) / geometry.spacing(affine).min())


def read_dataset(root: Path) -> Dataset:
    """Read a data set folder.

    Args:
        root: holds dataset.json, imagesTr/ and labelsTr/, as the Decathlon (``training`` list, one file a case)
            or as nnU-Net raw data (``channel_names``, ``CASE_0000.nii.gz`` a channel).

    Raises:
        InputError: the folder or a file is missing, or dataset.json contradicts itself.
    """
    path = root / "dataset.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(path, "no such file", "give a folder in MSD or nnU-Net raw layout") from None
    except (OSError, ValueError) as err:
        raise InputError(path, f"cannot be read as JSON ({err})", "restore the file") from err
    channels = described.get("channel_names") or described.get("modality")
    if not isinstance(channels, dict) or not isinstance(described.get("labels"), dict):
        raise InputError(path, "no channel_names (or modality) and labels", "see docs/training.md for the layout")
    names = tuple(str(channels[key]) for key in sorted(channels, key=int))
    cases = _listed(root, described) if "training" in described else _numbered(root, len(names), described)
    if not cases:
        raise InputError(root, "no labelled cases found", "imagesTr/ and labelsTr/ should hold them")
    labels, ignore = _labels(described["labels"], path)
    return Dataset(
        root=root,
        name=str(described.get("name", root.name)),
        channels=names,
        labels=labels,
        cases=tuple(sorted(cases, key=lambda case: case.name)),
        reference=str(described.get("reference", "")),
        licence=str(described.get("licence", described.get("license", ""))),
        ignore=ignore,
    )


def _labels(described: Mapping[str, Any], path: Path) -> tuple[dict[int, str], int | None]:
    """Value to name, and the value of the label named ``ignore``, which is the highest one as in nnU-Net."""
    try:
        if all(key.isdecimal() for key in described):
            found = {int(value): str(name) for value, name in described.items()}
        else:
            found = {int(value): str(name) for name, value in described.items()}
    except (TypeError, ValueError):
        raise InputError(path, "labels that overlap (regions)", "medseg trains on exclusive labels") from None
    ignored = [value for value, name in found.items() if name.lower() == _IGNORED]
    if len(ignored) > 1 or (ignored and ignored[0] != max(found)):
        raise InputError(path, f"label {_IGNORED!r} is not the highest value", "give it the highest, as in nnU-Net")
    labels = dict(sorted((value, name) for value, name in found.items() if value not in ignored))
    if 0 not in labels or len(labels) < 2 or min(labels) < 0 or max(labels) > _HIGHEST:
        raise InputError(path, f"label values {sorted(found)}", f"they must be 0 (background) and others to {_HIGHEST}")
    return labels, ignored[0] if ignored else None


def _listed(root: Path, described: Mapping[str, Any]) -> list[CaseFiles]:
    cases = []
    for entry in described["training"]:
        try:
            named = [entry["image"]] if isinstance(entry["image"], str) else list(entry["image"])
            images, label = tuple(root / image for image in named), root / entry["label"]
        except (KeyError, TypeError):
            wanted = 'an entry is {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}'
            raise InputError(root / "dataset.json", "an entry of training names no files", wanted) from None
        for path in (*images, label):
            if not path.exists():
                raise InputError(path, "named in dataset.json, no such file", "complete the data set")
        name = split_suffix(images[0] if len(images) == 1 else label)[0]
        cases.append(CaseFiles(name, images, label))
    return cases


def _numbered(root: Path, channels: int, described: Mapping[str, Any]) -> list[CaseFiles]:
    ending = str(described.get("file_ending", ".nii.gz"))
    cases = []
    for label in sorted((root / "labelsTr").glob("*" + ending)):
        name = split_suffix(label)[0]
        images = tuple(root / "imagesTr" / f"{name}_{index:04d}{ending}" for index in range(channels))
        for path in images:
            if not path.exists():
                raise InputError(path, "no such file, but its label map is there", "complete the data set")
        cases.append(CaseFiles(name, images, label))
    return cases
