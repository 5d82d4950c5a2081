"""Write small models of nnU-Net v2 and nnU-Net's labels of scans with them: ``python -m tests.golden.make_nnunet``.

Needs nnU-Net v2 (`docs/nnunet.md` says how to install it beside a CPU build of torch) and the shared data. Each model
is built by nnU-Net's own code from plans, trained for a minute on patches that nnU-Net's preprocessor prepared, and
saved as nnU-Net's trainer saves it; labels are those of nnU-Net's predictor. Run it again after a wanted change of the
models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from tests.builders import SAMPLES, SHARED

HERE = Path(__file__).parent / "nnunet"
CT = SHARED / "data" / "ct"
PREDICTOR = {"tile_step_size": 0.5, "use_gaussian": True, "perform_everything_on_device": False, "allow_tqdm": False}


@dataclass(frozen=True)
class Model:
    """A model to make.

    Attributes:
        configuration: the name in the plans.
        scan: the scan, and labels beside it, that it is trained and tried on; a name of `scans`.
        patch: voxels, network axes.
        spacing: mm, network axes.
        network: PlainConvUNet or ResidualEncoderUNet.
        strides: of each level.
        kernels: of each level.
        labels: as in dataset.json.
        normalization: of the channel.
        inside: use_mask_for_norm.
        transpose: transpose_forward.
        mirror: axes for mirroring.
        folds: names of the folds.
        steps: of the training.
    """

    configuration: str
    scan: str
    patch: list[int]
    spacing: list[float]
    network: str
    strides: list[list[int]]
    kernels: list[list[int]]
    labels: dict[str, Any]
    normalization: str = "ZScoreNormalization"
    inside: bool = False
    transpose: list[int] = field(default_factory=lambda: [0, 1, 2])
    mirror: tuple[int, ...] | None = (0, 1, 2)
    folds: tuple[str, ...] = ("0",)
    steps: int = 70


_PLAIN = {"background": 0, "bright": 1, "brightest": 2}
_PARTS = {"background": 0, "bright": [1, 2], "brightest": [2]}
_ORGANS = {"background": 0, "soft tissue": 1, "bone": 2}
_TWICE, _ONCE = [[1, 1, 1], [2, 2, 2], [2, 2, 2]], [[3, 3, 3]] * 3

MODELS = {
    # Two folds, both directions of resampling at once, windows that overlap unevenly.
    "fullres": Model(
        "3d_fullres", "hippocampus", [24, 32, 20], [1.2, 0.85, 1.0], "PlainConvUNet", _TWICE, _ONCE, _PLAIN,
        folds=("0", "1"),
    ),
    # Slices along another axis than the first, which keep their distance.
    "slices": Model(
        "2d", "hippocampus", [40, 32], [0.9, 1.1], "PlainConvUNet", [[1, 1], [2, 2], [2, 2]], [[3, 3]] * 3, _PLAIN,
        transpose=[1, 0, 2], mirror=(0, 1), steps=150,
    ),
    # Overlapping regions, a residual encoder, zeros around the head: cropped, normalised inside, put back.
    "regions": Model(
        "3d_lowres", "framed", [32, 40, 28], [1.3, 1.3, 1.3], "ResidualEncoderUNet", _TWICE, _ONCE, _PARTS,
        inside=True, mirror=(2,),
    ),
    # Thick slices, resampled one by one; Hounsfield units.
    "thick": Model(
        "3d_fullres", "thick_ct", [8, 64, 64], [5.0, 2.5, 2.5], "PlainConvUNet", [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        [[1, 3, 3], [3, 3, 3], [3, 3, 3]], _ORGANS, normalization="CTNormalization", mirror=(1, 2),
    ),
    # The same scan without Hounsfield windows, made thin: slices are repeated.
    "thin": Model(
        "3d_fullres", "thick_mr", [24, 32, 32], [1.0, 1.0, 1.0], "PlainConvUNet", _TWICE, _ONCE, _PLAIN,
        normalization="RescaleTo01Normalization", mirror=None,
    ),
}  # fmt: skip


def scan_of(name: str) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """A scan and its labels; of the project's own sample, or of the shared CT."""
    if name == "thick_ct":
        source = nib.load(CT / "example_ct_sm.nii.gz")
        values, labels = np.asanyarray(source.dataobj), np.asanyarray(nib.load(CT / "example_seg.nii.gz").dataobj)
        told = np.where(labels == 0, 0, np.where((labels >= 25) & (labels <= 50), 2, 1))
        affine, part = source.affine @ np.diag([1, 1, 4, 1]), np.s_[20:100, 10:85, 1::4]
        return _image(values[part].astype(np.float32), affine), _image(told[part].astype(np.uint8), affine)
    source = nib.load(SAMPLES / "hippocampus_003.nii.gz")
    values, affine = source.get_fdata(dtype=np.float32), source.affine
    smooth = ndimage.gaussian_filter(values, 1.5)  # labels of many voxels, of which one more or less is no matter
    labels = np.digitize(smooth, np.percentile(smooth, [40, 75])).astype(np.uint8)
    if name == "thick_mr":
        affine = affine @ np.diag([1, 1, 4, 1])
        return _image(values[:, :, 2::4], affine), _image(labels[:, :, 2::4], affine)
    if name == "framed":
        values = values + 1
        values[15:18, 20:24, 15:18] = 0  # a hole, which counts as inside
        frame = ((5, 3), (2, 6), (0, 4))
        turned = affine @ np.array([[0, -1, 0, 59], [1, 0, 0, -5], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # L and P first
        return tuple(  # type: ignore[return-value]
            _image(np.ascontiguousarray(np.pad(one, frame).transpose(1, 0, 2)[::-1]), turned)
            for one in (values, labels)
        )
    return _image(values, affine), _image(labels, affine)


def _image(values: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(values, affine)


def plans_of(model: Model, values: np.ndarray) -> dict[str, Any]:
    """plans.json as nnU-Net's planner writes it."""
    dims, levels = len(model.patch), len(model.strides)
    residual = model.network == "ResidualEncoderUNet"
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"nnUNetPlans_{model.configuration}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": model.patch,
        "median_image_size_in_voxels": [35.0, 52.0, 34.0],
        "spacing": model.spacing,
        "normalization_schemes": [model.normalization],
        "use_mask_for_norm": [model.inside],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{model.network}",
            "arch_kwargs": {
                "n_stages": levels,
                "features_per_stage": [6, 12, 18],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": model.kernels,
                "strides": model.strides,
                "n_blocks_per_stage" if residual else "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1] * (levels - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    inside = values[values > np.percentile(values, 60)]
    return {
        "dataset_name": "Dataset999_Golden",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [35, 52, 34],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": model.transpose,
        "transpose_backward": [int(axis) for axis in np.argsort(model.transpose)],
        "configurations": {model.configuration: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {
                "max": float(inside.max()),
                "mean": float(inside.mean()),
                "median": float(np.median(inside)),
                "min": float(inside.min()),
                "percentile_00_5": float(np.percentile(inside, 0.5)),
                "percentile_99_5": float(np.percentile(inside, 99.5)),
                "std": float(inside.std()),
            }
        },
    }


def dataset_of(model: Model) -> dict[str, Any]:
    """dataset.json."""
    regions = any(isinstance(value, list) for value in model.labels.values())
    return {
        "channel_names": {"0": "CT" if model.scan == "thick_ct" else "MRI"},
        "labels": model.labels,
        "numTraining": 1,
        "file_ending": ".nii.gz",
        **({"regions_class_order": [1, 2]} if regions else {}),
    }


def _patches(
    data: np.ndarray, seg: np.ndarray, patch: list[int], mirror: tuple[int, ...], seed: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches of two patches (B, C, ...) of the image and the labels, each flipped at random."""
    random = np.random.default_rng(seed)
    wanted = [1, *patch] if len(patch) == 2 else patch
    missing = [max(want - have, 0) for want, have in zip(wanted, data.shape[1:], strict=True)]
    amounts = [(0, 0), *((n // 2, n - n // 2) for n in missing)]
    data, seg = np.pad(data, amounts), np.pad(np.maximum(seg, 0), amounts)
    while True:
        batch = []
        for _ in range(2):
            first = [int(random.integers(have - want + 1)) for want, have in zip(wanted, data.shape[1:], strict=True)]
            cut = (slice(None), *(slice(n, n + want) for n, want in zip(first, wanted, strict=True)))
            flips = [1 + axis + (len(patch) == 2) for axis in mirror if random.integers(2)]
            batch.append((np.flip(data[cut], flips), np.flip(seg[cut], flips)))
        image, label = (torch.from_numpy(np.stack(part)) for part in zip(*batch, strict=True))
        yield (image.squeeze(2), label.squeeze(2)) if len(patch) == 2 else (image, label)


def train(model: Model, plans: dict[str, Any], dataset: dict[str, Any], files: list[str], fold: str) -> torch.nn.Module:
    """nnU-Net's network for the plans, trained on one case for a minute or less."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    configuration = manager.get_configuration(model.configuration)
    labels = manager.get_label_manager(dataset)
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, seg, _ = preprocessor.run_case([files[0]], files[1], manager, configuration, dataset)
    torch.manual_seed(int(fold))
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        labels.num_segmentation_heads,
        allow_init=True,
        deep_supervision=True,
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=model.steps)
    batches = _patches(data, seg, model.patch, model.mirror or (), int(fold))
    for _, (image, label) in zip(range(model.steps), batches, strict=False):
        logits = network(image.float())[0]
        if labels.has_regions:
            wanted = torch.cat([torch.isin(label, torch.tensor(region)) for region in labels.foreground_regions], 1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted.float())
        else:
            loss = torch.nn.functional.cross_entropy(logits, label[:, 0].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"  fold {fold}: loss {float(loss.detach()):.4f}")  # noqa: T201, a command line tool
    return network


def save(network: torch.nn.Module, model: Model, plans: dict[str, Any], dataset: dict[str, Any], fold: Path) -> None:
    """A checkpoint with all that nnU-Net's trainer puts into it, but for the optimizer's tensors."""
    fold.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "network_weights": network.state_dict(),
            "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01, "params": [0, 1]}]},
            "grad_scaler_state": None,
            "logging": {
                "mean_fg_dice": [np.float64(0.5)],
                "lrs": [0.01],
                "dice_per_class_or_region": [[np.float32(1)]],
            },
            "_best_ema": np.float64(0.5),
            "current_epoch": 1000,
            "init_args": {
                "plans": plans,
                "configuration": model.configuration,
                "fold": int(fold.name.removeprefix("fold_")),
                "dataset_json": dataset,
                "device": torch.device("cpu"),
            },
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": model.mirror,
        },
        fold / "checkpoint_final.pth",
    )


def predict(folder: Path, scan: Path, *, mirroring: bool, folds: tuple[str, ...]) -> np.ndarray:
    """The label map (X, Y, Z) that nnU-Net's predictor makes of a scan with a model folder."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=mirroring, device=torch.device("cpu"), **PREDICTOR)
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=folds)
    data, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(scan)])
    labels: np.ndarray = predictor.predict_single_npy_array(data, properties)
    return np.asarray(labels).transpose(2, 1, 0).astype(np.uint8)


def main() -> None:
    """Write the models that are named on the command line, or all."""
    for name in sys.argv[1:] or MODELS:
        model, root = MODELS[name], HERE / name
        print(name)  # noqa: T201, a command line tool
        scan, told = scan_of(model.scan)
        (root / "scans").mkdir(parents=True, exist_ok=True)
        files = [str(root / "scans" / f"{kind}.nii.gz") for kind in ("scan", "labels")]
        for image, file in zip((scan, told), files, strict=True):
            nib.save(image, file)
        plans, dataset = plans_of(model, np.asanyarray(scan.dataobj)), dataset_of(model)
        for file, content in (("plans.json", plans), ("dataset.json", dataset)):
            (root / file).write_text(json.dumps(content, indent=1) + "\n")
        for fold in model.folds:
            save(train(model, plans, dataset, files, fold), model, plans, dataset, root / f"fold_{fold}")
        found = {
            "mirrored": predict(root, Path(files[0]), mirroring=True, folds=model.folds),
            "plain": predict(root, Path(files[0]), mirroring=False, folds=model.folds[:1]),
        }
        np.savez_compressed(root / "labels.npz", **found)
        for file in (root / "scans").iterdir():
            file.unlink()
        (root / "scans").rmdir()
        told_values = np.asanyarray(told.dataobj)
        for kind, labels in found.items():
            dice = [
                2 * ((labels == v) & (told_values == v)).sum() / ((labels == v).sum() + (told_values == v).sum() + 1e-9)
                for v in (1, 2)
            ]
            print(f"  {kind}: voxels {np.bincount(labels.ravel())}, Dice with the reference {np.round(dice, 3)}")  # noqa: T201


if __name__ == "__main__":
    main()
