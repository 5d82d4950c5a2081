"""`medseg train`: from a folder of labelled cases to a run folder that is a bundle already."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg.bundles.spec import BundleSpec, IntensityStep, SliceSpec
from medseg.bundles.write import write_configs
from medseg.errors import InputError, OutputError, UsageError
from medseg.inference.device import choose_device
from medseg.io.split import read_part
from medseg.networks.facts import read_facts
from medseg.networks.fit import fit
from medseg.networks.registry import create
from medseg.training.config import TrainingConfig
from medseg.training.data import cache_cases
from medseg.training.dataset import CaseFiles, Dataset, read_dataset
from medseg.training.fingerprint import (
    Fingerprint,
    derive_intensity,
    derive_roi,
    derive_spacing,
    derive_suitability,
    fingerprint,
)
from medseg.training.loop import Progress, Trainer

log = logging.getLogger(__name__)

_THICK = 1.5  # voxels this much longer along one axis than along the others are slices
_SLICE_LIMIT = 320  # pixels of a window over slices, when it is derived

Report = Callable[[str, int, int], None]


def train(
    config: TrainingConfig,
    data: Path,
    output: Path,
    *,
    split: Path | None = None,
    part: str = "train",
    resume: bool = False,
    device: str = "auto",
    prepare: Report | None = None,
    report: Callable[[Progress, float], None] | None = None,
) -> Progress:
    """Train a network on a data set folder.

    Args:
        config: the settings; what is None there is derived from the training cases.
        data: folder in MSD or nnU-Net raw layout.
        output: the run's folder, made here: configs/, models/model.pt, last.pt, metrics.csv, tensorboard/.
        split: JSON file of case names; without it all cases are training cases.
        part: the part of the split to train on; no other case is read.
        resume: go on with the run in `output`, with the settings it was started with.
        device: auto, cpu, cuda or cuda:N.
        prepare: progress of the preparation (stage, done, all).
        report: progress of the training (progress, share done).

    Returns:
        Where the run stands at its end.

    Raises:
        InputError: unusable data. OutputError: `output` holds a run already. UsageError: a setting that does
            not fit the architecture.
    """
    dataset = read_dataset(data)
    cases = _training_cases(dataset, split, part)
    learn, held_out = divide(cases, config.holdout, config.seed)
    if resume:
        if not (output / "last.pt").exists():
            raise InputError(output, "holds no last.pt, nothing to resume", "start without --resume")
        config, spec = load_run(output)
        learn, held_out = divide(cases, config.holdout, config.seed)
    else:
        if (output / "last.pt").exists() or (output / "configs").exists():
            raise OutputError(output, "holds a run already", "use --resume, or another --output")
        spec = derive_spec(config, dataset, cases, prepare)
        output.mkdir(parents=True, exist_ok=True)
        write_configs(output, spec, metadata_of(dataset, spec, len(learn), len(held_out)), train_config(config))
    trainer = Trainer(config, spec, output, choose_device(device))
    if resume:
        trainer.resume()
    elif config.weights is not None:
        log.info("start: %s", trainer.start_from(Path(config.weights)))
    cached = cache_cases([*learn, *held_out], spec, None if prepare is None else _stage(prepare, "preprocess"))
    return trainer.run(cached[: len(learn)], cached[len(learn) :], report)


def _training_cases(dataset: Dataset, split: Path | None, part: str) -> tuple[CaseFiles, ...]:
    if split is None:
        return dataset.cases
    return dataset.part(read_part(split, part))


def divide(cases: Sequence[CaseFiles], share: float, seed: int) -> tuple[list[CaseFiles], list[CaseFiles]]:
    """Cases to learn from, and a random share held out to choose the best weights."""
    count = min(round(share * len(cases)), len(cases) - 1)
    order = np.random.default_rng([seed, 2]).permutation(len(cases))
    return [cases[i] for i in sorted(order[count:])], [cases[i] for i in sorted(order[:count])]


def derive_spec(
    config: TrainingConfig, dataset: Dataset, cases: Sequence[CaseFiles], prepare: Report | None = None
) -> BundleSpec:
    """The specification that training and inference share, from the settings and the data's fingerprint.

    Raises:
        UsageError: the architecture refuses its arguments or the window.
    """
    found = fingerprint(dataset, cases, None if prepare is None else _stage(prepare, "fingerprint"))
    spacing = config.spacing or derive_spacing(found)
    intensity, padding_value = _intensity(config, found, dataset)
    slices, wanted = _window(config, found, spacing)
    reach = 1 if slices is None else 2 * slices.neighbours + 1
    try:
        fitted = fit(
            config.architecture,
            wanted,
            in_channels=reach * len(dataset.channels),
            out_channels=len(dataset.labels),
            given=config.network,
        )
    except (ValueError, TypeError) as err:
        raise UsageError(config.architecture, str(err), "see medseg networks show, and --network") from err
    size = list(fitted.size)
    if slices is not None:
        size.insert(slices.axis, 1)
    x, y, z = config.roi_size or size
    spec = BundleSpec(
        network=config.architecture,
        network_args=fitted.arguments,
        channels=dataset.channels,
        labels=dataset.labels,
        spacing=spacing,
        intensity=intensity,
        roi_size=(x, y, z),
        padding_value=padding_value,
        mirror_axes=config.mirror_axes,
        slices=slices,
        sw_batch_size=1 if slices is None else 8,
        suitability=derive_suitability(found, dataset.modality),
    )
    try:
        network = create(spec.network, **spec.network_args).eval()
        with torch.inference_mode():
            network(torch.zeros(1, spec.network_channels, *spec.network_size))
    except ValueError as err:
        raise UsageError(config.architecture, str(err), "see medseg train --help for --network and --roi") from err
    return spec


def _intensity(config: TrainingConfig, found: Fingerprint, dataset: Dataset) -> tuple[tuple[IntensityStep, ...], float]:
    try:
        return derive_intensity(found, dataset.modality, config.intensity)
    except ValueError as err:
        raise UsageError("--intensity", str(err), "use zscore, range:LOW,HIGH or percentiles:LOW,HIGH") from err


def _window(
    config: TrainingConfig, found: Fingerprint, spacing: tuple[float, float, float]
) -> tuple[SliceSpec | None, tuple[int, ...]]:
    """How a 2D network sees the volumes, None for a 3D one, and the window that the data ask for.

    Raises:
        UsageError: settings for slices of a 3D network, or a window that is no slice of a 2D one.
    """
    try:
        facts = read_facts(config.architecture)
    except ValueError as err:
        raise UsageError("--architecture", str(err), "see medseg networks list") from err
    if config.network.get("spatial_dims", facts.spatial_dims[0]) == 3:
        if config.slice_axis is not None or config.neighbours or config.resize != "none":
            raise UsageError(config.architecture, "is a 3D network and takes no slices", "leave out the slice settings")
        return None, config.roi_size or derive_roi(found, spacing)
    axis: int | None = config.slice_axis
    if axis is None and config.roi_size is not None and config.roi_size.count(1) == 1:
        axis = config.roi_size.index(1)
    if axis is None:
        thickest = int(np.argmax(spacing))
        axis = thickest if spacing[thickest] > _THICK * max(np.delete(spacing, thickest)) else 0
    if config.roi_size is not None and config.roi_size[axis] != 1:
        raise UsageError("--roi", f"{config.roi_size} is not 1 along the slices' axis {axis}", "write it as 1x64x64")
    largest = np.ceil((found.extent / np.asarray(spacing)).max(axis=0)).astype(int).clip(max=_SLICE_LIMIT)
    wanted = config.roi_size or tuple(int(size) for size in largest)
    slices = SliceSpec(axis, config.resize, config.neighbours)
    return slices, tuple(size for index, size in enumerate(wanted) if index != axis)


def metadata_of(dataset: Dataset, spec: BundleSpec, learned: int, held_out: int) -> dict[str, Any]:
    """What the run's metadata.json says of its data."""
    return {
        "name": f"{spec.network} {dataset.name}",
        "task": f"Segmentation of {', '.join(name for value, name in spec.labels.items() if value)}",
        "description": f"{spec.network} trained on {learned} cases of {dataset.name}",
        "data_source": dataset.reference,
        "data_license": dataset.licence,
        "training_cases": learned,
        "held_out_cases": held_out,
    }


