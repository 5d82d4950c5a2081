"""Sliding-window inference: the windows, their weights, and the weighted mean of their logits as a stream of planes.

The rules (starts, padding, importance map, blending on logits) are those of MONAI's
``sliding_window_inference``, so that results agree with bundles run by MONAI itself. What differs is memory: windows
run along one axis, and only the planes that a window still reaches are held.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.bundles.spec import Blend, Padding
from medseg.inference.accumulate import Ring

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


def stream_axis(shape: Sequence[int], roi_size: Sequence[int]) -> int:
    """The axis along which windows run, so that few planes are held: the first, unless another is clearly longer.

    Length counts in windows. Along the first axis windows and sums have the same layout in memory, which is worth more
    than a somewhat smaller ring.
    """
    lengths = [max(size / roi, 1.0) for size, roi in zip(shape, roi_size, strict=True)]
    longest = max(range(3), key=lengths.__getitem__)
    return longest if lengths[longest] >= 1.6 * lengths[0] else 0


def pad_to_window(
    image: Tensor, roi_size: Sequence[int], padding: Padding, value: float, *, flips: Sequence[int] = ()
) -> tuple[Tensor, list[slice]]:
    """Fill an image up to the window where it is smaller, half in front and half behind.

    Args:
        image: (C, D, H, W).
        roi_size: window in voxels.
        padding: constant, replicate (border voxel) or reflect.
        value: for constant padding.
        flips: axes along which the image counts as flipped: where the amount is odd, the larger half is in front.

    Returns:
        The padded image and the slices that cut (.., D, H, W) back out of it.
    """
    missing = [max(roi - size, 0) for roi, size in zip(roi_size, image.shape[1:], strict=True)]
    front = [n - n // 2 if axis in flips else n // 2 for axis, n in enumerate(missing)]
    inside = [slice(n, n + size) for n, size in zip(front, image.shape[1:], strict=True)]
    if not any(missing):
        return image, inside
    amounts = [amount for axis in (2, 1, 0) for amount in (front[axis], missing[axis] - front[axis])]
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
    """Logits of a whole volume from logits of overlapping windows; for small volumes, see `logit_planes`.

    Args:
        image: (C, D, H, W) float32, on the host.
        network: as for `logit_planes`, and so are the other arguments.
        roi_size: window in voxels.
        overlap: share of the window that neighbours share, 0 to below 1.
        blend: weighting of overlapping windows.
        padding: how a volume smaller than the window is filled up.
        padding_value: the value for constant padding.
        sw_batch_size: windows for each pass.
        device: where the network lives.
        progress: called with (windows done, windows in all).

    Returns:
        Logits (K, D, H, W) float32 on the host.
    """
    axis = stream_axis(image.shape[1:], roi_size)
    planes = logit_planes(
        image,
        network,
        roi_size=roi_size,
        overlap=overlap,
        blend=blend,
        padding=padding,
        padding_value=padding_value,
        sw_batch_size=sw_batch_size,
        device=device,
        axis=axis,
        progress=progress,
    )
    return stacked(planes, image.shape[1:], axis)


def stacked(planes: Iterator[Tensor], shape: Sequence[int], axis: int) -> Tensor:
    """Planes (K, A, B) along `axis`, in order, as one tensor (K, *shape)."""
    volume = torch.empty(0)
    for index, plane in enumerate(planes):
        if index == 0:
            volume = torch.empty((len(plane), *shape), dtype=plane.dtype)
        volume.select(1 + axis, index).copy_(plane)
    return volume


@torch.inference_mode()
def logit_planes(
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
    axis: int = 0,
    flips: Sequence[int] = (),
    reuse: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Logits of a volume, plane after plane, from logits of overlapping windows.

    Windows run with `axis` slowest; a plane is given out as soon as no later window reaches it.

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
        axis: spatial axis whose planes are wanted.
        flips: spatial axes along which the network sees the volume flipped; the planes are those of the volume as it
            stands, in its own order.
        reuse: evaluate windows of one and the same value (air, padding) once. Exact for a network whose output depends
            on nothing but the window; never done for a module in training mode.
        progress: called with (windows done, windows in all).

    Yields:
        Logits (K, A, B) float32 on the host, A and B the two other axes in order; one for each voxel along `axis`.
    """
    padded, inside = pad_to_window(image, roi_size, padding, padding_value, flips=flips)
    starts = [window_starts(n, roi, overlap) for n, roi in zip(padded.shape[1:], roi_size, strict=True)]
    for flipped in flips:
        last = padded.shape[1 + flipped] - roi_size[flipped]
        starts[flipped] = [last - first for first in reversed(starts[flipped])]
    order = (axis, *(other for other in range(3) if other != axis))
    corners = list(itertools.product(*(starts[one] for one in order)))
    weight = importance_map(roi_size, blend).permute(order).contiguous()
    turned_inside = [inside[one] for one in order]
    dims = [1 + one for one in flips]
    if isinstance(network, nn.Module) and any(module.training for module in network.modules()):
        reuse = False

    ring: Ring | None = None
    constant = torch.empty(0)  # the last constant window's logits
    flushed = done = 0
    for group in _groups(padded, corners, order, roi_size, sw_batch_size, reuse=reuse):
        live = [entry.window.flip(dims) if dims else entry.window for entry in group if entry.window is not None]
        outputs = iter(_predict(network, torch.stack(live), device) if live else ())
        for entry in group:
            if entry.window is None:
                logits = constant
            else:
                logits = next(outputs)
                logits = (logits.flip(dims) if dims else logits).permute(0, *(1 + one for one in order)).contiguous()
                if entry.constant:
                    constant = logits if len(live) == 1 else logits.clone()
            if ring is None:
                ring = Ring(len(logits), weight.shape, [padded.shape[1 + one] for one in order[1:]])
            for index in range(flushed, entry.corner[0]):
                plane = ring.take(index, turned_inside[1:])
                if turned_inside[0].start <= index < turned_inside[0].stop:
                    yield plane
            flushed = max(flushed, entry.corner[0])
            ring.add(logits, weight, entry.corner)
        del logits, outputs  # not beside the next ones: with 100 classes they are 350 MB
        done += len(group)
        if progress is not None:
            progress(done, len(corners))
    if ring is not None:
        for index in range(flushed, turned_inside[0].stop):
            plane = ring.take(index, turned_inside[1:])
            if index >= turned_inside[0].start:
                yield plane


