"""The segmentation loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn
from torch.nn import functional

from medseg.bundles.spec import BundleSpec
from medseg.training.config import Loss

IGNORE = 255
"""Value, in label maps of training, of voxels that count neither in the loss nor in the Dice."""

_ANNOTATED = 0.5  # where probabilities sum to less, most of the voxel lies where nothing was annotated


class SegmentationLoss(nn.Module):
    """Dice plus cross-entropy, also over several outputs of falling resolution.

    Outputs below full resolution are compared with the label map at their size (nearest; probabilities are averaged).
    Voxels of the label `IGNORE`, or without any probability, count nowhere. Overlapping regions have channels of their
    own and the Dice of their sigmoid alone, as published for brain tumors.

    Args:
        settings: what the Dice counts, and the weight of each output; by default each has half the weight of the one
            before, as in nnU-Net's deep supervision. The weights are scaled to a sum of one.
        spec: slices or volumes, and whether labels overlap.

    Shape:
        logits (B, K, D, H, W), or a sequence of those; label (B, 1, D, H, W) int64, or (B, K, D, H, W) float32, the
        probability of each class -> scalar. In 2D without D.
    """

    def __init__(self, settings: Loss, spec: BundleSpec) -> None:
        super().__init__()
        self.weights, self.factor, self.regions = settings.output_weights, settings.factor, region_labels(spec)
        counted: dict[str, Any] = {
            "include_background": settings.include_background or bool(self.regions),
            "batch": spec.slices is not None if settings.batch is None else settings.batch,
        }
        self.dice = DiceLoss(squared_pred=settings.squared, **counted)
        # Against probabilities the plain Dice is best where all of a blurred border is inside; with squares it is best
        # where the prediction equals the target.
        self.soft_dice = DiceLoss(squared_pred=True, **counted)

    def forward(self, logits: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        """The loss of one batch; see the class for shapes."""
        outputs = [logits] if isinstance(logits, Tensor) else list(logits)
        weights = list(self.weights or [0.5**level for level in range(len(outputs))])[: len(outputs)]
        loss = torch.zeros((), device=outputs[0].device)
        for weight, output in zip(weights, outputs, strict=False):
            target = label
            if output.shape[2:] != label.shape[2:]:
                mode = "area" if label.is_floating_point() else "nearest-exact"
                target = functional.interpolate(label.float(), size=output.shape[2:], mode=mode).to(label.dtype)
            loss = loss + weight / sum(weights) * self._one(output.float(), target)
        return self.factor * loss

    def _one(self, logits: Tensor, label: Tensor) -> Tensor:
        soft = label.is_floating_point()
        counted = label.sum(dim=1, keepdim=True) > _ANNOTATED if soft else label != IGNORE
        everywhere = bool(counted.all())
        if soft:
            probabilities, wanted = logits.softmax(dim=1), label
            each = functional.cross_entropy(logits, label, reduction="none")
            entropy = each.sum() / counted.sum().clamp(min=1)
        elif self.regions:
            probabilities = logits.sigmoid()
            parts = [torch.isin(label, torch.tensor(region, device=label.device)) for region in self.regions]
            wanted, entropy = torch.cat(parts, dim=1).to(logits.dtype), torch.zeros((), device=logits.device)
        else:
            label = label.masked_fill(~counted, 0)
            probabilities = logits.softmax(dim=1)
            hot = functional.one_hot(label[:, 0], logits.shape[1]).movedim(-1, 1)
            wanted, entropy = hot.to(logits.dtype), self._entropy(logits, label[:, 0], counted[:, 0], everywhere)
        if not everywhere:
            probabilities, wanted = probabilities * counted, wanted * counted
        dice: Tensor = (self.soft_dice if soft else self.dice)(probabilities, wanted)
        return dice + entropy

    @staticmethod
    def _entropy(logits: Tensor, label: Tensor, counted: Tensor, everywhere: bool) -> Tensor:  # noqa: FBT001 - both follow from one another
        if everywhere:
            return functional.cross_entropy(logits, label)
        each = functional.cross_entropy(logits, label, reduction="none")
        return (each * counted).sum() / counted.sum().clamp(min=1)


def region_labels(spec: BundleSpec) -> tuple[tuple[int, ...], ...]:
    """For each output channel the labels inside its region; empty for exclusive labels.

    A region that is painted later lies inside those before it: the whole tumor holds its core and its edema.
    """
    inside = {
        region.channel: tuple(later.label for later in spec.regions[number:])
        for number, region in enumerate(spec.regions)
    }
    return tuple(inside[channel] for channel in sorted(inside))
