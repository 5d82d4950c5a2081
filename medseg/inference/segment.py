"""From a preprocessed case to labels on the scan's grid, without a volume of all classes on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundles.spec import BundleSpec
from medseg.inference.device import Predictor
from medseg.inference.ensemble import (
    Layout,
    Model,
    activated,
    filled_up,
    lay_out,
    mean_and_entropy,
    mean_planes,
    plane_order,
    scan_view,
    to_scan,
)
from medseg.inference.ensemble import plane_axis as plane_axis
from medseg.inference.export import export_labels, paint_regions, strongest_class
from medseg.inference.placement import Placement
from medseg.inference.preprocess import Case
from medseg.inference.slice_inferer import SliceInferer
from medseg.inference.sliding_window import Windows, logit_planes, window_count
from medseg.inference.uncertainty import Summary, Tally, entropy

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Uncertainty:
    """How sure a segmentation is, on the scan's grid; see `medseg.inference.uncertainty`.

    Attributes:
        entropy: (X, Y, Z) float32, 0 to 1.
        mutual_information: (X, Y, Z) float32, 0 to 1; None for a single pass.
        summary: the case in a few numbers.
    """

    entropy: NDArray[np.float32]
    mutual_information: NDArray[np.float32] | None
    summary: Summary


@dataclass(frozen=True)
class Segmentation:
    """What the network made of a case, on the scan's grid.

    Attributes:
        labels: (X, Y, Z) uint8, or uint16 where the values need it.
        probabilities: (K, X, Y, Z) float32 when asked for, else None.
        windows: how often the network looked.
        network_s: wall time until the logits were there, seconds; the rest went into the way back to the scan's grid.
        uncertainty: when asked for, else None.
    """

    labels: NDArray[np.integer]
    probabilities: NDArray[np.float32] | None
    windows: int
    network_s: float
    uncertainty: Uncertainty | None = None


def segment(
    case: Case,
    network: Predictor,
    spec: BundleSpec,
    placement: Placement | None = None,
    *,
    flips: Sequence[tuple[int, ...]] = ((),),
    probabilities: bool = False,
    progress: Progress | None = None,
) -> Segmentation:
    """Run a bundle's network over a case, as `segment_together` does with one model at temperature 1.

    Args:
        case: the image on the model grid.
        network: the bundle's, in eval mode, where `placement` says.
        spec: window, overlap, blending, padding, slices, activation, regions.
        placement: where the network lives; None for the host.
        flips: sets of spatial axes; the probabilities of the volume flipped along each set are averaged.
        probabilities: keep the probability of each class.
        progress: called with (windows done, windows in all).

    Raises:
        NotFiniteError: the network gave NaN or only infinities somewhere.
    """
    model = Model(case, network, spec, flips=tuple(flips))
    return segment_together([model], placement, probabilities=probabilities, progress=progress)


@torch.inference_mode()
def segment_together(
    models: Sequence[Model],
    placement: Placement | None = None,
    *,
    probabilities: bool = False,
    uncertainty: bool = False,
    progress: Progress | None = None,
) -> Segmentation:
    """Run one or several models over a scan and average their probabilities.

    The temperature of a model alone has no part in its labels, only in probabilities and uncertainty.

    Args:
        models: with the scan as each of them takes it; labels, activation and regions are those of all.
        placement: where the networks live; None for the host.
        probabilities: keep the probability of each class.
        uncertainty: also work out the maps of uncertainty.
        progress: called with (windows done, windows in all).

    Raises:
        NotFiniteError: a network gave NaN or only infinities somewhere.
    """
    first = models[0]
    spec, grid = first.spec, first.case.grid
    shape, channels = grid.order.inverse.shape(grid.turned_shape), spec.out_channels
    counts = [len(model.flips) for model in models]
    apart = uncertainty and sum(counts) > 1
    layout = lay_out([one.case.grid for one in models], [one.spec for one in models], passes=counts, apart=apart)
    passes = _Passes(models, layout, placement or Placement(), progress)
    highest = max((region.label for region in spec.regions), default=channels - 1)
    labels: NDArray[Any] = np.zeros(shape, dtype=np.uint8 if highest < 256 else np.uint16)
    alone = len(models) == 1
    if not (probabilities or uncertainty or spec.regions):
        _label(passes, labels, [1.0] if alone else [model.temperature for model in models])
        return Segmentation(labels, None, passes.windows, passes.seconds)

    # The first K channels are what is kept and measured, the last K decide the labels.
    temperatures = [
        (model.temperature, 1.0) if alone and model.temperature != 1 else (model.temperature,) for model in models
    ]
    kept = np.zeros((channels, *shape), dtype=np.float32) if probabilities else None
    sure = _Sure(spec, shape, several=apart) if uncertainty else None
    painted, view = passes.view(0)(labels), passes.view(0)
    for index, (maps, inside) in enumerate(
        _maps(passes, temperatures, measure=sure.entropy if apart and sure else None)
    ):
        plane = painted[index]
        if spec.regions:
            paint_regions(maps[-channels:], spec.regions, plane)
        else:
            plane[...] = strongest_class(maps[-channels:].numpy())
        if kept is not None:
            view(kept)[:, index] = maps[:channels].numpy()
        if sure is not None:
            sure.add(index, maps[:channels], plane, inside, view)
    return Segmentation(labels, kept, passes.windows, passes.seconds, None if sure is None else sure.found())


def logits_by_plane(
    image: Tensor,
    network: Predictor,
    spec: BundleSpec,
    placement: Placement,
    *,
    axis: int,
    flips: Sequence[int] = (),
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Logits of a preprocessed image by a 3D or a 2D network, plane after plane.

    Args:
        image: (C, X', Y', Z') float32, on the host.
        network: the bundle's, in eval mode, where `placement` says.
        spec: window, overlap, blending, padding, slices.
        placement: where the network lives.
        axis: as `plane_axis` gives it.
        flips: spatial axes along which the network sees the image flipped.
        progress: called with (windows done, windows in all).

    Returns:
        Planes (K, A, B) float32 on the host, in the image's own order.
    """
    if spec.slices is not None:
        return SliceInferer.of(spec).planes(image, network, placement, flips=flips, progress=progress)
    return logit_planes(
        image, network, Windows.of(spec), placement=placement, axis=axis, flips=flips, progress=progress
    )


