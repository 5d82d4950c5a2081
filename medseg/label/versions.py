"""Training from submitted labels: a new version of a bundle beside the old one, which stays as it is."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from medseg.bundles.load import Bundle
from medseg.bundles.pack import pack_bundle
from medseg.bundles.spec import read_json
from medseg.errors import BundleError, InputError
from medseg.io.read import read_labels, read_volume
from medseg.io.write import OutputSet
from medseg.label.catalogue import PARENT
from medseg.label.parameters import TrainParameters
from medseg.training.config import TrainingConfig
from medseg.training.loop import Progress
from medseg.training.run import read_recipe, train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submitted:
    """A label map that was handed in.

    Attributes:
        image: the image's file.
        label: the label map's file, on the image's grid.
        names: value in the file to the label's name, as the viewer sent it; empty for the bundle's own values.
    """

    image: Path
    label: Path
    names: Mapping[int, str]


def read_names(label_info: Any) -> dict[int, str]:
    """Value to name of what 3D Slicer sends with a label map: a list of {"name": ..., "idx": ...}.

    Anything else gives nothing: the file's values then are the bundle's.
    """
    found: dict[int, str] = {}
    for entry in label_info if isinstance(label_info, list) else []:
        with suppress(TypeError, KeyError, ValueError):
            found[int(entry["idx"])] = str(entry["name"])
    return found


def fine_tune(
    bundle: Bundle,
    cases: Iterable[Submitted],
    folder: Path,
    name: str,
    settings: TrainParameters,
    report: Callable[[Progress, float], None] | None = None,
) -> Path:
    """Train a bundle's network on, starting from its weights.

    Args:
        bundle: it is read only.
        cases: label maps with labels of other bundles, or values that this one does not have, are left out.
        folder: gets the new bundle; it appears there whole or not at all.
        name: the new bundle's.
        settings: length, pace and device.
        report: progress of the training (progress, share done).

    Returns:
        The new bundle's folder.

    Raises:
        InputError: no label map fits the bundle.
        OutputError: a bundle of that name is there, or it cannot be written.
        UsageError, BundleError, DeviceError: see `medseg.training.run.train`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    work = Path(tempfile.mkdtemp(prefix=f".training-{os.getpid()}-", dir=folder))
    try:
        count = _write_dataset(bundle, cases, work / "data")
        run = work / "run"
        end = train(_config(bundle, settings), work / "data", run, device=settings.device, report=report)
        _describe(run / "configs" / "metadata.json", bundle, name, cases=count, steps=end.step)
        return pack_bundle(run, name, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def default_parameters(bundle: Bundle) -> TrainParameters:
    """A bundle's own pace, slowed down for weights that are good already."""
    recipe = _recipe(bundle)
    return TrainParameters(learning_rate=recipe.learning_rate / 5, batch_size=min(recipe.batch_size, 16))


def _recipe(bundle: Bundle) -> TrainingConfig:
    """The settings that the bundle was trained with, or plain ones where it does not tell."""
    try:
        return TrainingConfig(**{"steps": 1, **read_recipe(str(bundle.root))})
    except (BundleError, ValueError):
        plain: dict[str, Any] = {"architecture": bundle.spec.network, "bundle": str(bundle.root), "steps": 1}
        return TrainingConfig(**plain)


def _config(bundle: Bundle, settings: TrainParameters) -> TrainingConfig:
    return TrainingConfig(
        **{
            **_recipe(bundle).model_dump(),
            "weights": str(bundle.weights),
            "freeze_encoder": 0,
            "steps": settings.steps,
            "decay_steps": None,
            "max_minutes": settings.max_minutes,
            "warmup_steps": min(50, settings.steps // 10),
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
        }
    )


def _write_dataset(bundle: Bundle, cases: Iterable[Submitted], folder: Path) -> int:
    """A data set folder in the Decathlon's layout that refers to the images; the number of its cases."""
    spec, listed, left_out = bundle.spec, [], []
    (folder / "labelsTr").mkdir(parents=True)
    for number, case in enumerate(cases):
        label = Path("labelsTr") / f"case_{number}.nii.gz"
        try:
            _write_label(case, spec.labels, folder / label)
        except InputError as err:
            left_out.append(err.problem)
            continue
        listed.append({"image": str(case.image.absolute()), "label": str(label)})
    log.info("%d label maps to learn from, %d left out", len(listed), len(left_out))
    if not listed:
        why = f"{len(left_out)} do not fit ({left_out[0]})" if left_out else "none was submitted"
        raise InputError("labels", f"nothing for {bundle.name} to learn from: {why}", "submit labels of its structures")
    own = bundle.metadata.get("medseg", {})
    described = {
        "name": "submitted labels",
        "modality": {str(index): channel for index, channel in enumerate(spec.channels)},
        "labels": {str(value): label for value, label in spec.labels.items()},
        "licence": str(own.get("data_license", "")),
        "reference": str(bundle.metadata.get("data_source", "")),
        "training": listed,
    }
    (folder / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    return len(listed)


def _write_label(case: Submitted, labels: Mapping[int, str], path: Path) -> None:
    """Write a label map with the bundle's values.

    Raises:
        InputError: it cannot be read, or holds a label that the bundle does not have.
    """
    values, _ = read_labels(case.label)
    table = _table([int(value) for value in np.unique(values) if value], case.names, labels)
    mapped = np.zeros(values.shape, dtype=np.uint8 if max(labels) < 256 else np.uint16)
    for value, meant in table.items():
        mapped[values == value] = meant
    with OutputSet() as files:
        files.add_labels(path, mapped, read_volume(case.label), names=labels)


def _table(values: Sequence[int], names: Mapping[int, str], labels: Mapping[int, str]) -> dict[int, int]:
    """Value of a file to the bundle's value for the same label.

    Raises:
        InputError: a value or a name that the bundle does not have.
    """
    if not names:
        if unknown := [value for value in values if value not in labels]:
            raise InputError("label", f"value {unknown[0]} is none of the bundle's", "submit it with its label's name")
        return {value: value for value in values}
    by_name = {label.lower(): value for value, label in labels.items()}
    table = {}
    for value in values:
        meant = by_name.get(names.get(value, "").lower())
        if meant is None:
            raise InputError("label", "a label that the bundle does not have", "rename the segment")
        table[value] = meant
    return table


def _describe(path: Path, bundle: Bundle, name: str, *, cases: int, steps: int) -> None:
    """Say in metadata.json what the version came from; figures of the old weights do not hold for the new ones."""
    metadata = read_json(path)
    version = _next_version(bundle.version)
    day = datetime.now(UTC).date().isoformat()
    metadata["version"] = version
    metadata["changelog"] = {
        **bundle.metadata.get("changelog", {}),
        version: f"{day}: {steps} steps on {cases} submitted label maps, from {bundle.name} {bundle.version}",
    }
    metadata["name"] = name
    metadata["description"] = f"{bundle.name} {bundle.version}, trained on with {cases} submitted label maps"
    own = metadata.setdefault("medseg", {})
    own.pop("calibration", None)
    own[PARENT] = {
        "name": bundle.name,
        "version": bundle.version,
        "weights_sha256": bundle.sha256,
        "cases": cases,
        "steps": steps,
    }
    path.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _next_version(version: str) -> str:
    """0.1.0 becomes 0.2.0."""
    parts = version.split(".")
    if len(parts) == 3 and all(part.isdecimal() for part in parts):
        return f"{parts[0]}.{int(parts[1]) + 1}.0"
    return "0.2.0"


def _remove_leftovers(folder: Path) -> None:
    """Folders of trainings that were killed: their process is gone."""
    for path in folder.glob(".training-*"):
        number = path.name.split("-")[1]
        if number.isdecimal() and not _alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
