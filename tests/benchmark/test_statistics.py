"""Intervals and tests against SciPy and against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from medseg.benchmark.statistics import bootstrap_interval, holm, signed_rank_p

DICE = [0.91, 0.88, 0.93, 0.79, 0.9, 0.87, 0.92, 0.85, 0.89, 0.9, 0.94, 0.83]


def test_bootstrap_interval_is_the_same_each_time_and_agrees_with_scipys() -> None:
    low, high = bootstrap_interval(DICE)
    assert (low, high) == bootstrap_interval(list(DICE))
    assert (low, high) != bootstrap_interval(DICE, seed=1)
    theirs = stats.bootstrap((DICE,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(3))
    assert low == pytest.approx(theirs.confidence_interval.low, abs=2e-3)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=2e-3)
    narrow = bootstrap_interval(DICE, share=0.5)
    assert low < narrow[0] < np.mean(DICE) < narrow[1] < high
    assert bootstrap_interval([0.5]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])


def test_signed_rank_p_counts_the_signs_of_small_samples_exactly() -> None:
    # Five differences of one sign: of 2^5 sign patterns two are as extreme, 2 / 32.
    assert signed_rank_p([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx(2 / 32)
    # The smallest rank has the other sign: sums 0 and 1 occur once each, at both ends, 4 / 32.
    assert signed_rank_p([-0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx(4 / 32)
    assert signed_rank_p([0.0, 0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx(2 / 32)
    assert signed_rank_p([0.0, 0.0]) == signed_rank_p([]) == 1.0


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 gives 0.04, 0.06, 0.06, 0.04; the last is lifted to 0.06.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
