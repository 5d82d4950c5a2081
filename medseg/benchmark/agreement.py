"""How far two label maps of one scan agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from medseg.io.read import read_labels

MIN_VOXELS = 1000
"""Classes smaller than this in the reference are in no Dice: a voxel or two would decide."""


class Agreement(BaseModel):
    """A label map beside another one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    changed: float = Field(description="Share of voxels whose label differs.")
    dice_min: float | None = Field(description="Lowest Dice of the classes compared; null without one.")
    dice_mean: float | None = Field(description="Their mean Dice.")
    classes: int = Field(
        description=f"Classes compared: not background, {MIN_VOXELS} voxels or more in the baseline's."
    )


def agreement(labels: NDArray[np.integer], reference: NDArray[np.integer]) -> Agreement:
    """Compare label maps (X, Y, Z) of one shape, in one pass for all classes.

    Raises:
        ValueError: the shapes differ.
    """
    if labels.shape != reference.shape:
        raise ValueError(f"label maps must have one shape, got {labels.shape} and {reference.shape}")
    classes = max(int(labels.max()), int(reference.max())) + 1
    table = np.zeros(classes * classes, dtype=np.int64)
    for ours, theirs in zip(labels, reference, strict=True):  # plane by plane: pairs of labels need eight bytes a voxel
        table += np.bincount(theirs.astype(np.int64).ravel() * classes + ours.ravel(), minlength=classes * classes)
    both = table.reshape(classes, classes)
    size = both.sum(axis=1)
    total = size + both.sum(axis=0)
    compared = [value for value in range(1, classes) if size[value] >= MIN_VOXELS]
    dice = [float(2 * both[value, value] / total[value]) for value in compared]
    return Agreement(
        changed=float(1 - np.trace(both) / both.sum()),
        dice_min=min(dice, default=None),
        dice_mean=float(np.mean(dice)) if dice else None,
        classes=len(dice),
    )


def file_agreement(labels: Path, reference: Path) -> Agreement:
    """`agreement` of two files."""
    return agreement(read_labels(labels)[0], read_labels(reference)[0])
