"""Which prediction belongs to which reference, and what the labels are called."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.errors import InputError, UsageError
from medseg.io.files import VOLUME_SUFFIXES, split_suffix


@dataclass(frozen=True, slots=True)
class Pair:
    """The two files of one case."""

    case: str
    prediction: Path
    reference: Path


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that could not be evaluated, and why."""

    case: str
    problem: str


@dataclass(frozen=True, slots=True)
class Pairing:
    """The cases of two folders.

    Attributes:
        pairs: cases with both files, by name.
        missing: cases without a prediction.
        extra: predictions without a reference.
        failed: cases whose files are ambiguous, or that have no reference although they were asked for.
    """

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    failed: tuple[Failure, ...] = ()


def case_name(path: Path) -> str:
    """The case that a file belongs to: its name without format suffix, ``_seg`` (medseg) and ``_0000`` (nnU-Net)."""
    return _stem(path).removesuffix("_seg").removesuffix("_0000")


def pair_cases(prediction: Path, reference: Path, *, cases: Collection[str] | None = None) -> Pairing:
    """Pair the files of two folders by case name, or two single files.

    In a folder that holds both ``NAME`` and ``NAME_seg``, the second is the segmentation and the first the scan.

    Args:
        prediction: folder, or one file.
        reference: folder, or one file; the same kind as `prediction`.
        cases: with folders, only these cases.

    Raises:
        InputError: a path does not exist, or the reference folder holds no volume.
        UsageError: one is a folder and the other a file, or both are the same, or `cases` comes with single files.
    """
    for path in (prediction, reference):
        if not path.exists():
            raise InputError(path, "no such file or folder", "check the path")
    if prediction.samefile(reference):
        raise UsageError(prediction, "prediction and reference are the same", "give two different paths")
    if prediction.is_dir() != reference.is_dir():
        raise UsageError(prediction, "one of prediction and reference is a folder, the other a file", "give two alike")
    if not reference.is_dir():
        if cases is not None:
            raise UsageError("--split", "needs folders", "give the folders of predictions and references")
        return Pairing((Pair(case_name(reference), prediction, reference),))

    predictions, references = _volumes(prediction), _volumes(reference)
    if not references:
        hint = f"did you mean {reference / 'labelsTr'}?" if (reference / "labelsTr").is_dir() else "check the path"
        raise InputError(reference, f"the folder holds no volume ({', '.join(VOLUME_SUFFIXES)})", hint)
    wanted = set(references) if cases is None else {case_name(Path(case)) for case in cases}
    pairs, missing, failed = [], [], []
    for case in sorted(wanted):
        if case not in references:
            failed.append(Failure(case, "no reference file"))
        elif case not in predictions:
            missing.append(case)
        elif crowd := next((files for files in (references[case], predictions[case]) if len(files) > 1), None):
            failed.append(Failure(case, f"several files: {', '.join(str(file) for file in crowd)}"))
        else:
            pairs.append(Pair(case, predictions[case][0], references[case][0]))
    extra = sorted(set(predictions) - set(references)) if cases is None else []
    return Pairing(tuple(pairs), tuple(missing), tuple(extra), tuple(failed))


def label_names(reference: Path) -> dict[int, str]:
    """Names of the label values from the data set's ``dataset.json``, without the background.

    The file is looked for in the reference's folder and in the one above. Both layouts are read: the Decathlon's
    ``{"1": "Anterior"}`` and nnU-Net's ``{"Anterior": 1}``; nnU-Net's regions (lists of values) have no single value
    and are left out.

    Args:
        reference: folder of references, or one reference.

    Returns:
        Value to name; empty when there is no such file or it holds no table of labels.

    Raises:
        InputError: the file is there and cannot be read.
    """
    folder = (reference if reference.is_dir() else reference.parent).resolve()
    for candidate in (folder / "dataset.json", folder.parent / "dataset.json"):
        if candidate.is_file():
            content = _read_json(candidate)
            table = content.get("labels") if isinstance(content, Mapping) else None
            return _named_values(table) if isinstance(table, Mapping) else {}
    return {}


def _stem(path: Path) -> str:
    """File name without the format's suffix."""
    name, suffix = split_suffix(path)
    return name if suffix.lower() in VOLUME_SUFFIXES else path.name


def _volumes(folder: Path) -> dict[str, list[Path]]:
    """Volumes of a folder by case name; of a scan and its segmentation, the segmentation."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.name.lower().endswith(VOLUME_SUFFIXES) and not path.name.startswith(".") and path.is_file():
            found[case_name(path)].append(path)
    for case, files in found.items():
        segmentations = [file for file in files if _stem(file).endswith("_seg")]
        found[case] = segmentations or files
    return dict(found)


def _read_json(path: Path) -> Any:
    """Content of a JSON file, or an InputError that says why not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise InputError(path, f"cannot be read ({err.strerror or err})", "check the path") from err
    except ValueError as err:
        raise InputError(path, f"not JSON ({err})") from err


def _named_values(table: Mapping[str, Any]) -> dict[int, str]:
    """Value to name from either layout of ``labels``, without the background."""
    names: dict[int, str] = {}
    for key, entry in table.items():
        value, name = (key, entry) if isinstance(entry, str) else (entry, key)
        try:
            number = int(value)
        except (TypeError, ValueError):
            continue
        if number > 0:
            names[number] = name
    return dict(sorted(names.items()))
