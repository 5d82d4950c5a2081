"""Training crops: MONAI's random transforms, set up from a `TrainingConfig` and a bundle's specification."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import (
    Compose,
    OneOf,
    Rand2DElasticd,
    Rand3DElasticd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
    RandSpatialCropd,
    SpatialPadd,
)

from medseg.bundles.spec import BundleSpec, SliceSpec
from medseg.errors import UsageError
from medseg.training.config import TrainingConfig
from medseg.training.losses import IGNORE

_WARP_SIGMA = 4.0  # voxels over which the warp of a volume is smooth
_WARP_SPACING = 12  # pixels between the points at which the warp of a slice is drawn
_MARGIN = 1.3  # a crop is cut this much larger than the window, so that a rotation brings in real voxels


def crop_transform(config: TrainingConfig, spec: BundleSpec) -> Compose:
    """Random crops of `spec.roi_size` from a preprocessed case, for a 2D network slices with their neighbours.

    The case is a dict of ``image`` (C, X, Y, Z) float32, ``label`` (1, X, Y, Z), or (K, X, Y, Z) of soft labels, and
    the foreground's and background's flat indices (``fg``, ``bg``), already padded to `crop_size` as in inference.
    """
    chances, roi = config.augmentation, crop_size(spec)
    flat = None if spec.slices is None else spec.slices.axis
    window = tuple(size for axis, size in enumerate(roi) if axis != flat)
    wider = tuple(size if axis == flat else int(size * _MARGIN) for axis, size in enumerate(roi))
    share = config.foreground_share
    steps: list[Any] = [
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
        *(
            RandFlipd(keys=("image", "label"), prob=chances.flip_probability, spatial_axis=axis)
            for axis in config.mirror_axes
        ),
        *([] if spec.slices is None else [_SliceOut(spec.slices)]),  # from here on a slice is an image of two axes
        *_moved(config, window),
        # A rotated crop keeps its size, which may lie below the window where the volume does not.
        SpatialPadd(keys="image", spatial_size=window, value=spec.padding_value),
        SpatialPadd(keys="label", spatial_size=window, value=0),
        RandSpatialCropd(keys=("image", "label"), roi_size=window, random_size=False),
        *_quarter_turns(chances.rot90_probability, window),
        RandSimulateLowResolutiond(
            keys="image",
            prob=chances.low_resolution_probability,
            upsample_mode="trilinear" if len(window) == 3 else "bilinear",
            zoom_range=(0.5, 1.0),
        ),
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


def _moved(config: TrainingConfig, window: Sequence[int]) -> list[Any]:
    """Rotation, scaling and shift, some of them with a warp, in one interpolation; of a slice within its plane."""
    chances, volume = config.augmentation, len(window) == 3
    motion: dict[str, Any] = {
        "keys": ("image", "label"),
        "rotate_range": [chances.rotation] * (3 if volume else 1),
        "scale_range": [chances.scale] * len(window),
        "translate_range": [chances.translation * size for size in window],
        "mode": ("bilinear", "nearest" if config.soft_labels is None else "bilinear"),
        "padding_mode": "border",
    }
    affine = RandAffined(prob=chances.affine_probability, **motion)
    share = chances.elastic_probability
    if not share:
        return [affine]
    low, high = 0.5 * chances.elastic_voxels, 1.5 * chances.elastic_voxels
    warped: Rand2DElasticd | Rand3DElasticd
    if volume:
        # White noise of -1..1, smoothed by a Gaussian of deviation s, keeps sqrt(1/3) (2 sqrt(pi) s)^-1.5 of it.
        unit = math.sqrt(3) * (2 * math.sqrt(math.pi) * _WARP_SIGMA) ** 1.5
        warped = Rand3DElasticd(
            prob=1.0,
            sigma_range=(_WARP_SIGMA, _WARP_SIGMA),
            magnitude_range=(low * unit, high * unit),
            **motion,
        )
    else:
        spacing = (_WARP_SPACING, _WARP_SPACING)
        warped = Rand2DElasticd(prob=1.0, spacing=spacing, magnitude_range=(low, high), **motion)
    return [OneOf([warped, affine], weights=[share, 1 - share])]


def _quarter_turns(probability: float, window: Sequence[int]) -> list[RandRotate90d]:
    if not probability:
        return []
    if window[0] != window[1]:
        problem = f"a window of {tuple(window)} cannot be turned"
        raise UsageError("rot90_probability", problem, "set it to 0 in --augment")
    return [RandRotate90d(keys=("image", "label"), prob=probability, spatial_axes=(0, 1))]


def crop_size(spec: BundleSpec) -> tuple[int, int, int]:
    """The window, with its neighbours where it is a slice."""
    x, y, z = spec.roi_size
    if spec.slices is None:
        return x, y, z
    thick = 2 * spec.slices.reach + 1
    x, y, z = (thick if axis == spec.slices.axis else size for axis, size in enumerate((x, y, z)))
    return x, y, z


class _SliceOut:
    """A slab (C, X, Y, Z) as one slice, its neighbours as channels slice by slice; of the label the middle one."""

    def __init__(self, slices: SliceSpec) -> None:
        self._axis, self._step = slices.axis + 1, slices.neighbour_step

    def __call__(self, case: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image, label = (case[key].movedim(self._axis, 0) for key in ("image", "label"))
        return {**case, "image": image[:: self._step].flatten(0, 1), "label": label[len(label) // 2]}


def foreground_indices(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of labelled and unlabelled voxels of a (1, X, Y, Z) label map.

    Where one kind is absent, the other stands for it; voxels to be ignored are neither, unless there are no others.
    """
    flat = label.reshape(-1)
    foreground, background = np.flatnonzero((flat > 0) & (flat != IGNORE)), np.flatnonzero(flat == 0)
    if not foreground.size and not background.size:
        background = np.arange(flat.size)
    return (foreground if foreground.size else background), (background if background.size else foreground)


def seeds(seed: int, samples: Sequence[int]) -> list[int]:
    """An independent 32-bit seed for each sample number, the same in every process and after a restart."""
    return [int(np.random.SeedSequence([seed, sample]).generate_state(1)[0]) for sample in samples]