@dataclass(frozen=True, slots=True)
class _Entry:
    """A window in line.

    Attributes:
        corner: its first voxel, the streamed axis first.
        window: (C, *roi_size), a view; None when it is constant and equal to the constant window before it.
        constant: whether its voxels all have the same value, in each channel.
    """

    corner: tuple[int, ...]
    window: Tensor | None
    constant: bool


def _groups(
    image: Tensor,
    corners: Sequence[tuple[int, ...]],
    order: Sequence[int],
    roi_size: Sequence[int],
    batch_size: int,
    *,
    reuse: bool,
) -> Iterator[list[_Entry]]:
    """Windows in order, in groups that hold at most `batch_size` of those that the network has to see."""
    group: list[_Entry] = []
    live, known = 0, None
    for corner in corners:
        index = [slice(None)] * 4
        for first, axis in zip(corner, order, strict=True):
            index[1 + axis] = slice(first, first + roi_size[axis])
        window = image[tuple(index)]
        value = _constant_value(window) if reuse else None
        if value is not None and value == known:
            group.append(_Entry(corner, None, constant=True))
            continue
        if live == batch_size:
            yield group
            group, live = [], 0
        known = known if value is None else value
        group.append(_Entry(corner, window, constant=value is not None))
        live += 1
    yield group


def _constant_value(window: Tensor) -> tuple[float, ...] | None:
    """The value of each channel of a window (C, d, h, w) all of whose voxels are equal, else None."""
    first = window[:, :1, :1, :1]
    steps = [max(n - 1, 1) for n in window.shape[1:]]
    if not bool((window[:, :: steps[0], :: steps[1], :: steps[2]] == first).all()):  # corners: most end here
        return None
    return tuple(first.flatten().tolist()) if bool((window == first).all()) else None


def _predict(network: Predictor, batch: Tensor, device: torch.device | None) -> Tensor:
    """Logits (B, K, *roi_size) float32 on the host."""
    found = network(batch.to(device))
    logits = found if isinstance(found, Tensor) else found[0]
    return logits.to("cpu", torch.float32)
