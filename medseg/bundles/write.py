"""Writing a bundle's configuration files."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import medseg
from medseg.bundles.spec import BundleSpec, Calibration, config_of

_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"


def write_configs(root: Path, spec: BundleSpec, metadata: Mapping[str, Any], train: Mapping[str, Any]) -> None:
    """Write configs/metadata.json, inference.json and train.json of a bundle folder.

    Args:
        root: the bundle's folder.
        spec: what inference reads.
        metadata: name, task, description, data_source, data_license, training_cases, held_out_cases,
            weights_source; it may also override any other field of metadata.json.
        train: content of train.json.
    """
    folder = root / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("metadata.json", metadata_config(spec, metadata)),
        ("inference.json", inference_config(spec)),
        ("train.json", dict(train)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def metadata_config(spec: BundleSpec, described: Mapping[str, Any]) -> dict[str, Any]:
    """metadata.json in MONAI's schema of 2024-07-25, medseg's own facts under ``medseg``."""
    own = ("data_license", "training_cases", "held_out_cases", "weights_source")
    suitable = spec.suitability
    return {
        "schema": _SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "first version"},
        "monai_version": _version("monai"),
        "pytorch_version": _version("torch").partition("+")[0],
        "numpy_version": _version("numpy"),
        "required_packages_version": {"medseg": medseg.__version__, "nibabel": _version("nibabel")},
        "supported_apps": {},
        "authors": "medseg contributors",
        "copyright": "medseg contributors",
        "data_type": "nibabel",
        "image_classes": ", ".join(spec.channels),
        "label_classes": ", ".join(f"{value} {name}" for value, name in spec.labels.items()),
        "pred_classes": f"{spec.out_channels} channels, logits",
        "intended_use": "Research only, not for diagnosis",
        "eval_metrics": {},
        "references": [],
        **{key: value for key, value in described.items() if key not in own},
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": suitable.modality,
                    "num_channels": spec.in_channels,
                    "spatial_shape": list(spec.roi_size),
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {str(i): name for i, name in enumerate(spec.channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": spec.out_channels,
                    "spatial_shape": list(spec.roi_size),
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {str(channel): name for channel, name in spec.outputs.items()},
                }
            },
        },
        "medseg": {
            **{key: described[key] for key in own if key in described},
            "mirror_axes": list(spec.mirror_axes),
            **_overlapping(spec),
            **calibration_config(spec.calibration),
            **_codes(spec),
            **({} if spec.folds == 1 else {"folds": spec.folds}),
            "suitability": {
                "extent_mm": suitable.extent_mm,
                "spacing_mm": suitable.spacing_mm,
                "tolerance": suitable.tolerance,
            },
        },
    }


def _overlapping(spec: BundleSpec) -> dict[str, Any]:
    """How overlapping channels become labels; nothing where each channel is a label."""
    if not spec.regions:
        return {}
    return {
        "labels": {str(value): name for value, name in spec.labels.items()},
        "regions": [{"channel": region.channel, "label": region.label} for region in spec.regions],
    }


def _codes(spec: BundleSpec) -> dict[str, Any]:
    """The entry ``codes``: of each coded label its terms as [value, scheme, meaning]; none where no label has one."""
    if not spec.codes:
        return {}
    return {
        "codes": {
            str(value): {key: list(term.values()) for key, term in asdict(code).items() if term is not None}
            for value, code in spec.codes.items()
        }
    }


def calibration_config(calibration: Calibration) -> dict[str, Any]:
    """The entry ``calibration`` of metadata.json's ``medseg``; none where nothing was fitted."""
    if calibration == Calibration():
        return {}
    line = calibration.dice
    fitted = {} if line is None else {"predicted_dice": asdict(line)}
    return {"calibration": {"temperature": calibration.temperature, **fitted}}


def inference_config(spec: BundleSpec) -> dict[str, Any]:
    """inference.json: the sections medseg reads, and those that ``python -m monai.bundle run`` needs around them.

    MONAI's transforms cannot do what nnU-Net does to a scan; there MONAI's runner calls medseg.
    """
    read = config_of(spec)
    activation: dict[str, Any] = {"_target_": "Activationsd", "keys": "pred", spec.activation: True}
    discrete: dict[str, Any] = {"_target_": "AsDiscreted", "keys": "pred"}
    discrete |= {"argmax": True} if spec.activation == "softmax" else {"threshold": 0.5}
    if spec.nnunet is not None:
        return {
            "imports": ["$import glob", "$import os", "$import medseg"],
            "bundle_root": ".",
            "dataset_dir": "./data",
            "output_dir": "$@bundle_root + '/eval'",
            "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii.gz')))",
            **read,
            "postprocessing": {"_target_": "Compose", "transforms": [activation, discrete]},
            "folder": "$os.makedirs(@output_dir, exist_ok=True)",
            "run": [
                "$@folder",
                "$[medseg.infer(scan, bundle=@bundle_root).save("
                "os.path.join(@output_dir, os.path.basename(scan)[:-7] + '_seg.nii.gz'), overwrite=True)"
                " for scan in @datalist]",
            ],
        }
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "dataset_dir": "./data",
        "output_dir": "$@bundle_root + '/eval'",
        "checkpoint": "$@bundle_root + '/models/model.pt'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii.gz')))",
        "network_def": read["network_def"],
        "network": "$@network_def.to(@device)",
        "preprocessing": read["preprocessing"],
        "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": read["inferer"],
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                activation,
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "nearest_interp": False,
                    "to_tensor": True,
                },
                discrete,
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_ext": ".nii.gz",
                    "output_dtype": "$np.uint8",
                    "output_postfix": "seg",
                    "separate_folder": False,
                    "resample": False,
                },
            ],
        },
        "handlers": [
            {"_target_": "CheckpointLoader", "load_path": "@checkpoint", "load_dict": {"model": "@network"}},
            {"_target_": "StatsHandler", "iteration_log": False},
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def _version(package: str) -> str:
    return importlib.metadata.version(package)