def window_total(model: Model) -> int:
    """How often a model's network looks at its case, all flips together."""
    x, y, z = model.case.image.shape[1:]
    return len(model.flips) * _windows((x, y, z), model.spec)


def _windows(shape: tuple[int, int, int], spec: BundleSpec) -> int:
    if spec.slices is not None:
        return SliceInferer.of(spec).window_count(shape)
    return window_count(shape, spec.roi_size, spec.overlap, spec.tiling)


def _uncropped(planes: Iterator[Tensor], case: Case, axis: int, *, softmax: bool) -> Iterator[Tensor]:
    """Planes (K, a, b) of logits of a cropped image as planes of its model grid, background for sure around it."""
    if case.crop is None:
        return planes
    i, j, k = plane_order(axis)
    shape = (case.grid.shape[i], case.grid.shape[j], case.grid.shape[k])

    def outside(classes: int) -> Tensor:
        values = torch.full((classes,), -math.inf)
        if softmax:
            values[0] = 0
        return values

    return filled_up(planes, shape, (case.crop[i], case.crop[j], case.crop[k]), outside)


def _label(passes: _Passes, labels: NDArray[Any], temperatures: Sequence[float]) -> None:
    """Fill in the labels of exclusive classes, of which no probability is wanted."""
    case, axis = passes.models[0].case, passes.axes[0]
    grid, (i, j, k) = case.grid, plane_order(axis)
    target = grid.order.apply(labels)[grid.inside].transpose(i, j, k)
    size, step, near = (grid.shape[i], grid.shape[j], grid.shape[k]), grid.step_back, grid.nearest
    step, near = (step[i], step[j], step[k]), (near[i], near[j], near[k])
    if len(passes.logits) == 1 or passes.layout.on_model_grid:
        softmax = len(passes.logits) == 1 and not passes.keeps_logits
        mean = passes.logits[0]
        if len(passes.logits) > 1:
            planes = passes.answers([(one,) for one in temperatures])
            mean = mean_planes(planes, passes.weights, lockstep=passes.layout.lockstep)
        export_labels(mean, target, size=size, step=step, softmax=softmax, nearest=near, centred=grid.centred)
    else:
        painted = passes.view(0)(labels)
        for index, (maps, _) in enumerate(_maps(passes, [(one,) for one in temperatures])):
            painted[index] = strongest_class(maps.numpy())