def train_config(config: TrainingConfig) -> dict[str, Any]:
    """train.json: runs by ``python -m monai.bundle run`` and is read back by `load_run`."""
    return {
        "imports": ["$import pathlib", "$import medseg.training.run", "$import medseg.training.config"],
        "bundle_root": ".",
        "dataset_dir": "./data",
        "split": None,
        "output_dir": "$@bundle_root + '/training'",
        "training": json.loads(config.model_dump_json()),
        "settings": "$medseg.training.config.TrainingConfig(**@training)",
        "run": [
            "$medseg.training.run.train(@settings, pathlib.Path(@dataset_dir), pathlib.Path(@output_dir), "
            "split=pathlib.Path(@split) if @split else None)"
        ],
    }


def load_run(output: Path) -> tuple[TrainingConfig, BundleSpec]:
    """Settings and specification of a run folder.

    Raises:
        BundleError: configs/ is missing or damaged.
        InputError: train.json's settings are not valid.
    """
    from medseg.bundles.spec import read_json, read_spec

    path = output / "configs" / "train.json"
    try:
        config = TrainingConfig(**read_json(path).get("training", {}))
    except ValueError as err:
        raise InputError(path, f"settings not valid ({err})", "restore the file") from err
    return config, read_spec(output)


def _stage(report: Report, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: report(stage, done, total)
