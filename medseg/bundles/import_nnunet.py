"""``medseg bundles import-nnunet``: a trained model folder of nnU-Net v2 becomes a bundle."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from medseg.bundles.integrity import write_manifest
from medseg.bundles.load import load_bundle
from medseg.bundles.nnunet import ChannelNormalization, NNUNetScheme, Normalization, Resampling
from medseg.bundles.spec import BundleSpec, Region, SliceSpec, Suitability, read_json
from medseg.bundles.weights import put_in_place, save_state
from medseg.bundles.write import write_configs
from medseg.errors import BundleError, OutputError, UsageError
from medseg.io.files import sha256_of

CHECKPOINT = "checkpoint_final.pth"

_PACKAGE = "dynamic_network_architectures.architectures."
_NETWORKS = {
    f"{_PACKAGE}unet.PlainConvUNet": "plain_conv_unet",
    f"{_PACKAGE}unet.ResidualEncoderUNet": "resenc_unet",
    f"{_PACKAGE}residual_unet.ResidualEncoderUNet": "resenc_unet",
    "PlainConvUNet": "plain_conv_unet",  # plans of nnU-Net before 2.3
    "ResidualEncoderUNet": "resenc_unet",
}
_DEPTHS = {"plain_conv_unet": "n_conv_per_stage", "resenc_unet": "n_blocks_per_stage"}
_READERS = {
    "SimpleITKIO": None,
    "NibabelIO": None,
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIOWithReorient": "RAS",
}
_RESAMPLING = "resample_data_or_seg_to_shape"
# Trainers of nnU-Net whose network is that of the plans, or is known from the tensors.
_KNOWN_TRAINER = re.compile(
    r"nnUNetTrainer(_?\d+epochs(_NoMirroring)?|NoDeepSupervision|BN|NoDA|DA5|DAOrd0|_?NoMirroring|_onlyMirror01|"
    r"DiceCELoss_noSmooth|DiceLoss|CELoss|TopkLoss|_noDummy2DDA)?"
)


@dataclass(frozen=True)
class Imported:
    """A bundle made of a model folder.

    Attributes:
        root: the bundle's folder.
        folds: the networks in it.
        note: what the user should check; "" for nothing.
    """

    root: Path
    folds: tuple[str, ...]
    note: str


def import_nnunet(
    results: Path,
    folder: Path,
    *,
    name: str | None = None,
    folds: Sequence[str] = (),
    checkpoint: str = CHECKPOINT,
    overwrite: bool = False,
) -> Imported:
    """Make a bundle of a trained model folder of nnU-Net v2; nothing is written before all of it was understood.

    Args:
        results: the folder that holds plans.json, dataset.json and fold_0, fold_1, ... or fold_all.
        folder: gets the bundle as a folder of its name.
        name: a-z, 0-9 and _; None: that of data set and configuration.
        folds: "0", "1", ... or "all"; none: every numbered fold that is there, else "all".
        checkpoint: the file in each fold.
        overwrite: replace a bundle of that name.

    Raises:
        UsageError: a name that a bundle cannot have.
        BundleError: the folder is no such model, or one that medseg does not run: a second stage of a cascade, another
            network, normalisation, resampling or reader than nnU-Net's usual ones.
        OutputError: the bundle exists, or cannot be written.
    """
    plans, dataset = _described(results, "plans.json"), _described(results, "dataset.json")
    chosen = _folds(results, folds, checkpoint)
    model = _read_folds(results, chosen, checkpoint)
    spec = _spec(plans, dataset, model, results)
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "_", f"{plans.get('dataset_name', 'nnunet')}_{model.configuration}".lower())
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UsageError("--name", f"{name!r} is not made of a-z, 0-9 and _", "e.g. nnunet_spleen")
    target, aside = folder / name, folder / f".{name}.importing"
    if target.exists() and not overwrite:
        raise OutputError(target, "exists", "use --overwrite, or another --name")
    note = ""
    if not _KNOWN_TRAINER.fullmatch(model.trainer):
        note = f"trained by {model.trainer}, which may have changed the network: compare a scan with nnUNetv2_predict"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write(aside, name, spec, plans, dataset, model, note)
        load_bundle(aside).network()  # whatever would fail later fails here, before the rename
        put_in_place(aside, target)
    except OSError as err:
        raise OutputError(target, f"cannot be written ({err.strerror or err})", "free space, or use --output") from err
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Imported(target, chosen, note)


@dataclass(frozen=True)
class _Model:
    """What the checkpoints of a model folder hold.

    Attributes:
        folds: their names.
        states: the tensors of each, under the names of this project.
        digests: SHA-256 of each file.
        trainer: class of the trainer.
        configuration: what was trained.
        mirror_axes: of the network's axes.
    """

    folds: tuple[str, ...]
    states: tuple[Mapping[str, Any], ...]
    digests: tuple[str, ...]
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...]


def _described(results: Path, name: str) -> dict[str, Any]:
    if not results.is_dir():
        raise BundleError(results, "no such folder", "give the folder that nnUNetv2_train wrote")
    if not (results / name).is_file():
        inside = sorted(path.parent.name for path in results.glob("*/plans.json"))
        remedy = f"give one of its folders: {', '.join(inside)}" if inside else "give a folder like nnUNetTrainer__..."
        raise BundleError(results, f"no model folder of nnU-Net v2: it has no {name}", remedy)
    return read_json(results / name)


def _folds(results: Path, wanted: Sequence[str], checkpoint: str) -> tuple[str, ...]:
    if not checkpoint or Path(checkpoint).name != checkpoint:
        raise UsageError("--checkpoint", f"{checkpoint!r} is no file name", f"e.g. {CHECKPOINT}")
    there = sorted(path.parent.name.removeprefix("fold_") for path in results.glob(f"fold_*/{checkpoint}"))
    numbered = [fold for fold in there if fold.isdigit()]
    chosen = list(dict.fromkeys(wanted)) or numbered or [fold for fold in there if fold == "all"]
    missing = [fold for fold in chosen if fold not in there]
    if missing or not chosen:
        what = f"no fold_{missing[0]}/{checkpoint}" if missing else f"no fold with {checkpoint}"
        known = f"there are folds {', '.join(there)}" if there else "train it, or name another --checkpoint"
        raise BundleError(results, what, known)
    return tuple(chosen)


def _read_folds(results: Path, folds: tuple[str, ...], checkpoint: str) -> _Model:
    from medseg.checkpoints.nnunet import first_names, read_training

    paths = [results / f"fold_{fold}" / checkpoint for fold in folds]
    read = [read_training(path) for path in paths]
    first = read[0]
    for path, other in zip(paths, read, strict=True):
        if (other.configuration, other.mirror_axes) != (first.configuration, first.mirror_axes):
            raise BundleError(path, f"is not of one training with {paths[0]}", "name folds of one model")
    return _Model(
        folds,
        tuple(first_names(training.state) for training in read),
        tuple(sha256_of(path) for path in paths),
        first.trainer,
        first.configuration,
        first.mirror_axes,
    )


def _spec(plans: Mapping[str, Any], dataset: Mapping[str, Any], model: _Model, results: Path) -> BundleSpec:
    where = results / "plans.json"
    configuration = _configuration(plans, model.configuration, where)
    try:
        channels = tuple(str(name) for _, name in _numbered(dataset.get("channel_names") or dataset["modality"]))
        labels, regions = _labels(dataset, results / "dataset.json")
        patch = [int(size) for size in configuration["patch_size"]]
        scheme = _scheme(plans, configuration, len(channels), where)
        flat = len(patch) == 2
        network, arguments = _network(configuration, len(channels), len(regions) or len(labels), model, where)
        return BundleSpec(
            network=network,
            network_args=arguments,
            channels=channels,
            labels=labels,
            activation="sigmoid" if regions else "softmax",
            orientation=_orientation(plans, where),
            roi_size=(1, patch[0], patch[1]) if flat else (patch[0], patch[1], patch[2]),
            overlap=0.5,
            mirror_axes=tuple(axis + flat for axis in model.mirror_axes),
            slices=SliceSpec(axis=0) if flat else None,
            regions=regions,
            suitability=Suitability(modality="CT" if {name.upper() for name in channels} == {"CT"} else ""),
            nnunet=scheme,
            folds=len(model.folds),
        )
    except (KeyError, TypeError, ValueError, IndexError) as err:
        text = f"{err.args[0]!r} is missing" if isinstance(err, KeyError) else str(err)
        raise BundleError(where, f"not what nnU-Net v2 writes ({text})", "export the model again") from err


def _numbered(entries: Mapping[str, Any]) -> list[tuple[int, Any]]:
    return sorted((int(number), entry) for number, entry in entries.items())


def _configuration(plans: Mapping[str, Any], name: str, where: Path) -> dict[str, Any]:
    """A configuration of the plans with what it inherits."""
    known = plans.get("configurations")
    if not isinstance(known, Mapping):
        raise BundleError(where, "holds no configurations", "give a model folder of nnU-Net v2; version 1 is not read")
    chain: list[Mapping[str, Any]] = []
    following: Any = name
    while following is not None:
        found = known.get(following)
        if not isinstance(found, Mapping) or len(chain) > len(known):
            raise BundleError(where, f"holds no configuration {following!r}", f"it has {', '.join(map(str, known))}")
        chain.append(found)
        following = found.get("inherits_from")
    merged: dict[str, Any] = {}
    for entry in reversed(chain):
        merged |= entry
    if merged.get("previous_stage") is not None:
        raise BundleError(
            where,
            f"{name} is the second stage of a cascade, which takes the labels of {merged['previous_stage']}",
            "medseg runs single stages; train or import 3d_fullres, 3d_lowres or 2d",
        )
    for key, usual in (("preprocessor_name", "DefaultPreprocessor"), ("resampling_fn_data", _RESAMPLING)):
        if merged.get(key, usual) != usual:
            raise BundleError(where, f"{key} is {merged[key]!r}", f"medseg knows {usual}")
    if merged.get("resampling_fn_probabilities", _RESAMPLING) != _RESAMPLING:
        raise BundleError(
            where, f"resampling_fn_probabilities is {merged['resampling_fn_probabilities']!r}", "medseg knows the usual"
        )
    if plans.get("label_manager", "LabelManager") != "LabelManager":
        raise BundleError(where, f"label_manager is {plans['label_manager']!r}", "medseg knows LabelManager")
    return merged


def _orientation(plans: Mapping[str, Any], where: Path) -> str | None:
    reader = plans.get("image_reader_writer", "SimpleITKIO")
    if reader not in _READERS:
        raise BundleError(where, f"image_reader_writer is {reader!r}", f"medseg knows {', '.join(_READERS)}")
    return _READERS[reader]


def _labels(dataset: Mapping[str, Any], where: Path) -> tuple[dict[int, str], tuple[Region, ...]]:
    """Labels by value, and the regions that overlap where the model was trained on such."""
    stated = {str(name): value for name, value in dataset["labels"].items() if name != "ignore"}
    if any(isinstance(value, list) and len(value) > 1 for value in stated.values()):
        order = [int(value) for value in dataset["regions_class_order"]]
        named = [name for name, value in stated.items() if value not in (0, [0])]
        if len(order) != len(named):
            raise BundleError(
                where, f"{len(named)} regions, {len(order)} in regions_class_order", "correct dataset.json"
            )
        regions = tuple(
            Region(name, channel, label) for channel, (name, label) in enumerate(zip(named, order, strict=True))
        )
        painted = {0: "background", **{region.label: region.name for region in regions}}
        return dict(sorted(painted.items())), regions
    values = {int(value[0] if isinstance(value, list) else value): name for name, value in stated.items()}
    if sorted(values) != list(range(len(stated))):
        raise BundleError(
            where, f"labels {sorted(values)}; nnU-Net's are 0, 1, 2, ... without a gap", "correct dataset.json"
        )
    return dict(sorted(values.items())), ()


def _scheme(plans: Mapping[str, Any], configuration: Mapping[str, Any], channels: int, where: Path) -> NNUNetScheme:
    forward = [int(axis) for axis in plans["transpose_forward"]]
    spacing = [float(edge) for edge in configuration["spacing"]]
    schemes, masks = configuration["normalization_schemes"], configuration["use_mask_for_norm"]
    measured = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    if not len(schemes) == len(masks) == channels:
        raise BundleError(
            where, f"{len(schemes)} normalization_schemes for {channels} channels", "correct dataset.json"
        )
    return NNUNetScheme(
        axes=(2 - forward[0], 2 - forward[1], 2 - forward[2]),  # nnU-Net's readers give z, y, x
        spacing=(None, spacing[0], spacing[1]) if len(spacing) == 2 else (spacing[0], spacing[1], spacing[2]),
        normalization=tuple(
            _normalization(name, bool(mask), measured.get(str(number), {}), where)
            for number, (name, mask) in enumerate(zip(schemes, masks, strict=True))
        ),
        resampling=_resampling(configuration["resampling_fn_data_kwargs"]),
        back=_resampling(configuration["resampling_fn_probabilities_kwargs"]),
    )


def _normalization(name: str, inside: bool, measured: Mapping[str, Any], where: Path) -> ChannelNormalization:  # noqa: FBT001
    known = next((one for one in get_args(Normalization) if one == name), None)
    if known is None:
        raise BundleError(where, f"the normalization is {name!r}", f"medseg knows {', '.join(get_args(Normalization))}")
    if known != "CTNormalization":
        return ChannelNormalization(known, inside=inside and known == "ZScoreNormalization")
    return ChannelNormalization(
        known,
        mean=float(measured["mean"]),
        std=float(measured["std"]),
        lower=float(measured["percentile_00_5"]),
        upper=float(measured["percentile_99_5"]),
    )


def _resampling(arguments: Mapping[str, Any]) -> Resampling:
    unknown = set(arguments) - {"is_seg", "order", "order_z", "force_separate_z"}
    if unknown or arguments.get("is_seg"):
        raise ValueError(f"resampling with {', '.join(sorted(unknown)) or 'is_seg'}, which medseg does not know")
    return Resampling(
        order=int(arguments.get("order", 3)),
        order_z=int(arguments.get("order_z", 0)),
        separate_z=arguments.get("force_separate_z", False),
    )


def _network(
    configuration: Mapping[str, Any], in_channels: int, out_channels: int, model: _Model, where: Path
) -> tuple[str, dict[str, Any]]:
    """The architecture's name and its arguments; the tensors are held against it when they are loaded."""
    stated = configuration.get("architecture")
    if stated is None:  # plans of nnU-Net before 2.3
        found, given = str(configuration["UNet_class_name"]), _old_arguments(configuration)
    else:
        found, given = str(stated["network_class_name"]), dict(stated["arch_kwargs"])
    if found not in _NETWORKS:
        raise BundleError(where, f"the network is {found}", "medseg knows PlainConvUNet and ResidualEncoderUNet")
    network, dims = _NETWORKS[found], len(configuration["patch_size"])
    depths = _DEPTHS[network]
    norms = {f"InstanceNorm{dims}d": "instance", f"BatchNorm{dims}d": "batch"}
    norm, act = (str(given.pop(key)).rpartition(".")[2] for key in ("norm_op", "nonlin"))
    conv = str(given.pop("conv_op")).rpartition(".")[2]
    norm_options, act_options = given.pop("norm_op_kwargs") or {}, given.pop("nonlin_kwargs") or {}
    arguments: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "spatial_dims": dims,
        "norm": "batch" if any(key.endswith("running_mean") for key in model.states[0]) else norms.get(norm),
        "norm_eps": float(norm_options.pop("eps", 1e-5)),
        "norm_affine": bool(norm_options.pop("affine", norm.startswith("Batch"))),
        "negative_slope": float(act_options.pop("negative_slope", 0.01)) if act == "LeakyReLU" else 0.0,
        "conv_bias": bool(given.pop("conv_bias", False)),
        "deep_supervision": True,
    }
    for key in ("features_per_stage", "kernel_sizes", "strides", depths, "n_conv_per_stage_decoder"):
        arguments[key] = given.pop(key)
    levels = int(given.pop("n_stages"))
    act_options.pop("inplace", None)
    unusual = [key for key, value in {**given, **norm_options, **act_options}.items() if value is not None]
    if conv != f"Conv{dims}d":
        unusual.append(conv)
    if norm not in norms:
        unusual.append(norm)
    if act not in ("LeakyReLU", "ReLU"):
        unusual.append(act)
    if unusual:
        raise BundleError(
            where, f"the network uses {', '.join(unusual)}", "medseg knows what nnU-Net's own planners write"
        )
    if isinstance(arguments["features_per_stage"], int):
        arguments["features_per_stage"] = [arguments["features_per_stage"]] * levels
    return network, arguments


