"""Sliding-window inference: the windows, their weights, and the weighted mean of their logits as a stream of planes.

The rules (starts, padding, importance map, blending on logits) are those of MONAI's
``sliding_window_inference``, so that results agree with bundles run by MONAI itself. What differs is memory: windows
run along one axis, and only the planes that a window still reaches are held.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.bundles.spec import Blend, BundleSpec, Padding, Tiling
from medseg.inference.accumulate import Ring
from medseg.inference.device import Arrival, Predictor
from medseg.inference.placement import Field, Placement


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How windows cover a volume.

    Attributes:
        roi_size: window in voxels.
        overlap: share of the window that neighbours share, 0 to below 1.
        blend: weighting of overlapping windows.
        padding: how a volume smaller than the window is filled up.
        padding_value: the value for constant padding.
        sw_batch_size: windows for each pass of the network on the host; other devices find theirs.
        tiling: whose rules say where windows lie, and what their voxels weigh.
    """

    roi_size: Sequence[int]
    overlap: float
    blend: Blend = "gaussian"
    padding: Padding = "constant"
    padding_value: float = 0.0
    sw_batch_size: int = 1
    tiling: Tiling = "monai"

    @classmethod
    def of(cls, spec: BundleSpec) -> Windows:
        """Those of a bundle."""
        return cls(
            roi_size=spec.roi_size,
            overlap=spec.overlap,
            blend=spec.blend,
            padding=spec.padding,
            padding_value=spec.padding_value,
            sw_batch_size=spec.sw_batch_size,
            tiling=spec.tiling,
        )


