"""The segmentation loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.nn import functional


class SegmentationLoss(nn.Module):
    """Dice (without background) plus cross-entropy, also over several outputs of falling resolution.

    Outputs below full resolution are compared with the label map at their size (nearest), each with half the
    weight of the one before, the weights summing to one, as in nnU-Net's deep supervision.

    Args:
        batch_dice: one Dice over all crops of a batch. Slices need it: most lack a label, and a Dice of nothing has no
            slope.

    Shape:
        logits (B, K, D, H, W), or a sequence of those; label (B, 1, D, H, W) int64 -> scalar.
    """

    def __init__(self, *, batch_dice: bool = False) -> None:
        super().__init__()
        self.one = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice)

    def forward(self, logits: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        """The loss of one batch; see the class for shapes."""
        outputs = [logits] if isinstance(logits, Tensor) else list(logits)
        weights = [0.5**level for level in range(len(outputs))]
        loss = torch.zeros((), device=outputs[0].device)
        for weight, output in zip(weights, outputs, strict=True):
            target = label
            if output.shape[2:] != label.shape[2:]:
                target = functional.interpolate(label.float(), size=output.shape[2:], mode="nearest-exact").long()
            loss = loss + weight / sum(weights) * self.one(output.float(), target)
        return loss
