"""Weighted sums of window logits over the few planes of a volume that windows still reach."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ring:
    """Sums of weighted logits and of weights for as many planes as a window is thick.

    Plane n of the volume lives in slot n modulo the thickness. Windows arrive with their first planes in ascending
    order; a plane that no later window reaches is taken out, which frees its slot.

    Args:
        classes: channels of the logits, K.
        window: the window's size in voxels, the streamed axis first: (d, h, w).
        plane: the size of a plane of the volume, (H, W), at least (h, w).
    """

    def __init__(self, classes: int, window: Sequence[int], plane: Sequence[int]) -> None:
        self._depth, self._height, self._width = window
        self._sums = torch.zeros(classes, self._depth, *plane)
        self._weights = torch.zeros(self._depth, *plane)

    def add(self, logits: Tensor, weight: Tensor, corner: Sequence[int]) -> None:
        """Add a window.

        Args:
            logits: (K, d, h, w).
            weight: importance of the window's voxels, (d, h, w).
            corner: first voxel of the window, the streamed axis first.
        """
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
