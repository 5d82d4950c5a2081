"""nnU-Net's predictor around a bundle's network: its reader, resampling, normalisation, windows and export.

The network is the same module. Grid, resampling (third order for the scan, first order for the logits) and blending
are nnU-Net's own, so its labels are near medseg's and not equal to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape as to_labels,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from medseg.benchmark.meter import Meter, NetworkClock
from medseg.bundles.load import Bundle
from medseg.bundles.spec import BundleSpec, CropForeground, IntensityStep, NormalizeIntensity, ScaleIntensityRange
from medseg.errors import BundleError
from medseg.io import geometry
from medseg.io.read import read_volume

_UNBOUNDED = 1e30
_CONFIGURATION = "3d_fullres"


def run_nnunet(
    bundle: Bundle, scans: Sequence[Path], output: Path, device: torch.device, meter: Meter, clock: NetworkClock
) -> int:
    """Segment a scan with nnU-Net; arguments and result as those of `run_medseg`.

    Raises:
        BundleError: a bundle that nnU-Net's plans cannot describe.
    """
    spec = bundle.spec
    if spec.slices is not None or spec.regions or len(spec.intensity) != 1:
        raise BundleError(
            bundle.name, "nnU-Net runs 3D networks with exclusive labels and one intensity step", "leave nnunet out"
        )
    network = clock.attach(bundle.network().to(device))
    spacing = spec.spacing or tuple(float(s) for s in geometry.spacing(read_volume(scans[0]).affine))
    plans = PlansManager(_plans(bundle.name, spec, spacing))
    configuration = plans.get_configuration(_CONFIGURATION)
    dataset = {
        "channel_names": {str(number): name for number, name in enumerate(spec.channels)},
        "labels": {"background": 0, **{f"{name} {value}": value for value, name in spec.labels.items() if value}},
        "file_ending": ".nii.gz",
    }
    predictor = nnUNetPredictor(
        tile_step_size=1 - spec.overlap,
        use_gaussian=spec.blend == "gaussian",
        use_mirroring=False,
        perform_everything_on_device=device.type == "cuda",
        device=device,
        allow_tqdm=False,
    )
    predictor.manual_initialization(network, plans, configuration, [{}], dataset, "nnUNetTrainer", None)

    meter.begin("read")
    reader = plans.image_reader_writer_class()
    data, properties = reader.read_images([str(scan) for scan in scans])
    meter.begin("preprocess")
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case_npy(data, None, properties, plans, configuration, dataset)
    meter.begin("network")
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.asarray(data)))
    meter.begin("restore")
    labels = to_labels(
        logits,
        plans,
        configuration,
        plans.get_label_manager(dataset),
        properties,
        num_threads_torch=torch.get_num_threads(),
    )
    meter.begin("write")
    reader.write_seg(labels, str(output), properties)
    meter.end()
    return clock.windows


def _plans(name: str, spec: BundleSpec, spacing: Sequence[float]) -> dict[str, Any]:
    """nnU-Net's plans for a bundle; its arrays come as (Z, Y, X) and are turned to (X, Y, Z), as the network was."""
    scheme, properties = _normalization(name, spec.intensity[0])
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    function = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": "benchmark",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 1,
        "patch_size": list(spec.roi_size),
        "median_image_size_in_voxels": list(spec.roi_size),
        "spacing": list(spacing),
        "normalization_schemes": [scheme] * spec.in_channels,
        "use_mask_for_norm": [False] * spec.in_channels,
        "resampling_fn_data": function,
        "resampling_fn_seg": function,
        "resampling_fn_probabilities": function,
        "resampling_fn_data_kwargs": resampling | {"order": 3},
        "resampling_fn_seg_kwargs": resampling | {"is_seg": True},
        "resampling_fn_probabilities_kwargs": resampling,
        "batch_dice": False,
        "architecture": {"network_class_name": "given", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    return {
        "dataset_name": "benchmark",
        "plans_name": "benchmark",
        "transpose_forward": [2, 1, 0],
        "transpose_backward": [2, 1, 0],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "experiment_planner_used": "none",
        "configurations": {_CONFIGURATION: configuration},
        "foreground_intensity_properties_per_channel": {
            str(channel): properties for channel in range(spec.in_channels)
        },
    }


def _normalization(name: str, step: IntensityStep | CropForeground) -> tuple[str, dict[str, float]]:
    """nnU-Net's scheme and intensity properties that do what an intensity step does."""
    if isinstance(step, NormalizeIntensity) and not step.nonzero:
        return "ZScoreNormalization", dict.fromkeys(("mean", "std", "percentile_00_5", "percentile_99_5"), 0.0)
    if isinstance(step, ScaleIntensityRange) and step.a_max > step.a_min and step.b_max > step.b_min:
        deviation = (step.a_max - step.a_min) / (step.b_max - step.b_min)
        low, high = (step.a_min, step.a_max) if step.clip else (-_UNBOUNDED, _UNBOUNDED)
        mean = step.a_min - step.b_min * deviation
        return "CTNormalization", {"mean": mean, "std": deviation, "percentile_00_5": low, "percentile_99_5": high}
    raise BundleError(name, f"nnU-Net has no normalisation like {type(step).__name__}", "leave nnunet out")
