"""Lesions found one by one: which were hit, how many false ones came with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import generate_binary_structure, label
from scipy.optimize import linear_sum_assignment

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Detections:
    """The candidates of one case.

    Attributes:
        scores: (n,) of each candidate, higher means surer.
        hits: (n,) whether it is matched with a true lesion; no lesion is matched twice.
        lesions: number of true lesions.
    """

    scores: NDArray[np.float64]
    hits: Mask
    lesions: int


def components(mask: Mask, *, min_voxels: int = 1) -> tuple[NDArray[np.int32], int]:
    """Connected parts (26 neighbours) of a mask (X, Y, Z), numbered from 1, and their number; small ones left out."""
    parts, count = label(mask, structure=generate_binary_structure(3, 3))
    large = np.bincount(parts.ravel(), minlength=count + 1) >= min_voxels
    large[0] = False
    numbers = np.where(large, np.cumsum(large), 0).astype(np.int32)
    return numbers[parts], int(large.sum())


def overlap_matrix(found: NDArray[np.integer], wanted: NDArray[np.integer]) -> NDArray[np.float64]:
    """Intersection over union of each part of one label map with each of another, (found parts, wanted parts)."""
    rows, columns = int(found.max(initial=0)), int(wanted.max(initial=0))
    pairs = found.astype(np.int64).ravel() * (columns + 1) + wanted.ravel()
    shared = np.bincount(pairs, minlength=(rows + 1) * (columns + 1)).reshape(rows + 1, columns + 1)
    union = shared.sum(axis=1)[1:, None] + shared.sum(axis=0)[None, 1:] - shared[1:, 1:]
    return np.asarray(shared[1:, 1:] / np.maximum(union, 1))


def detect(
    probability: NDArray[np.floating],
    reference: Mask,
    *,
    threshold: float = 0.5,
    min_iou: float = 0.1,
    min_voxels: int = 1,
) -> Detections:
    """Candidates of one case: the connected parts above a threshold, scored by their highest probability.

    Candidates and lesions are matched one to one so that the sum of their overlaps is largest.

    Args:
        probability: (X, Y, Z) of a lesion.
        reference: (X, Y, Z), the true lesions' voxels; connected parts are single lesions.
        threshold: of the candidates' voxels; below the probabilities that `froc` should tell apart.
        min_iou: smallest intersection over union of a match.
        min_voxels: smaller candidates do not count.

    Raises:
        ValueError: the shapes differ, or an overlap of 0 would count as a match.
    """
    if probability.shape != reference.shape or probability.ndim != 3:
        raise ValueError(f"probability {probability.shape} and reference {reference.shape} must be one (X, Y, Z)")
    if not 0 < min_iou <= 1:
        raise ValueError(f"min_iou must be above 0 and at most 1, got {min_iou}")
    found, count = components(probability > threshold, min_voxels=min_voxels)
    wanted, lesions = components(reference)
    scores = np.zeros(count + 1)
    np.maximum.at(scores, found.ravel(), np.asarray(probability, dtype=np.float64).ravel())
    overlap = overlap_matrix(found, wanted)
    matched = np.where(overlap >= min_iou, overlap, 0.0)
    rows, columns = linear_sum_assignment(matched, maximize=True)
    hits = np.zeros(count, dtype=bool)
    hits[rows] = matched[rows, columns] > 0
    return Detections(scores[1:], hits, lesions)


@dataclass(frozen=True)
class Froc:
    """Sensitivity against false candidates, as the threshold falls.

    Attributes:
        thresholds: (n,) scores from the highest down; candidates of at least this score count.
        sensitivity: (n,) share of all lesions that are hit; NaN when there are none.
        false_positives: (n,) false candidates for each case.
    """

    thresholds: NDArray[np.float64]
    sensitivity: NDArray[np.float64]
    false_positives: NDArray[np.float64]

    def at(self, false_positives: float) -> float:
        """Highest sensitivity with at most so many false candidates for each case; 0 where none is that clean."""
        reached = self.sensitivity[self.false_positives <= false_positives]
        return float(reached.max()) if reached.size else 0.0


def froc(cases: Sequence[Detections]) -> Froc:
    """The curve over all cases, one point for each different score.

    Raises:
        ValueError: no cases.
    """
    if not cases:
        raise ValueError("no cases to score")
    scores = np.concatenate([case.scores for case in cases])
    hits = np.concatenate([case.hits for case in cases])
    lesions = sum(case.lesions for case in cases)
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], hits[order]
    last = np.append(scores[1:] != scores[:-1], True)[: scores.size]  # candidates of one score come together
    found = np.cumsum(hits)[last] / lesions if lesions else np.full(int(last.sum()), np.nan)
    return Froc(scores[last], found, np.cumsum(~hits)[last] / len(cases))
