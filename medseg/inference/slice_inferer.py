"""2D networks over volumes, as an inferer: what the engine and MONAI's bundle runner call for a slice-wise bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medseg.bundles.spec import Blend, BundleSpec, Padding, Resize, Tiling
from medseg.inference.device import Predictor
from medseg.inference.placement import Placement
from medseg.inference.slices import SlicePredictor
from medseg.inference.sliding_window import Windows, logit_planes, stacked, window_count

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class SliceInferer:
    """Runs a 2D network over volumes.

    Without a resize the network's window slides over each slice, and a slice smaller than it is padded. With one, each
    whole slice is stretched to the window and its logits brought back, as `medseg.inference.slices` describes; overlap,
    mode and padding then mean nothing.

    Attributes:
        axis: spatial axis that is cut into slices.
        roi_size: the window in voxels, 1 along `axis`.
        resize: "none", "published" or "smooth".
        neighbours: slices on each side that are channels too.
        neighbour_step: distance from one of these channels to the next, in slices; 1: adjacent.
        sw_batch_size: windows or slices for each pass on the host; other devices find theirs.
        overlap: share of the window that neighbours share, 0 to below 1.
        mode: weighting of overlapping windows.
        padding_mode: how a slice smaller than the window is filled up.
        cval: the value for constant padding.
        tiling: whose rules say where windows lie, and what their voxels weigh.
    """

    axis: int
    roi_size: tuple[int, int, int]
    resize: Resize = "none"
    neighbours: int = 0
    neighbour_step: int = 1
    sw_batch_size: int = 8
    overlap: float = 0.5
    mode: Blend = "gaussian"
    padding_mode: Padding = "constant"
    cval: float = 0.0
    tiling: Tiling = "monai"

    @classmethod
    def of(cls, spec: BundleSpec) -> SliceInferer:
        """The inferer of a bundle.

        Raises:
            ValueError: the bundle's network is not a 2D one.
        """
        if spec.slices is None:
            raise ValueError("the bundle has no slices")
        return cls(
            axis=spec.slices.axis,
            roi_size=spec.roi_size,
            resize=spec.slices.resize,
            neighbours=spec.slices.neighbours,
            neighbour_step=spec.slices.neighbour_step,
            sw_batch_size=spec.sw_batch_size,
            overlap=spec.overlap,
            mode=spec.blend,
            padding_mode=spec.padding,
            cval=spec.padding_value,
            tiling=spec.tiling,
        )

    def window_count(self, shape: tuple[int, ...]) -> int:
        """How often the network looks at a volume of this spatial shape."""
        if self.resize != "none":
            return shape[self.axis]
        return window_count(shape, self.roi_size, self.overlap, self.tiling)

    def __call__(
        self,
        inputs: Tensor,
        network: Predictor,
        *,
        device: torch.device | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Logits of volumes.

        Args:
            inputs: (B, C, D, H, W) float32.
            network: maps (N, C', h, w) to logits (N, K, h, w), or to several of which the first is taken.
            device: where the network lives; None: where `inputs` is.
            progress: called with (windows done, windows in all), for each volume.

        Returns:
            Logits (B, K, D, H, W) float32.
        """
        place = Placement.on(device or inputs.device)
        volumes = inputs.as_subclass(Tensor)  # MONAI hands over its own kind of tensor, which drags metadata along
        return torch.stack(
            [
                stacked(self.planes(volume, network, place, progress=progress), volume.shape[1:], self.axis)
                for volume in volumes
            ]
        )

    def planes(
        self,
        volume: Tensor,
        network: Predictor,
        placement: Placement,
        *,
        flips: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> Iterator[Tensor]:
        """Logits of a volume, slice after slice.

        Args:
            volume: (C, D, H, W) float32.
            network: as for the call.
            placement: where the network lives.
            flips: spatial axes along which the network sees the volume flipped; the slices are those of the volume as
                it stands, in its own order.
            progress: called with (windows done, windows in all).

        Returns:
            Slices (K, A, B) float32 on the host, A and B the two other axes in order.
        """
        along = [1 + self.axis] if self.axis in flips else []
        across = [axis for axis in flips if axis != self.axis]
        stack = self._with_neighbours(volume.flip(along) if along else volume)
        run = self._slide if self.resize == "none" else self._stretch
        return run(stack.flip(along) if along else stack, network, placement, across, progress)

    def _slide(
        self, stack: Tensor, network: Predictor, placement: Placement, flips: Sequence[int], progress: Progress | None
    ) -> Iterator[Tensor]:
        """Windows of one slice each, run through the engine's sliding window."""
        windows = Windows(
            roi_size=self.roi_size,
            overlap=self.overlap,
            blend=self.mode,
            padding=self.padding_mode,
            padding_value=self.cval,
            sw_batch_size=self.sw_batch_size,
            tiling=self.tiling,
        )
        return logit_planes(
            stack,
            _Planar(network, self.axis),
            windows,
            placement=placement,
            axis=self.axis,
            flips=flips,
            reuse=not (isinstance(network, nn.Module) and network.training),
            progress=progress,
        )

    def _with_neighbours(self, volume: Tensor) -> Tensor:
        """The volume (C, D, H, W) with the slices around each slice as channels, slice by slice."""
        if not self.neighbours:
            return volume
        here = torch.arange(volume.shape[1 + self.axis], device=volume.device)
        return torch.cat(
            [
                volume.index_select(1 + self.axis, (here + offset * self.neighbour_step).clamp(0, len(here) - 1))
                for offset in range(-self.neighbours, self.neighbours + 1)
            ]
        )

    def _stretch(
        self, stack: Tensor, network: Predictor, placement: Placement, flips: Sequence[int], progress: Progress | None
    ) -> Iterator[Tensor]:
        """Whole slices stretched to the window."""
        height, width = (size for axis, size in enumerate(self.roi_size) if axis != self.axis)
        predictor = SlicePredictor(
            network=network,
            axis=self.axis,
            size=(height, width),
            batch_size=self.sw_batch_size,
            resize=self.resize,
            placement=placement,
            progress=progress,
        )
        dims = [1 + axis for axis in flips]
        if not dims:
            return predictor.planes(stack)
        here = [1 + axis - (axis > self.axis) for axis in flips]
        return (plane.flip(here) for plane in predictor.planes(stack.flip(dims)))


class _Planar(nn.Module):
    """A 2D network as one of windows that are one voxel thick; a module, so that it can be moved to another device."""

    def __init__(self, network: Predictor, axis: int) -> None:
        super().__init__()
        self.network, self._dim = network, 2 + axis
        self.training = False

    def forward(self, windows: Tensor) -> Tensor:
        found = self.network(windows.squeeze(self._dim))
        logits = found if isinstance(found, Tensor) else found[0]
        return logits.unsqueeze(self._dim)
