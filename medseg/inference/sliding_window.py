"""Sliding-window inference: the windows, their weights, and the weighted mean of their logits.

The rules (starts, padding, importance map, blending on logits) are those of MONAI's
``sliding_window_inference``, so that results agree with bundles run by MONAI itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from medseg.bundles.spec import Blend, Padding

Predictor = Callable[[Tensor], Tensor | tuple[Tensor, ...] | list[Tensor]]


def window_starts(size: int, roi: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis; the last window ends at the border."""
    if size <= roi:
        return [0]
    step = max(int(roi * (1 - overlap)), 1)
    count = -(-(size - roi) // step) + 1
    return [min(index * step, size - roi) for index in range(count)]


def window_count(shape: Sequence[int], roi_size: Sequence[int], overlap: float) -> int:
    """How many windows cover a volume of this spatial shape."""
    return math.prod(len(window_starts(size, roi, overlap)) for size, roi in zip(shape, roi_size, strict=True))


def importance_map(roi_size: Sequence[int], blend: Blend) -> Tensor:
    """Weight of each voxel of a window, (D, H, W) float32.

    Gaussian: sigma is an eighth of the window along each axis, centred between the middle voxels where
    the size is even, bounded below by 1e-3 so that the border counts.
    """
    if blend == "constant":
        return torch.ones(tuple(roi_size))
    weight = torch.ones(())
    for size in roi_size:
        offset = torch.arange(-(size - 1) / 2.0, (size - 1) / 2.0 + 1)
        weight = weight.unsqueeze(-1) * torch.exp(offset**2 / (-2.0 * (0.125 * size) ** 2))
    return weight.clamp(min=max(float(weight.min()), 1e-3))


def pad_to_window(image: Tensor, roi_size: Sequence[int], padding: Padding, value: float) -> tuple[Tensor, list[slice]]:
    """Fill an image up to the window where it is smaller, half in front and half behind.

    Args:
        image: (C, D, H, W).
        roi_size: window in voxels.
        padding: constant, replicate (border voxel) or reflect.
        value: for constant padding.

    Returns:
        The padded image and the slices that cut (.., D, H, W) back out of it.
    """
    missing = [max(roi - size, 0) for roi, size in zip(roi_size, image.shape[1:], strict=True)]
    inside = [slice(n // 2, n // 2 + size) for n, size in zip(missing, image.shape[1:], strict=True)]
    if not any(missing):
        return image, inside
    amounts = [amount for n in reversed(missing) for amount in (n // 2, n - n // 2)]
    if padding == "constant":
        return functional.pad(image, amounts, value=value), inside
    return functional.pad(image[None], amounts, mode=padding)[0], inside


def sliding_window(
    image: Tensor,
    network: Predictor,
    *,
    roi_size: Sequence[int],
    overlap: float,
    blend: Blend = "gaussian",
    padding: Padding = "constant",
    padding_value: float = 0.0,
    sw_batch_size: int = 1,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Logits of a whole volume from logits of overlapping windows.

    Args:
        image: (C, D, H, W) float32, on the host.
        network: maps (B, C, *roi_size) to logits (B, K, *roi_size); of several outputs the first is taken.
        roi_size: window in voxels.
        overlap: share of the window that neighbours share, 0 to below 1.
        blend: weighting of overlapping windows.
        padding: how a volume smaller than the window is filled up.
        padding_value: the value for constant padding.
        sw_batch_size: windows for each pass.
        device: where the network lives; windows travel there and logits back.
        progress: called with (windows done, windows in all).

    Returns:
        Logits (K, D, H, W) float32 on the host.
    """
    padded, inside = pad_to_window(image, roi_size, padding, padding_value)
    starts = [window_starts(n, roi, overlap) for n, roi in zip(padded.shape[1:], roi_size, strict=True)]
    windows = [
        tuple(slice(first, first + roi) for first, roi in zip(corner, roi_size, strict=True))
        for corner in itertools.product(*starts)
    ]
    weight = importance_map(roi_size, blend)
    total = torch.empty(0)
    count = torch.zeros(padded.shape[1:])
    for begin in range(0, len(windows), sw_batch_size):
        batch = windows[begin : begin + sw_batch_size]
        found = network(torch.stack([padded[(slice(None), *window)] for window in batch]).to(device))
        logits = (found if isinstance(found, Tensor) else found[0]).to("cpu", torch.float32)
        if begin == 0:
            total = torch.zeros((logits.shape[1], *padded.shape[1:]))
        for window, part in zip(batch, logits, strict=True):
            total[(slice(None), *window)] += part * weight
            count[window] += weight
        if progress is not None:
            progress(min(begin + sw_batch_size, len(windows)), len(windows))
    return total.div_(count)[(slice(None), *inside)]
