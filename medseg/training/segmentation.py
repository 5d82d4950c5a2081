"""Training a network that segments: crops of cases in memory, Dice of the held-out ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medseg.bundles.spec import BundleSpec
from medseg.inference.export import paint_regions, strongest_class
from medseg.inference.placement import Placement
from medseg.inference.segment import logits_by_plane, plane_axis
from medseg.training.augment import crop_transform
from medseg.training.config import TrainingConfig
from medseg.training.data import CachedCase, CropStream, batches
from medseg.training.loop import Trainer
from medseg.training.losses import IGNORE, SegmentationLoss
from medseg.training.rank import ALONE, Rank


class SegmentationTrainer(Trainer[CachedCase]):
    """See `Trainer`."""

    def __init__(
        self, config: TrainingConfig, spec: BundleSpec, output: Path, device: torch.device, rank: Rank = ALONE
    ) -> None:
        super().__init__(config, spec, output, device, rank)
        self._loss = SegmentationLoss(config.loss, spec)

    def feed(self, cases: Sequence[CachedCase]) -> Iterator[dict[str, Tensor]]:
        """Crops: image (B, C, *roi) float32, label (B, 1, *roi)."""
        stream = CropStream(cases, self.spec, crop_transform(self.config, self.spec), self.config.seed)
        return batches(
            stream,
            self.config.batch_size,
            first_step=self.progress.step,
            workers=self.config.workers,
            rank=self.rank,
        )

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of the logits against the label crops."""
        with self.autocast():
            logits = network(batch["image"].to(self.device, memory_format=self.layout))
        loss: Tensor = self._loss(logits, batch["label"].to(self.device))
        return loss

    def judge(self, network: nn.Module, cases: Sequence[CachedCase]) -> float:
        """Mean Dice of the labels; a label that is neither there nor found in a case does not count for it."""
        names = {value: name for value, name in self.spec.labels.items() if value > 0}
        overlap: dict[int, list[float]] = {value: [] for value in names}
        for case in cases:
            labels, counted = predict(case.image, network, self.spec, self.device), case.label != IGNORE
            for value in names:
                found, wanted = (labels == value) & counted, case.label == value
                size = int(found.sum()) + int(wanted.sum())
                if size:
                    overlap[value].append(2 * int((found & wanted).sum()) / size)
        parts = self.rank.gather(overlap)
        scores = {value: [score for part in parts for score in part[value]] for value in names}
        dice = {names[value]: sum(found) / len(found) for value, found in scores.items() if found}
        self.progress.dice = dice
        return sum(dice.values()) / len(dice) if dice else math.nan


@torch.inference_mode()
def predict(image: Tensor, network: nn.Module, spec: BundleSpec, device: torch.device) -> Tensor:
    """Labels (X', Y', Z') of a preprocessed image on the model grid, by the engine."""
    axis = plane_axis(image.shape[1:], spec)
    planes = logits_by_plane(image, network, spec, Placement.on(device), axis=axis)
    if spec.regions:
        painted = []
        for plane in planes:
            labels = np.zeros(plane.shape[1:], dtype=np.uint8)
            paint_regions(plane.sigmoid(), spec.regions, labels)
            painted.append(torch.from_numpy(labels))
        return torch.stack(painted, dim=axis)
    return torch.stack([torch.from_numpy(strongest_class(plane.numpy())) for plane in planes], dim=axis)
