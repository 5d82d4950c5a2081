"""2D networks over volumes: slice by slice, called like a 3D network.

Two rules bring slices to a network's size and its logits back. `published` is that of TransUNet and ParaTransCNN: the
slice is zoomed with cubic splines, the labels come back by nearest neighbour, number for number as
`scipy.ndimage.zoom` of orders 3 and 0 does it. `smooth` also zooms with cubic splines, and brings the logits back
linearly, which gives better edges.

Both rules lay the first and last pixels of the two grids on each other. For some sizes, 512 to 224 among them,
rounding takes the last of SciPy's coordinates past the end, and its default boundary writes zeros there: the last row
and column of the slice are lost. The published results were computed so, hence `published` does it too; `smooth` not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.inference.device import Arrival, Predictor
from medseg.inference.placement import Placement
from medseg.inference.spline import mirrored_spline

Resize = Literal["none", "published", "smooth"]


@dataclass(frozen=True, slots=True)
class SlicePredictor:
    """A 2D network as a predictor of volumes.

    Slices are taken along one axis and run in batches; they do not depend on each other. Batches go to the network's
    device and are brought to its size there, the volume and the logits stay where the image is.

    Attributes:
        network: (N, C', h, w) -> logits (N, K, h, w), in eval mode; of several outputs the first counts.
        axis: spatial axis that is cut: 0, 1, 2 for D, H, W of the image.
        size: the network's in-plane size (h, w), in the order of the two axes that are left.
        batch_size: slices in one call of the network on the host; other devices find theirs.
        resize: "none" pads a slice on both sides with the volume's minimum and crops the logits back; "published" and
            "smooth" stretch the whole slice to `size`, see the module's text.
        neighbours: slices on each side that are given as channels too, at the ends the last slice repeated; channels
            run slice by slice, C' = (2 neighbours + 1) C.
        placement: where the network lives; None for where it is now, with torch's settings as they are.
        progress: called with (slices done, slices in all).

    Raises:
        ValueError: a setting is out of range, or, when called, the network is in training mode, the image is not
            (B, C, D, H, W), or a slice is larger than `size` while `resize` is "none".
    """

    network: Predictor
    _: KW_ONLY
    axis: int
    size: tuple[int, int]
    batch_size: int = 8
    resize: Resize = "none"
    neighbours: int = 0
    placement: Placement | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.axis not in (0, 1, 2):
            raise ValueError(f"axis is {self.axis}; it must be 0, 1 or 2")
        if min(self.size) < 1:
            raise ValueError(f"size is {self.size}; both numbers must be positive")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.resize not in get_args(Resize):
            raise ValueError(f"resize is {self.resize!r}; it must be one of {', '.join(get_args(Resize))}")
        if self.neighbours < 0:
            raise ValueError(f"neighbours is {self.neighbours}; it must not be negative")

    def __call__(self, image: Tensor) -> Tensor:
        """Map image (B, C, D, H, W) to logits (B, K, D, H, W) on the same grid."""
        if image.ndim != 5:
            raise ValueError(f"image is {tuple(image.shape)}; it must be (B, C, D, H, W)")
        return torch.stack([torch.stack(list(self.planes(volume)), dim=1 + self.axis) for volume in image])

    @torch.no_grad()
    def planes(self, volume: Tensor) -> Iterator[Tensor]:
        """Logits of volume (C, D, H, W), slice after slice: (K, h, w), where the volume is."""
        if isinstance(self.network, nn.Module) and self.network.training:
            raise ValueError("the network is in training mode, where slices of a batch change each other; call eval()")
        stack = volume.movedim(1 + self.axis, 0)
        fit = self._fit(stack)
        count = len(stack)
        if count == 0:
            raise ValueError(f"image has no slice along axis {self.axis}")
        reach = torch.arange(-self.neighbours, self.neighbours + 1)
        sources = (torch.arange(count)[:, None] + reach).clamp(0, count - 1).to(stack.device)
        place = self.placement or Placement.on(self._device(volume))

        def cut(first: int, last: int) -> Tensor:
            return fit.forward(place.device.send(stack[sources[first:last]].flatten(1, 2)))

        late: list[Arrival] = []  # on their way to the host while the device computes the next ones
        outputs = place.predict(self.network, cut, count, turn=fit.back, on_host=self.batch_size)
        for done, logits in enumerate(outputs, start=1):
            late.append(place.device.fetch(logits))
            while len(late) > (place.batch_size(0) if place.device.own_memory else 0):
                yield late.pop(0).wait().to(volume.device)
            if self.progress is not None:
                self.progress(done, count)
        for arrival in late:
            yield arrival.wait().to(volume.device)

    def _device(self, volume: Tensor) -> torch.device:
        if isinstance(self.network, nn.Module):
            return next((p.device for p in self.network.parameters()), volume.device)
        return volume.device

    def _fit(self, stack: Tensor) -> _Pad | _Zoom:
        """The rule for slices (n, C, h, w) of this volume."""
        native = (stack.shape[2], stack.shape[3])
        if self.resize != "none":
            return _Zoom(native, self.size, smooth=self.resize == "smooth")
        axes = [name for axis, name in enumerate("DHW") if axis != self.axis]
        for name, have, legal in zip(axes, native, self.size, strict=True):
            if have > legal:
                raise ValueError(
                    f"{name} is {have}; slices of at most {legal} can be padded, larger ones need a resize"
                )
        # One value per channel, the same for every slice; neighbours repeat the channels.
        minimum = stack.amin(dim=(0, 2, 3)).repeat(2 * self.neighbours + 1)
        return _Pad(native, self.size, minimum)


class _Pad:
    """Slices in the middle of a larger field, and back."""

    def __init__(self, native: tuple[int, int], size: tuple[int, int], minimum: Tensor) -> None:
        self.size, self.minimum = size, minimum
        self.rows, self.columns = (
            slice((legal - have) // 2, (legal - have) // 2 + have) for have, legal in zip(native, size, strict=True)
        )

    def forward(self, batch: Tensor) -> Tensor:
        """Map slices (n, C', h, w) to (n, C', *size)."""
        if batch.shape[2:] == self.size:
            return batch
        field = self.minimum.to(batch.device)[None, :, None, None].repeat(len(batch), 1, *self.size)
        field[:, :, self.rows, self.columns] = batch
        return field

    def back(self, logits: Tensor) -> Tensor:
        """Map logits (n, K, *size) to (n, K, h, w)."""
        return logits[:, :, self.rows, self.columns]


class _Zoom:
    """Slices stretched to another size with cubic splines, and logits back by nearest neighbour or linearly.

    The nearest neighbour of logits is taken before the argmax, which gives the same labels as that of the label map.
    """

    def __init__(self, native: tuple[int, int], size: tuple[int, int], *, smooth: bool) -> None:
        self.native, self.same, self.smooth = native, native == size, smooth
        self.rows, self.columns = (
            cubic_zoom_matrix(have, legal, zero_past_end=not smooth).to(torch.float32)
            for have, legal in zip(native, size, strict=True)
        )
        self.back_rows, self.back_columns = (
            nearest_zoom_index(legal, have) for have, legal in zip(native, size, strict=True)
        )

    def forward(self, batch: Tensor) -> Tensor:
        """Map slices (n, C', h, w) to (n, C', *size)."""
        if self.same:
            return batch
        with torch.autocast(batch.device.type, enabled=False):  # half precision would blur the intensities
            rows, columns = self.rows.to(batch.device), self.columns.to(batch.device)
            zoomed: Tensor = rows @ batch.to(torch.float32) @ columns.T
            return zoomed

    def back(self, logits: Tensor) -> Tensor:
        """Map logits (n, K, *size) to (n, K, h, w)."""
        if self.same:
            return logits
        if self.smooth:
            return F.interpolate(logits, size=self.native, mode="bilinear", align_corners=True)
        rows, columns = self.back_rows.to(logits.device)[:, None], self.back_columns.to(logits.device)
        # Past the end all classes get 0, so that the argmax is the background, which SciPy writes into label maps.
        return logits[:, :, rows, columns].masked_fill((rows < 0) | (columns < 0), 0)


def nearest_zoom_index(size_in: int, size_out: int) -> Tensor:
    """The input index that each output index copies, (size_out,) int64, as `scipy.ndimage.zoom(order=0)` picks it.

    An output index past the end, for which SciPy writes zero, gets -1. Torch's own nearest modes use other grids.
    """
    coordinates = _zoom_coordinates(size_in, size_out)
    index = (coordinates + 0.5).floor().long()
    return index.masked_fill(coordinates > size_in - 1, -1)


def cubic_zoom_matrix(size_in: int, size_out: int, *, zero_past_end: bool) -> Tensor:
    """The matrix (size_out, size_in) float64 that zooms an axis as `scipy.ndimage.zoom(order=3)` does.

    Args:
        size_in: pixels before.
        size_out: pixels after.
        zero_past_end: write zero where rounding takes a coordinate past the end, as SciPy does; else the last pixel.
    """
    if size_in == 1:
        return torch.ones(size_out, 1, dtype=torch.float64)
    coordinates = _zoom_coordinates(size_in, size_out)
    matrix = mirrored_spline(coordinates.clamp(max=size_in - 1), size_in)
    if zero_past_end:
        matrix[coordinates > size_in - 1] = 0
    return matrix


def _zoom_coordinates(size_in: int, size_out: int) -> Tensor:
    """Where each output index lies on the input's axis, end on end, with SciPy's rounding: (size_out,) float64."""
    ratio = (size_in - 1) / (size_out - 1) if size_out > 1 else 1.0
    return torch.arange(size_out, dtype=torch.float64) * ratio
