"""The intensity steps of a bundle, as functions on the image; they agree with MONAI's transforms of the same name."""

from __future__ import annotations

import torch
from torch import Tensor

from medseg.bundles.spec import (
    IntensityStep,
    NormalizeIntensity,
    ScaleIntensity,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
)


def apply_intensity(image: Tensor, step: IntensityStep) -> Tensor:
    """Apply one step.

    Args:
        image: (C, X, Y, Z) float32.
        step: a step of `BundleSpec.intensity`.

    Returns:
        Image of the same shape, float32.
    """
    if isinstance(step, NormalizeIntensity):
        return _normalize(image, step)
    if isinstance(step, ScaleIntensity):
        parts = image if step.channel_wise else image[None]
        scaled = torch.stack([_rescale(part, step.minv, step.maxv) for part in parts])
        return scaled if step.channel_wise else scaled[0]
    if isinstance(step, ScaleIntensityRange):
        return _scale(image, step.a_min, step.a_max, step.b_min, step.b_max, clip=step.clip)
    return _percentiles(image, step)


def _normalize(image: Tensor, step: NormalizeIntensity) -> Tensor:
    if step.channel_wise:
        return torch.stack([_z_score(channel, nonzero=step.nonzero) for channel in image])
    return _z_score(image, nonzero=step.nonzero)


def _z_score(image: Tensor, *, nonzero: bool) -> Tensor:
    chosen = image != 0 if nonzero else None
    values = (image if chosen is None else image[chosen]).to(torch.float64)  # sums near 1e33 overflow float32
    if values.numel() == 0:
        return image.clone()
    deviation = values.std(correction=0)
    scored = ((image.to(torch.float64) - values.mean()) / (deviation if deviation > 0 else 1.0)).to(torch.float32)
    return scored if chosen is None else torch.where(chosen, scored, image)


def _rescale(image: Tensor, minv: float, maxv: float) -> Tensor:
    low, high = image.min(), image.max()
    if low == high:  # as MONAI
        return image * minv
    return (image - low) / (high - low) * (maxv - minv) + minv


def _scale(image: Tensor, a_min: float, a_max: float, b_min: float, b_max: float, *, clip: bool) -> Tensor:
    if a_max == a_min:  # as MONAI: a constant range is only shifted
        return image - a_min + b_min
    scaled = (image - a_min) / (a_max - a_min) * (b_max - b_min) + b_min
    return scaled.clamp(b_min, b_max) if clip else scaled


def _percentiles(image: Tensor, step: ScaleIntensityRangePercentiles) -> Tensor:
    import numpy as np

    def scaled(part: Tensor) -> Tensor:
        low, high = np.percentile(part.numpy(), [step.lower, step.upper])
        return _scale(part, float(low), float(high), step.b_min, step.b_max, clip=step.clip)

    return torch.stack([scaled(channel) for channel in image]) if step.channel_wise else scaled(image)
