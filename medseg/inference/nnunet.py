"""nnU-Net's way from a scan's voxels to the network's: crop, normalise, resample edge to edge.

It agrees with nnU-Net's ``DefaultPreprocessor``: `scipy.ndimage` and skimage's ``resize`` (half-pixel centres, edge
voxels repeated, values kept within the range of what was resampled).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundles.nnunet import ChannelNormalization
from medseg.errors import InputError
from medseg.inference.resample import CubicAxis, Positions, resample_cubic, resample_linear

Box = tuple[slice, slice, slice]

# nnU-Net divides by no less.
_LEAST = 1e-8


def nonzero_box(image: NDArray[np.float32]) -> Box:
    """The smallest box that holds every voxel that is not 0 in some channel; everything where there is none.

    Args:
        image: (C, X, Y, Z), any layout.
    """
    found = (image != 0).any(axis=0)
    box = []
    for axis in range(3):
        used = np.flatnonzero(found.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, found.shape[axis]))
    return box[0], box[1], box[2]


def normalize(image: NDArray[np.float32], channels: Sequence[ChannelNormalization], *, name: str) -> Tensor:
    """Normalise each channel at the scan's own voxels.

    Args:
        image: (C, X, Y, Z), already cropped, any layout.
        channels: how.
        name: of the scan, for messages.

    Returns:
        (C, X, Y, Z) float32.

    Raises:
        InputError: a channel that is to be of 8 bits has other values.
    """
    result = np.array(image, dtype=np.float32, order="C")
    inside: NDArray[np.bool_] | None = None
    for number, (channel, how) in enumerate(zip(result, channels, strict=True)):
        if how.scheme == "ZScoreNormalization":
            if how.inside and inside is None:
                from scipy import ndimage

                inside = ndimage.binary_fill_holes((image != 0).any(axis=0))
            chosen = channel[inside] if how.inside and inside is not None else channel
            scored = (chosen - chosen.mean(dtype=np.float64)) / max(chosen.std(dtype=np.float64), _LEAST)
            if how.inside and inside is not None:
                channel[inside] = scored
            else:
                channel[...] = scored
        elif how.scheme == "CTNormalization":
            np.clip(channel, how.lower, how.upper, out=channel)
            channel -= how.mean
            channel /= max(how.std, _LEAST)
        elif how.scheme == "RescaleTo01Normalization":
            channel -= channel.min()
            channel /= max(float(channel.max()), _LEAST)
        elif how.scheme == "RGBTo01Normalization":
            low, high = float(channel.min()), float(channel.max())
            if low < 0 or high > 255:
                raise InputError(
                    name, f"channel {number} runs from {low:g} to {high:g}", "the bundle takes colours from 0 to 255"
                )
            channel /= 255
    return torch.from_numpy(result)


def resample(image: Tensor, shape: tuple[int, int, int], *, order: int, order_z: int, apart: int | None) -> Tensor:
    """Resample edge to edge.

    Args:
        image: (C, X, Y, Z) float32.
        shape: the wanted spatial shape.
        order: 1 (linear) or 3 (cubic spline; values stay within the range of the channel, or slice).
        order_z: 0 (nearest) or 1 (linear), along `apart`.
        apart: axis along which slices are resampled one by one, and then chosen or mixed; None for all axes at once.

    Returns:
        (C, *shape) float32.
    """
    if tuple(image.shape[1:]) == shape:
        return image
    step = [have / wanted for have, wanted in zip(image.shape[1:], shape, strict=True)]
    if apart is None and order == 3:
        found = resample_cubic(image, shape, step, centred=True)
        for channel, source in zip(found, image, strict=True):
            channel.clamp_(source.min(), source.max())
        return found
    if apart is None:
        return resample_linear(image, shape, step, centred=True)
    stack = image.movedim(1 + apart, 1)
    across = [axis for axis in range(3) if axis != apart]
    if order == 3:
        rows, columns = (CubicAxis(image.shape[1 + axis], shape[axis], step[axis], centred=True) for axis in across)

        def resized(plane: Tensor) -> Tensor:
            return columns.columns(rows.rows(plane)).clamp_(plane.min(), plane.max())
    else:
        below, beside = (
            Positions.along(image.shape[1 + axis], shape[axis], step[axis], centred=True) for axis in across
        )

        def resized(plane: Tensor) -> Tensor:
            return beside.sample(below.sample(plane, 0), 1)

    slices = Positions.along(stack.shape[1], shape[apart], step[apart], centred=True, nearest=order_z == 0)
    needed = sorted({*slices.lower.tolist(), *slices.upper.tolist()})
    place = torch.full((stack.shape[1],), -1)
    place[needed] = torch.arange(len(needed))
    made = torch.stack([torch.stack([resized(plane) for plane in channel[needed]]) for channel in stack])
    chosen = Positions(place[slices.lower], place[slices.upper], slices.weight).sample(made, 1)
    return chosen.movedim(1, 1 + apart).contiguous()
