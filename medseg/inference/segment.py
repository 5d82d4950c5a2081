"""From a preprocessed case to labels on the scan's grid, without a volume of all classes on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.bundles.spec import Activation, BundleSpec
from medseg.inference.export import export_labels, export_maps, paint_regions, strongest_class
from medseg.inference.preprocess import Case, ModelGrid
from medseg.inference.slice_inferer import SliceInferer
from medseg.inference.sliding_window import logit_planes, stream_axis, window_count

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Segmentation:
    """What the network made of a case, on the scan's grid.

    Attributes:
        labels: (X, Y, Z) uint8, or uint16 where the values need it.
        probabilities: (K, X, Y, Z) float32 when asked for, else None.
        windows: how often the network looked.
        network_s: wall time until the logits were there, seconds; the rest went into the way back to the scan's grid.
    """

    labels: NDArray[np.integer]
    probabilities: NDArray[np.float32] | None
    windows: int
    network_s: float


@torch.inference_mode()
def segment(
    case: Case,
    network: nn.Module,
    spec: BundleSpec,
    device: torch.device,
    *,
    flips: Sequence[tuple[int, ...]] = ((),),
    probabilities: bool = False,
    progress: Progress | None = None,
) -> Segmentation:
    """Run a bundle's network over a case.

    Args:
        case: the image on the model grid.
        network: the bundle's, in eval mode, on `device`.
        spec: window, overlap, blending, padding, slices, activation, regions.
        device: where the network lives.
        flips: sets of spatial axes; the probabilities of the volume flipped along each set are averaged.
        probabilities: keep the probability of each class.
        progress: called with (windows done, windows in all).

    Raises:
        NotFiniteError: the network gave NaN or only infinities somewhere.
    """
    grid, axis = case.grid, plane_axis(case.grid.shape, spec)
    order = (axis, *(other for other in range(3) if other != axis))
    highest = max((region.label for region in spec.regions), default=spec.out_channels - 1)
    shape = grid.order.inverse.shape(grid.turned_shape)
    labels = np.zeros(shape, dtype=np.uint8 if highest < 256 else np.uint16)
    target = grid.order.apply(labels).transpose(order)
    i, j, k = order
    size = (grid.shape[i], grid.shape[j], grid.shape[k])
    step = (1 / grid.step[i], 1 / grid.step[j], 1 / grid.step[k])

    windows = _windows(grid, spec)
    count, clock = _Count(progress, len(flips) * windows), _Clock()
    passes = [
        clock.timed(logits_by_plane(case.image, network, spec, device, axis=axis, flips=one, progress=count.of_pass()))
        for one in flips
    ]
    if not (probabilities or spec.regions):
        if len(passes) == 1:
            export_labels(passes[0], target, size=size, step=step)
        else:
            mean = _mean(passes, spec.activation, lockstep=in_lockstep(grid.shape, spec, len(flips)))
            export_labels(mean, target, size=size, step=step, softmax=False)
        return Segmentation(labels, None, len(flips) * windows, clock.seconds)

    kept = np.zeros((spec.out_channels, *shape), dtype=np.float32) if probabilities else None
    kept_target = None if kept is None else grid.order.apply(kept).transpose(0, *(1 + one for one in order))
    mean = _mean(passes, spec.activation, lockstep=in_lockstep(grid.shape, spec, len(flips)))
    for index, maps in enumerate(export_maps(mean, size=size, step=step, shape=target.shape)):
        if spec.regions:
            paint_regions(maps, spec.regions, target[index])
        else:
            target[index] = strongest_class(maps.numpy())
        if kept_target is not None:
            kept_target[:, index] = maps.numpy()
    return Segmentation(labels, kept, len(flips) * windows, clock.seconds)


def plane_axis(shape: Sequence[int], spec: BundleSpec) -> int:
    """The axis of a model grid of this shape along which planes of logits become final."""
    return stream_axis(shape, spec.roi_size) if spec.slices is None else spec.slices.axis


def in_lockstep(shape: Sequence[int], spec: BundleSpec, flips: int) -> bool:
    """Whether the passes of several flips run side by side, a ring each, rather than one after the other.

    One after the other they need the mean of all planes; that is less memory where the volume is short.
    """
    axis = plane_axis(shape, spec)
    return flips * spec.roi_size[axis] <= spec.roi_size[axis] + shape[axis]


def logits_by_plane(
    image: Tensor,
    network: nn.Module,
    spec: BundleSpec,
    device: torch.device,
    *,
    axis: int,
    flips: Sequence[int] = (),
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Logits of a preprocessed image by a 3D or a 2D network, plane after plane.

    Args:
        image: (C, X', Y', Z') float32, on the host.
        network: the bundle's, in eval mode, on `device`.
        spec: window, overlap, blending, padding, slices.
        device: where the network lives.
        axis: as `plane_axis` gives it.
        flips: spatial axes along which the network sees the image flipped.
        progress: called with (windows done, windows in all).

    Returns:
        Planes (K, A, B) float32 on the host, in the image's own order.
    """
    if spec.slices is not None:
        return SliceInferer.of(spec).planes(image, network, device=device, flips=flips, progress=progress)
    return logit_planes(
        image,
        network,
        roi_size=spec.roi_size,
        overlap=spec.overlap,
        blend=spec.blend,
        padding=spec.padding,
        padding_value=spec.padding_value,
        sw_batch_size=spec.sw_batch_size,
        device=device,
        axis=axis,
        flips=flips,
        progress=progress,
    )


def _windows(grid: ModelGrid, spec: BundleSpec) -> int:
    if spec.slices is not None:
        return SliceInferer.of(spec).window_count(grid.shape)
    return window_count(grid.shape, spec.roi_size, spec.overlap)


def _mean(passes: Sequence[Iterator[Tensor]], activation: Activation, *, lockstep: bool) -> Iterator[Tensor]:
    """Mean over the passes of the probabilities of each plane, (K, A, B) float32."""

    def activated(logits: Tensor) -> Tensor:
        return logits.sigmoid() if activation == "sigmoid" else logits.softmax(dim=0)

    if lockstep:
        for together in zip(*passes, strict=True):
            total = activated(together[0])
            for logits in together[1:]:
                total += activated(logits)
            yield total.div_(len(passes))
        return
    totals = [activated(logits) for logits in passes[0]]
    for planes in passes[1:]:
        for total, logits in zip(totals, planes, strict=True):
            total += activated(logits)
    totals.reverse()
    while totals:
        yield totals.pop().div_(len(passes))


class _Clock:
    """Wall time spent waiting for planes, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, planes: Iterator[Tensor]) -> Iterator[Tensor]:
        """The same planes."""
        while True:
            begin = time.perf_counter()
            plane = next(planes, None)
            self.seconds += time.perf_counter() - begin
            if plane is None:
                return
            yield plane


class _Count:
    """Adds up the windows of several passes."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._done: list[int] = []

    def of_pass(self) -> Progress:
        """The callback of one more pass."""
        place = len(self._done)
        self._done.append(0)

        def report(done: int, _all: int) -> None:
            self._done[place] = done
            if self._progress is not None:
                self._progress(sum(self._done), self._total)

        return report
