"""Diagnoses of patients against the truth: accuracy and AUC of each class, with the uncertainty of few patients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its bootstrap confidence interval.

    Attributes:
        value: of all patients; NaN where it is not defined.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassificationScores:
    """How well patients were classified.

    Attributes:
        patients: their number.
        accuracy: share that was named rightly.
        balanced_accuracy: mean of the classes' own shares, over the classes that have patients.
        auc: of each class against all others.
        mean_auc: their mean, over the classes for which it is defined.
        confusion: (classes, classes) patients, row: truth, column: named class.
    """

    patients: int
    accuracy: Estimate
    balanced_accuracy: Estimate
    auc: tuple[Estimate, ...]
    mean_auc: Estimate
    confusion: NDArray[np.int64]


def confusion_matrix(target: Ints, named: Ints, classes: int) -> NDArray[np.int64]:
    """Patients by true class (row) and named class (column), (classes, classes)."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (target, named), 1)
    return matrix


def balanced_accuracy(confusion: Ints) -> float:
    """Mean share of rightly named patients over the classes that have any; NaN without patients."""
    rows = confusion.sum(axis=1)
    shares = np.diag(confusion)[rows > 0] / rows[rows > 0]
    return float(shares.mean()) if shares.size else float("nan")


def auc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the chance that a positive patient scores higher than a negative one, ties as half.

    Args:
        scores: (N,), higher means more probably positive.
        positive: (N,).

    Returns:
        0 to 1, NaN where one of the two groups is empty.
    """
    count = int(positive.sum())
    others = positive.size - count
    if not count or not others:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def score_classification(
    target: Ints, probabilities: Floats, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> ClassificationScores:
    """Score the diagnoses of a set of patients.

    Args:
        target: (N,) true classes.
        probabilities: (N, classes); the named class is the most probable one.
        resamples: bootstrap samples, each of N patients drawn with replacement.
        level: of the percentile intervals. A sample in which a figure is not defined does not count for it.
        seed: of the samples.

    Raises:
        ValueError: shapes that do not belong together, no patients, values that are not finite, or an unknown class.
    """
    target, probabilities = np.asarray(target), np.asarray(probabilities)
    if probabilities.ndim != 2 or target.shape != probabilities.shape[:1] or not target.size:
        raise ValueError(f"target {target.shape} and probabilities {probabilities.shape} must be (N,) and (N, classes)")
    classes = probabilities.shape[1]
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities hold values that are not finite")
    if target.min() < 0 or target.max() >= classes:
        raise ValueError(f"classes must be 0 to {classes - 1}, got {target.min()} to {target.max()}")

    def figures(index: Ints) -> Floats:
        truth, chances = target[index], probabilities[index]
        confusion = confusion_matrix(truth, chances.argmax(axis=1), classes)
        areas = np.array([auc(chances[:, number], truth == number) for number in range(classes)])
        defined = areas[~np.isnan(areas)]
        mean = float(defined.mean()) if defined.size else float("nan")
        return np.array([np.trace(confusion) / index.size, balanced_accuracy(confusion), mean, *areas])

    accuracy, balanced, mean_auc, *areas = _with_intervals(figures, target.size, resamples, level, seed)
    confusion = confusion_matrix(target, probabilities.argmax(axis=1), classes)
    return ClassificationScores(target.size, accuracy, balanced, tuple(areas), mean_auc, confusion)


def accuracy_gain(
    target: Ints, before: Floats, after: Floats, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Accuracy of one set of diagnoses less that of another for the same patients, whose differences are resampled.

    Args:
        target: (N,) true classes.
        before: (N, classes) probabilities, e.g. without age and sex.
        after: (N, classes) probabilities, e.g. with them.
        resamples: as for `score_classification`, and so are the others.
        level: of the interval.
        seed: of the samples.
    """
    gained = (after.argmax(axis=1) == target).astype(float) - (before.argmax(axis=1) == target)
    return _with_intervals(lambda index: np.array([gained[index].mean()]), target.size, resamples, level, seed)[0]


def _with_intervals(
    figures: Callable[[Ints], Floats], patients: int, resamples: int, level: float, seed: int
) -> list[Estimate]:
    """Figures of all patients with percentile intervals; `figures` takes patients' numbers."""
    random = np.random.default_rng(seed)
    values = figures(np.arange(patients))
    drawn = np.stack([figures(random.integers(0, patients, patients)) for _ in range(resamples)])
    tails = 50 * (1 - level), 100 - 50 * (1 - level)
    found = []
    for value, column in zip(values, drawn.T, strict=True):
        known = column[~np.isnan(column)]
        low, high = np.percentile(known, tails) if known.size else (np.nan, np.nan)
        found.append(Estimate(float(value), float(low), float(high)))
    return found
