"""`medseg train`: from a folder of labelled cases to a run folder that is a bundle already."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg.bundles.locate import find_bundle
from medseg.bundles.spec import BundleSpec, SliceSpec, read_json, read_spec
from medseg.bundles.write import write_configs
from medseg.errors import BundleError, InputError, Interrupted, MedsegError, OutputError, UsageError
from medseg.inference.device import choose_device
from medseg.io.split import read_part
from medseg.networks.facts import read_facts
from medseg.networks.fit import fit
from medseg.networks.registry import create
from medseg.training.config import TrainingConfig
from medseg.training.dataset import CaseFiles, Dataset, read_dataset
from medseg.training.fingerprint import (
    Fingerprint,
    derive_intensity,
    derive_roi,
    derive_spacing,
    derive_suitability,
    fingerprint,
    read_intensity,
)
from medseg.training.job import START_FILE, Job, Listeners, Start, train_cases, weights_file
from medseg.training.launch import check_devices, train_on_devices
from medseg.training.loop import Progress
from medseg.training.patients import diagnoses

log = logging.getLogger(__name__)

_THICK = 1.5  # voxels this much longer along one axis than along the others are slices
_DECIDED_BY_BUNDLE = ("roi_size", "slice_axis", "neighbours", "neighbour_step", "resize", "spacing", "intensity")
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
    devices: int = 1,
    prepare: Report | None = None,
    started: Callable[[Start], None] | None = None,
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
        devices: how many of them; with more than one, each is a process of its own with its part of every batch.
        prepare: progress of the preparation (stage, done, all).
        started: told what was taken of `TrainingConfig.weights`.
        report: progress of the training (progress, share done).

    Returns:
        Where the run stands at its end.

    Raises:
        InputError: unusable data. OutputError: `output` holds a run already. UsageError: a setting that does
            not fit the architecture. BundleError: the bundle, or the weights to start from, cannot be used.
    """
    if devices > 1:
        check_devices(devices, device, config.batch_size)
    _check_intensity(config.intensity)
    dataset = read_dataset(data)
    cases = _training_cases(dataset, split, part)
    settled = load_run(output)[0] if resume and (output / "last.pt").exists() else config
    if diagnoses(settled, data):
        from medseg.training.diagnosis import train_diagnosis  # it builds on this module

        if devices > 1:
            raise UsageError("--devices", "a network that diagnoses is trained on one", "leave it out")
        return train_diagnosis(
            config, dataset, cases, output, resume=resume, device=choose_device(device), prepare=prepare, report=report
        )
    learn, held_out = divide(cases, config.holdout, config.seed)
    if resume:
        if not (output / "last.pt").exists():
            raise InputError(output, "holds no last.pt, nothing to resume", "start without --resume")
        config, spec = load_run(output)
        learn, held_out = divide(cases, config.holdout, config.seed)
    else:
        if (output / "last.pt").exists() or (output / "configs").exists():
            raise OutputError(output, "holds a run already", "use --resume, or another --output")
        if config.weights is not None:
            weights_file(config.weights)
        spec = derive_spec(config, dataset, cases, prepare)
        output.mkdir(parents=True, exist_ok=True)
        write_configs(output, spec, metadata_of(dataset, spec, len(learn), len(held_out)), train_config(config))
    job = Job(config, spec, output, learn, held_out, dataset.ignore, resume)
    listeners = Listeners(prepare, started, report)
    try:
        if devices > 1:
            return train_on_devices(job, devices, device, listeners)
        return train_cases(job, choose_device(device), listeners)
    except (MedsegError, Interrupted):
        if not (output / "last.pt").exists():  # the run never began; its folder is free for another try
            shutil.rmtree(output / "configs", ignore_errors=True)
            (output / START_FILE).unlink(missing_ok=True)
        raise


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
    """The specification that training and inference share: a bundle's own, or from the settings and the data.

    Raises:
        UsageError: the architecture refuses its arguments or the window.
        InputError: data that the bundle was not made for. BundleError: there is no such bundle.
    """
    if config.bundle is not None:
        return _tried(_bundle_spec(config, dataset))
    if sorted(dataset.labels) != list(range(len(dataset.labels))):
        problem = f"label values {sorted(dataset.labels)}"
        raise InputError(dataset.root / "dataset.json", problem, "they must be 0 (background), 1, 2, ... without gaps")
    found = fingerprint(dataset, cases, None if prepare is None else _stage(prepare, "fingerprint"))
    spacing = config.spacing or derive_spacing(found)
    intensity, padding_value = derive_intensity(found, dataset.modality, config.intensity)
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
    return _tried(spec)