def _old_arguments(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the network from plans that do not state them by name."""
    depths = "n_conv_per_stage" if configuration["UNet_class_name"] == "PlainConvUNet" else "n_blocks_per_stage"
    dims, levels = len(configuration["patch_size"]), len(configuration["n_conv_per_stage_encoder"])
    base, most = int(configuration["UNet_base_num_features"]), int(configuration["unet_max_num_features"])
    return {
        "n_stages": levels,
        "features_per_stage": [min(base * 2**level, most) for level in range(levels)],
        "conv_op": f"Conv{dims}d",
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": configuration["pool_op_kernel_sizes"],
        depths: configuration["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "LeakyReLU",
        "nonlin_kwargs": {},
    }


def _write(
    root: Path,
    name: str,
    spec: BundleSpec,
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    model: _Model,
    note: str,
) -> None:
    source = str(plans.get("dataset_name", ""))
    licence = str(dataset.get("licence") or dataset.get("license") or "not stated")
    cases = dataset.get("numTraining")
    described = {
        "name": name,
        "task": f"{source} {model.configuration}".strip(),
        "description": f"nnU-Net v2, {model.configuration}, {model.trainer}, folds {', '.join(model.folds)}; "
        "imported weights",
        "data_source": str(dataset.get("reference") or dataset.get("description") or source),
        "data_license": licence,
        "references": [
            "Isensee, F. et al. nnU-Net: a self-configuring method for deep learning-based biomedical image "
            "segmentation. Nature Methods 18, 203-211 (2021)"
        ],
        **({"training_cases": cases} if isinstance(cases, int) else {}),
    }
    training = {
        "nnunet": {
            "trainer": model.trainer,
            "configuration": model.configuration,
            "plans": str(plans.get("plans_name", "")),
            "folds": [{"fold": fold, "sha256": sha} for fold, sha in zip(model.folds, model.digests, strict=True)],
        }
    }
    write_configs(root, spec, described, training)
    alone = len(model.folds) == 1
    state = {
        key if alone else f"folds.{number}.{key}": tensor.contiguous()
        for number, fold in enumerate(model.states)
        for key, tensor in fold.items()
    }
    save_state(state, root / "models" / "model.pt")
    (root / "docs").mkdir()
    (root / "docs" / "README.md").write_text(_readme(name, spec, model, licence, note), encoding="utf-8")
    (root / "LICENSE").write_text(
        f"The weights are under the terms of whoever trained them; the data set's licence: {licence}.\n"
        "The configuration files in configs/ are under the Apache License 2.0.\n",
        encoding="utf-8",
    )
    write_manifest(root)


def _readme(name: str, spec: BundleSpec, model: _Model, licence: str, note: str) -> str:
    folds = "\n".join(f"| {fold} | {sha} |" for fold, sha in zip(model.folds, model.digests, strict=True))
    labels = "\n".join(f"| {value} | {label} |" for value, label in spec.labels.items())
    return f"""# {name}

A model that nnU-Net v2 trained: {model.configuration}, trainer {model.trainer}. For research only: not a medical
device, not for diagnosis. Data licence: {licence}.{f" {note[0].upper()}{note[1:]}." if note else ""}

| label | name |
| --- | --- |
{labels}

| fold | SHA-256 of its checkpoint |
| --- | --- |
{folds}

The logits of all folds are averaged. `--tta` adds nnU-Net's mirroring, which `nnUNetv2_predict` does by itself.

    medseg infer scan.nii.gz --bundle {name} --tta
"""
