"""What a network learns from that segments and diagnoses at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.networks.mdpformer import Diagnosis

_VOXEL_WEIGHTS = (0.2, 1.0, 2.0)  # background, organ, lesion
_LABEL_SMOOTHING = 0.05
_POSITIVE_WEIGHT = 3.0


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy with weighted classes, plus one minus the mean Dice of organ and lesion.

    The Dice of each structure is the mean over the patients who have it: in one Dice over the batch a small lesion
    beside a large one counts for next to nothing, and is then not found.

    Args:
        logits: (B, 3, D, H, W): background, organ, lesion.
        label: (B, D, H, W) int64.
    """
    entropy = functional.cross_entropy(logits, label, weight=logits.new_tensor(_VOXEL_WEIGHTS))
    probabilities = logits.softmax(dim=1)
    dice = []
    for value in range(1, logits.shape[1]):
        found, wanted = probabilities[:, value].flatten(1), (label == value).to(logits.dtype).flatten(1)
        both = (2 * (found * wanted).sum(dim=1) + 1) / (found.sum(dim=1) + wanted.sum(dim=1) + 1)
        there = wanted.any(dim=1)
        dice.append((both * there).sum() / there.sum() if bool(there.any()) else both.mean())
    return entropy + 1 - torch.stack(dice).mean()


def evidence_loss(mask_logits: Tensor, lesion: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of the true class's evidence against the lesion; 0 in a batch without lesions.

    Each class has a query of its own, so there is nothing to match.

    Args:
        mask_logits: (B, classes, d, h, w).
        lesion: (B, D, H, W), 1 inside; a voxel of the coarser grid counts as lesion if any of its voxels does.
        target: (B,) int64, the patients' classes.
    """
    ill = lesion.flatten(1).any(dim=1)
    if not bool(ill.any()):
        return mask_logits.sum() * 0
    logits = mask_logits[torch.arange(len(target), device=target.device), target][ill]
    wanted = functional.adaptive_max_pool3d(lesion[ill].to(logits.dtype), logits.shape[1:])
    return functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=logits.new_tensor(_POSITIVE_WEIGHT))


def class_weights(targets: Sequence[int], classes: int) -> Tensor:
    """Weight of each class, one over the root of its frequency, with mean 1; a class without patients weighs as one.

    Args:
        targets: the training patients' classes.
        classes: their number.
    """
    counts = torch.bincount(torch.tensor(list(targets), dtype=torch.int64), minlength=classes).clamp(min=1)
    weights = counts.to(torch.float32) ** -0.5
    return weights / weights.mean()


class DiagnosisLoss(nn.Module):
    """Segmentation, classification and evidence together.

    Args:
        weights: of the classes, see `class_weights`.
        classification: weight of the classification beside the segmentation.
        evidence: weight of the evidence maps.

    Shape:
        found of a batch B; label (B, 1, D, H, W) int64: 0 background, 1 organ, 2 lesion; target (B,) int64 -> scalar.
    """

    weights: Tensor

    def __init__(self, weights: Tensor, *, classification: float = 1.0, evidence: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.classification, self.evidence = classification, evidence

    def forward(self, found: Diagnosis, label: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch; see the class for shapes."""
        seg, classes, masks = (part.float() for part in found)
        named = functional.cross_entropy(classes, target, weight=self.weights, label_smoothing=_LABEL_SMOOTHING)
        shown = evidence_loss(masks, label[:, 0] == 2, target)
        return segmentation_loss(seg, label[:, 0]) + self.classification * named + self.evidence * shown
