"""How sure a segmentation is: entropy and mutual information of each voxel, and a score of the case.

Both maps lie between 0 (sure) and 1 (all classes equally likely), on the scan's grid:

- softmax, K classes: H(p) = -sum p ln p / ln K;
- sigmoid, overlapping channels: the mean over the channels of the binary entropy -(p ln p + (1-p) ln (1-p)) / ln 2.

With several passes (members of an ensemble, flips) p is their weighted mean, and the mutual information is
H(mean) - mean of H: the part of the entropy that comes from their disagreement, where more training data would help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundles.spec import Activation, Region

UNSURE = 0.5
"""Entropy above which a voxel counts as uncertain."""


def entropy(probabilities: Tensor, activation: Activation) -> Tensor:
    """Entropy of each voxel, 0 to 1.

    Args:
        probabilities: (K, A, B); with softmax they add up to 1.
        activation: softmax, or sigmoid for channels that overlap.

    Returns:
        (A, B) float32.
    """
    terms: Tensor = torch.special.entr(probabilities)
    if activation == "sigmoid":
        terms += torch.special.entr(1 - probabilities)
        return terms.mean(dim=0).div_(math.log(2)).clamp_(0, 1)
    return terms.sum(dim=0).div_(math.log(max(len(probabilities), 2))).clamp_(0, 1)


@dataclass(frozen=True)
class Summary:
    """What the maps of a case say in a few numbers; a mean over no voxel is None.

    Attributes:
        mean_entropy: over the voxels of any label but the background.
        label_entropy: label value to the mean over its voxels.
        uncertain_share: share of the voxels of any label whose entropy is above `UNSURE`.
        mutual_information: mean over the voxels of any label; None for a single pass.
        score: the Dice that the probabilities themselves lead to expect, 0 to 1: the mean over the labels of
            2 x (sum of p inside the label) / (voxels of the label + sum of p everywhere), over the labels that were
            found or of which the probabilities add up to a voxel at least; 0 where there is none.
    """

    mean_entropy: float | None
    label_entropy: dict[int, float | None]
    uncertain_share: float | None
    mutual_information: float | None
    score: float


class Tally:
    """Sums over the planes of a case.

    Args:
        labels: values of the label map, background included.
        channels: channels of the probabilities, K.
        regions: how overlapping channels become labels; empty for exclusive ones.
    """

    def __init__(self, labels: Sequence[int], channels: int, regions: Sequence[Region]) -> None:
        self._labels = [value for value in labels if value]
        self._regions = regions
        highest = max(labels)
        self._voxels = np.zeros(highest + 1)
        self._entropy = np.zeros(highest + 1)
        self._information = np.zeros(highest + 1)
        self._unsure = 0
        self._several = False
        # Of each structure: voxels, probability inside them, probability everywhere.
        self._structures = np.zeros((channels, 3))

    def add(
        self,
        probabilities: Tensor,
        labels: NDArray[np.integer],
        entropies: NDArray[np.float32],
        information: NDArray[np.float32] | None,
    ) -> None:
        """Add a plane: probabilities (K, A, B), and (A, B) each of labels, entropies and mutual information."""
        flat, size = labels.ravel(), len(self._voxels)
        self._voxels += np.bincount(flat, minlength=size)
        self._entropy += np.bincount(flat, entropies.ravel(), minlength=size)
        self._unsure += int(np.count_nonzero((labels > 0) & (entropies > UNSURE)))
        if information is not None:
            self._several = True
            self._information += np.bincount(flat, information.ravel(), minlength=size)
        self._structures[:, 2] += probabilities.sum(dim=(1, 2), dtype=torch.float64).numpy()
        if self._regions:
            inside = probabilities > 0.5
            self._structures[:, 0] += inside.sum(dim=(1, 2)).numpy()
            self._structures[:, 1] += (probabilities * inside).sum(dim=(1, 2), dtype=torch.float64).numpy()
            return
        index = torch.from_numpy(labels.astype(np.int64))
        chosen = probabilities.gather(0, index[None])[0].numpy()
        self._structures[:, 0] += np.bincount(flat, minlength=len(self._structures))
        self._structures[:, 1] += np.bincount(flat, chosen.ravel(), minlength=len(self._structures))

    def summary(self) -> Summary:
        """The numbers of the case."""
        voxels, found = self._voxels[1:].sum(), self._voxels

        def mean(total: float, count: float) -> float | None:
            return float(total / count) if count else None

        structures = self._structures if self._regions else self._structures[1:]
        dice = [2 * inside / (count + all_) for count, inside, all_ in structures if count or all_ >= 1]
        return Summary(
            mean_entropy=mean(self._entropy[1:].sum(), voxels),
            label_entropy={value: mean(self._entropy[value], found[value]) for value in self._labels},
            uncertain_share=mean(self._unsure, voxels),
            mutual_information=mean(self._information[1:].sum(), voxels) if self._several else None,
            score=float(np.clip(np.mean(dice), 0, 1)) if dice else 0.0,
        )
