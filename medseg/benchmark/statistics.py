"""How sure a mean is, and whether two bundles differ: bootstrap, Wilcoxon's signed ranks, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def bootstrap_interval(
    values: Sequence[float], *, share: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: one for each case; at least one.
        share: of the interval.
        resamples: how often cases are drawn with replacement.
        seed: of the draws; the same values give the same interval.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("no values to resample")
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    means = np.asarray(values, dtype=np.float64)[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def signed_rank_p(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; differences of 0 are left out.

    Args:
        differences: of paired values, one for each case.

    Returns:
        p, 1 where no difference is left.
    """
    left = [value for value in differences if value != 0]
    if not left:
        return 1.0
    from scipy import stats

    return float(stats.wilcoxon(left).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for their number by Holm's method, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [math.nan] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