def _maps(
    passes: _Passes,
    temperatures: Sequence[tuple[float, ...]],
    *,
    measure: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Planes of the scan's grid, in the order of the first pass: the mean of all passes, and of their entropies.

    Args:
        passes: the passes.
        temperatures: of each model, those whose probabilities are wanted, one below the other.
        measure: the entropy of a plane; None when it is not wanted.
    """
    layout, planes = passes.layout, passes.answers(temperatures)
    if layout.on_model_grid:
        mean = planes[0] if len(planes) == 1 else mean_planes(planes, passes.weights, lockstep=layout.lockstep)
        for maps in to_scan(mean, passes.models[0].case.grid, passes.axes[0], outside=passes.outside):
            yield passes.finished(maps), None
        return
    grids = [model.case.grid for model in passes.models]
    for maps, inside in mean_and_entropy(
        [
            to_scan(one, grid, axis, outside=passes.outside)
            for one, grid, axis in zip(planes, grids, passes.axes, strict=True)
        ],
        passes.weights,
        [passes.view(number) for number in range(len(planes))],
        entropy=None if measure is None else lambda plane: measure(passes.finished(plane)),
        shape=grids[0].order.inverse.shape(grids[0].turned_shape),
        channels=passes.models[0].spec.out_channels * len(temperatures[0]),
        lockstep=layout.lockstep,
    ):
        yield passes.finished(maps), inside


class _Passes:
    """The passes of all models, each a stream of planes of logits.

    Attributes:
        layout: how they come together.
        models: of each pass.
        axes: of each pass, the axis of its model grid along which its planes come.
        weights: of each pass; they add up to 1.
        logits: of each pass, planes (K, A, B).
        windows: how often the networks look, in all.
        keeps_logits: logits are averaged and brought to the scan's grid, and become probabilities there, as nnU-Net
            does it; beside other bundles a model of nnU-Net gives probabilities like they do.
    """

    def __init__(
        self, models: Sequence[Model], layout: Layout, placement: Placement, progress: Progress | None
    ) -> None:
        self.layout = layout
        self.windows = sum(window_total(model) for model in models)
        self.keeps_logits = len(models) == 1 and models[0].spec.nnunet is not None
        self.models: list[Model] = []
        self.axes: list[int] = []
        self.weights: list[float] = []
        self.logits: list[Iterator[Tensor]] = []
        self._numbers: list[int] = []
        self._clock, count = _Clock(), _Count(progress, self.windows)
        for number, (model, axis) in enumerate(zip(models, layout.axes, strict=True)):
            for flips in model.flips:
                self._numbers.append(number)
                self.models.append(model)
                self.axes.append(axis)
                self.weights.append(model.weight / len(model.flips))
                planes = logits_by_plane(
                    model.case.image,
                    model.network,
                    model.spec,
                    placement,
                    axis=axis,
                    flips=flips,
                    progress=count.of_pass(),
                )
                planes = _uncropped(planes, model.case, axis, softmax=model.spec.activation == "softmax")
                self.logits.append(self._clock.timed(planes))

    @property
    def seconds(self) -> float:
        """Wall time spent waiting for logits."""
        return self._clock.seconds

    def answers(self, temperatures: Sequence[Sequence[float]]) -> list[Iterator[Tensor]]:
        """What is averaged: the passes as planes (T K, A, B), at each of the temperatures of their model."""
        activation = None if self.keeps_logits else self.models[0].spec.activation
        return [
            activated(planes, activation, temperatures[number])
            for planes, number in zip(self.logits, self._numbers, strict=True)
        ]

    def finished(self, maps: Tensor) -> Tensor:
        """Averaged planes (T K, P, Q) on the scan's grid as probabilities."""
        if not self.keeps_logits:
            return maps
        spec = self.models[0].spec
        parts = [maps[first : first + spec.out_channels] for first in range(0, len(maps), spec.out_channels)]
        return torch.cat([part.sigmoid() if spec.activation == "sigmoid" else part.softmax(dim=0) for part in parts])

    def outside(self, count: int) -> Tensor:
        """What `answers` would hold, (count,), where the network did not look: background for sure."""
        spec = self.models[0].spec
        none = -math.inf if self.keeps_logits else 0.0
        values = torch.full((spec.out_channels,), none)
        if spec.activation == "softmax":
            values[0] = 0.0 if self.keeps_logits else 1.0
        return values.repeat(count // spec.out_channels)

    def view(self, number: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """Turns an array of the scan's grid so that its planes are in the order of a pass."""
        return partial(scan_view, grid=self.models[number].case.grid, axis=self.axes[number])


class _Sure:
    """The maps of uncertainty of a scan, filled in plane by plane."""

    def __init__(self, spec: BundleSpec, shape: tuple[int, int, int], *, several: bool) -> None:
        self._activation = spec.activation
        self._entropy = np.zeros(shape, dtype=np.float32)
        self._information = np.zeros(shape, dtype=np.float32) if several else None
        self._channels = spec.out_channels
        self._tally = Tally(tuple(spec.labels), spec.out_channels, spec.regions)

    def entropy(self, maps: Tensor) -> Tensor:
        """Entropy (P, Q) of a plane whose first K channels are probabilities."""
        return entropy(maps[: self._channels], self._activation)

    def add(
        self,
        index: int,
        maps: Tensor,
        labels: NDArray[Any],
        inside: Tensor | None,
        view: Callable[[NDArray[Any]], NDArray[Any]],
    ) -> None:
        """Add plane `index` of `view`: probabilities (K, P, Q), labels (P, Q), mean entropy of the passes (P, Q)."""
        found, information = self.entropy(maps), None
        view(self._entropy)[index] = found.numpy()
        if self._information is not None and inside is not None:
            information = (found - inside).clamp_(min=0).numpy()
            view(self._information)[index] = information
        self._tally.add(maps, labels, found.numpy(), information)

    def found(self) -> Uncertainty:
        """The maps and what they say in a few numbers."""
        return Uncertainty(self._entropy, self._information, self._tally.summary())


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
