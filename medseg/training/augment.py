"""Training crops: MONAI's random transforms, set up from a `TrainingConfig` and a bundle's specification."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
    RandSpatialCropd,
    SpatialPadd,
)

from medseg.bundles.spec import BundleSpec
from medseg.training.config import TrainingConfig

_MARGIN = 1.3  # a crop is cut this much larger than the window, so that a rotation brings in real voxels


def crop_transform(config: TrainingConfig, spec: BundleSpec) -> Compose:
    """Random crops of `spec.roi_size` from a preprocessed case.

    The case is a dict of ``image`` (C, X, Y, Z) float32, ``label`` (1, X, Y, Z) and the foreground's and
    background's flat indices (``fg``, ``bg``), already padded to the window as in inference.
    """
    chances, roi = config.augmentation, tuple(spec.roi_size)
    wider = tuple(int(size * _MARGIN) for size in roi)
    share = config.foreground_share
    steps = [
        RandCropByPosNegLabeld(
            keys=("image", "label"),
            label_key="label",
            spatial_size=wider,
            pos=share,
            neg=1 - share,
            num_samples=1,
            fg_indices_key="fg",
            bg_indices_key="bg",
            allow_smaller=True,
        ),
        RandAffined(
            keys=("image", "label"),
            prob=chances.affine_probability,
            rotate_range=(chances.rotation,) * 3,
            scale_range=(chances.scale,) * 3,
            translate_range=tuple(chances.translation * size for size in roi),
            mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        # A rotated crop keeps its size, which may lie below the window where the volume does not.
        SpatialPadd(keys="image", spatial_size=roi, value=spec.padding_value),
        SpatialPadd(keys="label", spatial_size=roi, value=0),
        RandSpatialCropd(keys=("image", "label"), roi_size=roi, random_size=False),
        *(RandFlipd(keys=("image", "label"), prob=0.5, spatial_axis=axis) for axis in config.mirror_axes),
        RandSimulateLowResolutiond(keys="image", prob=chances.low_resolution_probability, zoom_range=(0.5, 1.0)),
        RandGaussianSmoothd(
            keys="image",
            prob=chances.blur_probability,
            sigma_x=(0.3, 0.9),
            sigma_y=(0.3, 0.9),
            sigma_z=(0.3, 0.9),
        ),
        RandAdjustContrastd(keys="image", prob=chances.gamma_probability, gamma=(0.7, 1.5), retain_stats=True),
        RandScaleIntensityd(keys="image", prob=chances.gain_probability, factors=chances.gain),
        RandShiftIntensityd(keys="image", prob=chances.gain_probability, offsets=chances.offset),
        RandGaussianNoised(keys="image", prob=chances.noise_probability, std=chances.noise_deviation),
    ]
    return Compose(steps)


def foreground_indices(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of labelled and unlabelled voxels of a (1, X, Y, Z) label map."""
    flat = label.reshape(-1)
    return np.flatnonzero(flat > 0), np.flatnonzero(flat == 0)


def seeds(seed: int, samples: Sequence[int]) -> list[int]:
    """An independent 32-bit seed for each sample number, the same in every process and after a restart."""
    return [int(np.random.SeedSequence([seed, sample]).generate_state(1)[0]) for sample in samples]
