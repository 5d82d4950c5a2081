"""The segmentation loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn
from torch.nn import functional

from medseg.bundles.spec import BundleSpec
from medseg.training.config import Loss

IGNORE = 255
"""Value, in label maps of training, of voxels that count neither in the loss nor in the Dice."""


class SegmentationLoss(nn.Module):
    """Dice plus cross-entropy, also over several outputs of falling resolution.

    Outputs below full resolution are compared with the label map at their size (nearest). Voxels of the label `IGNORE`
    count nowhere. Overlapping regions have channels of their own and the Dice of their sigmoid alone, as published for
    brain tumors.

    Args:
        settings: what the Dice counts, and the weight of each output; by default each has half the weight of the one
            before, as in nnU-Net's deep supervision. The weights are scaled to a sum of one.
        spec: slices or volumes, and whether labels overlap.

    Shape:
        logits (B, K, D, H, W), or a sequence of those; label (B, 1, D, H, W) int64 -> scalar. In 2D without D.
    """

    def __init__(self, settings: Loss, spec: BundleSpec) -> None:
        super().__init__()
        self.weights, self.factor, self.regions = settings.output_weights, settings.factor, region_labels(spec)
        self.dice = DiceLoss(
            include_background=settings.include_background or bool(self.regions),
            squared_pred=settings.squared,
            batch=spec.slices is not None if settings.batch is None else settings.batch,
        )

    def forward(self, logits: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        """The loss of one batch; see the class for shapes."""
        outputs = [logits] if isinstance(logits, Tensor) else list(logits)
        weights = list(self.weights or [0.5**level for level in range(len(outputs))])[: len(outputs)]
        loss = torch.zeros((), device=outputs[0].device)
        for weight, output in zip(weights, outputs, strict=False):
            target = label
            if output.shape[2:] != label.shape[2:]:
                target = functional.interpolate(label.float(), size=output.shape[2:], mode="nearest-exact").long()
            loss = loss + weight / sum(weights) * self._one(output.float(), target)
        return self.factor * loss

    def _one(self, logits: Tensor, label: Tensor) -> Tensor:
        counted = label != IGNORE
        everywhere = bool(counted.all())
        if self.regions:
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
        dice: Tensor = self.dice(probabilities, wanted)
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
