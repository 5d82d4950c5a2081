"""Weighted sums of window logits over the few planes of a volume that windows still reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Ring:
    """Sums of weighted logits and of weights for as many planes as a window is thick.

    Plane n of the volume lives in slot n modulo the thickness. Windows arrive with their first planes in ascending
    order; a plane that no later window reaches is taken out, which frees its slot. Adding allocates nothing where the
    logits lie beside the sums, so that memory cannot run out with a window half added.

    Args:
        classes: channels of the logits, K.
        weight: importance of a window's voxels, the streamed axis first, (d, h, w) float32 on the host.
        plane: the size of a plane of the volume, (H, W), at least (h, w).
        zeros: makes the arrays, where they are to lie; None for the host.

    Attributes:
        on_device: whether the sums lie in a device's own memory.
    """

    def __init__(
        self,
        classes: int,
        weight: Tensor,
        plane: Sequence[int],
        *,
        zeros: Callable[..., Tensor] | None = None,
    ) -> None:
        self._depth, self._height, self._width = weight.shape
        self.on_device = zeros is not None
        make = torch.zeros if zeros is None else zeros
        self._sums = make(classes, self._depth, *plane)
        self._weights = make(self._depth, *plane)
        self._weight = weight.to(self._sums.device)

    def to_host(self) -> None:
        """Move the sums out of the device's memory."""
        self._sums, self._weights, self._weight = (
            array.to("cpu", copy=True) for array in (self._sums, self._weights, self._weight)
        )
        self.on_device = False

    def add(self, logits: Tensor, corner: Sequence[int]) -> None:
        """Add a window.

        Args:
            logits: (K, d, h, w).
            corner: first voxel of the window, the streamed axis first.
        """
        logits, weight = logits.to(self._sums.device), self._weight
        first, top, left = corner
        rows, columns = slice(top, top + self._height), slice(left, left + self._width)
        slot = first % self._depth
        before_wrap = self._depth - slot
        self._sums[:, slot:, rows, columns].addcmul_(logits[:, :before_wrap], weight[:before_wrap])
        self._weights[slot:, rows, columns] += weight[:before_wrap]
        if slot:
            self._sums[:, :slot, rows, columns].addcmul_(logits[:, before_wrap:], weight[before_wrap:])
            self._weights[:slot, rows, columns] += weight[before_wrap:]

    def take(self, index: int, inside: Sequence[slice]) -> Tensor:
        """The blended logits of a finished plane, (K, h', w'), cut to `inside`; its slot starts again at zero."""
        slot = index % self._depth
        rows, columns = inside
        mean = self._sums[:, slot, rows, columns] / self._weights[slot, rows, columns]
        self._sums[:, slot].zero_()
        self._weights[slot].zero_()
        return mean