def window_starts(size: int, roi: int, overlap: float, tiling: Tiling = "monai") -> list[int]:
    """First voxels of the windows along one axis; the last window ends at the border.

    MONAI moves the last window back, so that it overlaps more; nnU-Net spaces them all evenly.
    """
    if size <= roi:
        return [0]
    if tiling == "nnunet":
        gaps = math.ceil((size - roi) / (roi * (1 - overlap)))
        return [round((size - roi) / gaps * index) for index in range(gaps + 1)]
    step = max(int(roi * (1 - overlap)), 1)
    count = -(-(size - roi) // step) + 1
    return [min(index * step, size - roi) for index in range(count)]


def window_count(shape: Sequence[int], roi_size: Sequence[int], overlap: float, tiling: Tiling = "monai") -> int:
    """How many windows cover a volume of this spatial shape."""
    return math.prod(len(window_starts(size, roi, overlap, tiling)) for size, roi in zip(shape, roi_size, strict=True))


def importance_map(roi_size: Sequence[int], blend: Blend, tiling: Tiling = "monai") -> Tensor:
    """Weight of each voxel of a window, (D, H, W) float32.

    Gaussian: sigma is an eighth of the window along each axis, centred between the middle voxels where
    the size is even, bounded below by 1e-3 so that the border counts. nnU-Net's is centred on the later of the two
    middle voxels, in half precision, and 0 becomes the smallest other weight.
    """
    if blend == "constant":
        return torch.ones(tuple(roi_size))
    if tiling == "nnunet":
        return _nnunet_map(roi_size)
    weight = torch.ones(())
    for size in roi_size:
        offset = torch.arange(-(size - 1) / 2.0, (size - 1) / 2.0 + 1)
        weight = weight.unsqueeze(-1) * torch.exp(offset**2 / (-2.0 * (0.125 * size) ** 2))
    return weight.clamp(min=max(float(weight.min()), 1e-3))


def _nnunet_map(roi_size: Sequence[int]) -> Tensor:
    weight = torch.full((), 10.0, dtype=torch.float64)  # what nnU-Net scales the largest weight to
    for size in roi_size:
        offset = torch.arange(size, dtype=torch.float64) - size // 2
        falloff = torch.exp(offset**2 / (-2.0 * (size / 8) ** 2))
        # A Gaussian filter of an impulse: nothing beyond four deviations, rounded to voxels.
        falloff[offset.abs() > int(4 * size / 8 + 0.5)] = 0
        weight = weight.unsqueeze(-1) * falloff
    half = weight.to(torch.float16).to(torch.float32)
    return torch.where(half == 0, half[half > 0].min(), half)


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
    windows: Windows,
    *,
    placement: Placement | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Logits of a whole volume from logits of overlapping windows; for small volumes, see `logit_planes`.

    Args:
        image: (C, D, H, W) float32, on the host.
        network: as for `logit_planes`, and so are the other arguments.
        windows: how they cover the volume.
        placement: where the network lives; None for the host.
        progress: called with (windows done, windows in all).

    Returns:
        Logits (K, D, H, W) float32 on the host.
    """
    axis = stream_axis(image.shape[1:], windows.roi_size)
    planes = logit_planes(image, network, windows, placement=placement, axis=axis, progress=progress)
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
    windows: Windows,
    *,
    placement: Placement | None = None,
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
        windows: how they cover the volume.
        placement: where the network lives, and what else lies there; None for the host.
        axis: spatial axis whose planes are wanted.
        flips: spatial axes along which the network sees the volume flipped; the planes are those of the volume as it
            stands, in its own order.
        reuse: evaluate windows of one and the same value (air, padding) once. Exact for a network whose output depends
            on nothing but the window; never done for a module in training mode.
        progress: called with (windows done, windows in all).

    Yields:
        Logits (K, A, B) float32 on the host, A and B the two other axes in order; one for each voxel along `axis`.
    """
    place, roi_size = placement or Placement(), windows.roi_size
    # nnU-Net flips each window where it is, and not the volume before it is cut into windows.
    turned = flips if windows.tiling == "monai" else ()
    padded, inside = pad_to_window(image, roi_size, windows.padding, windows.padding_value, flips=turned)
    starts = [
        window_starts(n, roi, windows.overlap, windows.tiling)
        for n, roi in zip(padded.shape[1:], roi_size, strict=True)
    ]
    for flipped in turned:
        last = padded.shape[1 + flipped] - roi_size[flipped]
        starts[flipped] = [last - first for first in reversed(starts[flipped])]
    order = (axis, *(other for other in range(3) if other != axis))
    corners = list(itertools.product(*(starts[one] for one in order)))
    dims = [1 + one for one in flips]
    if isinstance(network, nn.Module) and any(module.training for module in network.modules()):
        reuse = False

    def turn(logits: Tensor) -> Tensor:
        logits = logits.flip([1 + one for one in dims]) if dims else logits
        return logits.permute(0, 1, *(2 + one for one in order)).contiguous()

    field = Field(padded)
    weight = importance_map(roi_size, windows.blend, windows.tiling).permute(order).contiguous()
    sums = _Sums(place, field, weight, [padded.shape[1 + one] for one in order], [inside[one] for one in order])
    constant = torch.empty(0)  # the last constant window's logits
    done = 0
    for group in _groups(
        padded, corners, order, roi_size, lambda: place.batch_size(windows.sw_batch_size), reuse=reuse
    ):
        live = [entry.place for entry in group if entry.place is not None]

        def cut(first: int, last: int, live: Sequence[tuple[slice, ...]] = live) -> Tensor:
            return field.windows(live[first:last], place.device, dims)

        outputs = place.predict(network, cut, len(live), turn=turn, on_host=windows.sw_batch_size)
        for entry in group:
            logits = constant if entry.place is None else next(outputs)
            if entry.constant and entry.place is not None:
                constant = logits if len(live) == 1 else logits.clone()
            yield from sums.add(logits, entry.corner)
            del logits  # not beside the next ones: with 100 classes they are 350 MB
        done += len(group)
        if progress is not None:
            progress(done, len(corners))
    yield from sums.rest()


class _Sums:
    """Adds windows to the ring, wherever it lies, and hands out finished planes.

    A device with its own memory runs behind the host. Where the ring lies there, planes travel to the host beside the
    next windows, and are handed out while the device computes. Where it lies on the host, logits travel, and are added
    while the device computes the next ones.

    Args:
        place: where the network lives.
        field: the volume.
        weight: importance of a window's voxels, (d, h, w), the streamed axis first.
        shape: of the volume, padded, the streamed axis first.
        inside: what of it is wanted.
    """

    def __init__(
        self, place: Placement, field: Field, weight: Tensor, shape: Sequence[int], inside: Sequence[slice]
    ) -> None:
        self._place, self._field, self._weight = place, field, weight
        self._shape, self._inside = shape, inside
        self._ring: Ring | None = None
        self._flushed = 0
        self._planes: deque[Arrival] = deque()
        self._logits: deque[tuple[tuple[int, ...], Arrival]] = deque()

    def add(self, logits: Tensor, corner: tuple[int, ...]) -> Iterator[Tensor]:
        """Add a window's logits (K, d, h, w); gives planes that are finished."""
        if self._ring is None:
            self._ring = self._place.ring(self._field, len(logits), self._weight, self._shape[1:])
        device = self._place.device
        if not device.own_memory or self._ring.on_device:
            yield from self._late_logits(0)
            yield from self._blend(self._ring, logits, corner)
        else:
            self._logits.append((corner, device.fetch(logits)))
            del logits
            # Those of the pass before: the device computes meanwhile.
            yield from self._late_logits(self._place.batch_size(1))

    def rest(self) -> Iterator[Tensor]:
        """The planes that are left, when all windows are there."""
        yield from self._late_logits(0)
        yield from self._late_planes()
        if self._ring is not None:
            yield from self._finished(self._ring, self._inside[0].stop)

    def _blend(self, ring: Ring, logits: Tensor, corner: tuple[int, ...]) -> Iterator[Tensor]:
        if corner[0] > self._flushed:
            yield from self._late_planes()
            if ring.on_device:
                self._planes.extend(map(self._place.device.fetch, self._finished(ring, corner[0])))
            else:
                yield from self._finished(ring, corner[0])
        ring.add(logits, corner)
        while self._planes and self._place.device.busy() and self._planes[0].ready():
            yield self._planes.popleft().wait()

    def _finished(self, ring: Ring, end: int) -> Iterator[Tensor]:
        """Planes before `end`, taken out of the ring."""
        for index in range(self._flushed, end):
            plane = self._place.take(ring, index, self._inside[1:])
            self._flushed = index + 1
            if self._inside[0].start <= index < self._inside[0].stop:
                yield plane

    def _late_logits(self, keep: int) -> Iterator[Tensor]:
        while self._ring is not None and len(self._logits) > keep:
            corner, arrival = self._logits.popleft()
            yield from self._blend(self._ring, arrival.wait(), corner)

    def _late_planes(self) -> Iterator[Tensor]:
        while self._planes:
            yield self._planes.popleft().wait()


@dataclass(frozen=True, slots=True)
class _Entry:
    """A window in line.

    Attributes:
        corner: its first voxel, the streamed axis first.
        place: cuts it out of the volume; None when it is constant and equal to the constant window before it.
        constant: whether its voxels all have the same value, in each channel.
    """

    corner: tuple[int, ...]
    place: tuple[slice, ...] | None
    constant: bool


def _groups(
    image: Tensor,
    corners: Sequence[tuple[int, ...]],
    order: Sequence[int],
    roi_size: Sequence[int],
    batch_size: Callable[[], int],
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
        value = _constant_value(image[tuple(index)]) if reuse else None
        if value is not None and value == known:
            group.append(_Entry(corner, None, constant=True))
            continue
        if live and live >= batch_size():
            yield group
            group, live = [], 0
        known = known if value is None else value
        group.append(_Entry(corner, tuple(index), constant=value is not None))
        live += 1
    yield group


def _constant_value(window: Tensor) -> tuple[float, ...] | None:
    """The value of each channel of a window (C, d, h, w) all of whose voxels are equal, else None."""
    first = window[:, :1, :1, :1]
    steps = [max(n - 1, 1) for n in window.shape[1:]]
    if not bool((window[:, :: steps[0], :: steps[1], :: steps[2]] == first).all()):  # corners: most end here
        return None
    return tuple(first.flatten().tolist()) if bool((window == first).all()) else None
