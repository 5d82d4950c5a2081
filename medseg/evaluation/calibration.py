"""Do probabilities mean what they say, and does a case's score say how good its segmentation is?

Only voxels near a structure count (`near`): far away nearly all are background with probability 1, which would drown
every error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15
_COLDEST, _HOTTEST = 0.05, 20.0


def near(labels: Sequence[NDArray[np.integer]], spacing: Sequence[float], *, margin_mm: float) -> NDArray[np.bool_]:
    """Voxels within a distance of any structure of any of several label maps, structures included.

    Args:
        labels: label maps (X, Y, Z) on one grid, e.g. reference and prediction.
        spacing: voxel size in mm.
        margin_mm: distance in mm between voxel centres.
    """
    from scipy import ndimage

    found = np.zeros(labels[0].shape, dtype=np.bool_)
    for one in labels:
        found |= one > 0
    if not found.any():
        return found
    reach = [int(np.ceil(margin_mm / size)) for size in spacing]
    box = tuple(
        slice(max(int(index.min()) - pad, 0), int(index.max()) + pad + 1)
        for index, pad in zip(np.nonzero(found), reach, strict=True)
    )
    result = np.zeros_like(found)
    result[box] = ndimage.distance_transform_edt(~found[box], sampling=tuple(spacing)) <= margin_mm
    return result


def mean_probabilities(
    log_probabilities: NDArray[np.float32], weights: Sequence[float], temperature: float
) -> NDArray[np.float64]:
    """Weighted mean over models of softmax(log p / T).

    Args:
        log_probabilities: (M, N, K): models, voxels, classes.
        weights: of the models; they add up to 1.
        temperature: T.

    Returns:
        (N, K).
    """
    from scipy.special import softmax

    total = np.zeros(log_probabilities.shape[1:])
    for one, weight in zip(log_probabilities, weights, strict=True):
        total += weight * softmax(one.astype(np.float64) / temperature, axis=1)
    return total


def negative_log_likelihood(probabilities: NDArray[np.floating], targets: NDArray[np.integer]) -> float:
    """Mean of -ln p of the true class, in nats.

    Args:
        probabilities: (N, K).
        targets: true class of each voxel, (N,).
    """
    chosen = np.take_along_axis(probabilities, targets[:, None].astype(np.int64), axis=1)
    return float(-np.log(np.maximum(chosen, 1e-12)).mean())


def fit_temperature(
    log_probabilities: NDArray[np.float32], weights: Sequence[float], targets: NDArray[np.integer]
) -> float:
    """The temperature with the smallest negative log-likelihood, between 0.05 and 20.

    Args:
        log_probabilities: (M, N, K) of models at temperature 1.
        weights: of the models.
        targets: true class of each voxel, (N,).

    Raises:
        ValueError: there is no voxel.
    """
    from scipy.optimize import minimize_scalar

    if not len(targets):
        raise ValueError("no voxel to fit a temperature to")

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(
            mean_probabilities(log_probabilities, weights, float(np.exp(log_temperature))), targets
        )

    found = minimize_scalar(
        loss, bounds=(np.log(_COLDEST), np.log(_HOTTEST)), method="bounded", options={"xatol": 1e-4}
    )
    return float(np.exp(found.x))


class Reliability:
    """Confidence against accuracy, in 15 bins of the same width.

    Confidence is the probability of the predicted class; a voxel is right where that class is the true one.
    """

    def __init__(self) -> None:
        self._count = np.zeros(BINS)
        self._confidence = np.zeros(BINS)
        self._right = np.zeros(BINS)

    def add(self, probabilities: NDArray[np.floating], targets: NDArray[np.integer]) -> None:
        """Add voxels: probabilities (N, K) and true classes (N,)."""
        confidence = probabilities.max(axis=1).astype(np.float64)
        right = probabilities.argmax(axis=1) == targets
        place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
        self._count += np.bincount(place, minlength=BINS)
        self._confidence += np.bincount(place, confidence, minlength=BINS)
        self._right += np.bincount(place, right.astype(np.float64), minlength=BINS)

    @property
    def error(self) -> float:
        """Expected calibration error: the mean over voxels of |accuracy - confidence| of their bin; NaN without any."""
        total = self._count.sum()
        return float(np.abs(self._right - self._confidence).sum() / total) if total else float("nan")


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line through points.

    Attributes:
        intercept: value at 0.
        slope: rise for each unit.
        deviation: standard deviation of the points around it, of n - 2 degrees of freedom.
        cases: number of points.
    """

    intercept: float
    slope: float
    deviation: float
    cases: int


def fit_line(scores: Sequence[float], dices: Sequence[float]) -> Line:
    """Least squares of the mean Dice of cases on their score; the mean where all scores are the same.

    Raises:
        ValueError: fewer than three cases.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(dices, dtype=np.float64)
    if len(x) < 3:
        raise ValueError(f"{len(x)} cases; a line with its spread needs three")
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread > 1e-12 else 0.0
    intercept = float(y.mean() - slope * x.mean())
    rest = y - intercept - slope * x
    return Line(intercept, slope, float(np.sqrt((rest**2).sum() / (len(x) - 2))), len(x))


def rank_correlation(scores: Sequence[float], dices: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN with fewer than three cases, or where all values of one are the same."""
    from scipy.stats import spearmanr

    if len(scores) < 3 or len(set(scores)) < 2 or len(set(dices)) < 2:
        return float("nan")
    return float(spearmanr(scores, dices).statistic)