def _tried(spec: BundleSpec) -> BundleSpec:
    """The specification, after its network has taken one window."""
    try:
        network = create(spec.network, **spec.network_args).eval()
        with torch.inference_mode():
            network(torch.zeros(1, spec.network_channels, *spec.network_size))
    except ValueError as err:
        raise UsageError(spec.network, str(err), "see medseg train --help for --network and --roi") from err
    return spec


def _bundle_spec(config: TrainingConfig, dataset: Dataset) -> BundleSpec:
    """The bundle's specification, with the settings that replace its own."""
    name = str(config.bundle)
    spec = read_spec(find_bundle(name))
    if config.architecture != spec.network:
        raise UsageError("--architecture", f"{config.architecture}, but {name} is {spec.network}", "leave it out")
    here = dataset.root / "dataset.json"
    if dict(spec.labels) != dict(dataset.labels):
        wanted = ", ".join(f"{value} {label}" for value, label in spec.labels.items())
        raise InputError(here, f"not the labels of {name} ({wanted})", "see medseg data list, or rename them")
    channels = [[channel.lower() for channel in names] for names in (spec.channels, dataset.channels)]
    if len(channels[0]) != len(channels[1]) or (len(channels[0]) > 1 and channels[0] != channels[1]):
        raise InputError(here, f"channels {dataset.channels}, but {name} takes {spec.channels}", "put them in order")
    size = config.roi_size or spec.roi_size
    if spec.slices is not None and size[spec.slices.axis] != 1:
        raise UsageError("--roi", f"{size} is not 1 along the slices' axis {spec.slices.axis}", f"{name} takes slices")
    return replace(
        spec,
        network_args={**spec.network_args, **config.network},
        roi_size=size,
        spacing=config.spacing or spec.spacing,
        intensity=spec.intensity if config.intensity is None else read_intensity(config.intensity),
    )


def _check_intensity(wanted: str | None) -> None:
    try:
        if wanted is not None:
            read_intensity(wanted)
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
    slices = SliceSpec(axis, config.resize, config.neighbours, config.neighbour_step)
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


def read_recipe(bundle: str) -> dict[str, Any]:
    """The settings of a bundle's train.json, for the bundle's own network and preprocessing.

    Raises:
        BundleError: no such bundle, or it holds no recipe.
    """
    root = find_bundle(bundle)
    training = read_json(root / "configs" / "train.json").get("training")
    if not isinstance(training, dict):
        raise BundleError(root / "configs" / "train.json", "holds no training settings", "train without --bundle")
    spec = read_spec(root)
    recipe = {name: value for name, value in training.items() if name not in _DECIDED_BY_BUNDLE}
    own = {**spec.network_args, **training.get("network", {})}
    differs = {name: value for name, value in own.items() if spec.network_args.get(name) != value}
    return {**recipe, "architecture": spec.network, "network": differs, "bundle": bundle}


def load_run(output: Path) -> tuple[TrainingConfig, BundleSpec]:
    """Settings and specification of a run folder.

    Raises:
        BundleError: configs/ is missing or damaged.
        InputError: train.json's settings are not valid.
    """
    path = output / "configs" / "train.json"
    try:
        config = TrainingConfig(**read_json(path).get("training", {}))
    except ValueError as err:
        raise InputError(path, f"settings not valid ({err})", "restore the file") from err
    return config, read_spec(output)


def _stage(report: Report, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: report(stage, done, total)
