"""Calibration against cases computed by hand and against data made to measure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, special

from medseg.evaluation.calibration import (
    Reliability,
    fit_line,
    fit_temperature,
    mean_probabilities,
    near,
    negative_log_likelihood,
    rank_correlation,
)


@given(st.floats(0.3, 5), st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_the_temperature_that_made_the_labels_is_found_again(true: float, classes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(20000, classes)) * 2 * true
    targets = (special.log_softmax(logits / true, axis=1) + random.gumbel(size=logits.shape)).argmax(axis=1)
    logs = special.log_softmax(logits, axis=1)[None].astype(np.float32)
    found = fit_temperature(logs, [1.0], targets)
    assert found == pytest.approx(true, rel=0.08)
    best = negative_log_likelihood(mean_probabilities(logs, [1.0], found), targets)
    for other in (found / 1.2, found * 1.2, 1.0):
        assert best <= negative_log_likelihood(mean_probabilities(logs, [1.0], other), targets) + 1e-6


def test_the_mean_of_models_is_taken_of_their_probabilities_at_the_temperature() -> None:
    logs = np.log(np.array([[[0.9, 0.1]], [[0.2, 0.8]]], dtype=np.float32))
    assert mean_probabilities(logs, [0.75, 0.25], 1.0) == pytest.approx(np.array([[0.725, 0.275]]))
    roots = np.array([[3.0, 1.0], [1.0, 2.0]]) / np.array([[4.0], [3.0]])  # square roots of the odds 9:1 and 1:4
    assert mean_probabilities(logs, [0.5, 0.5], 2.0) == pytest.approx(roots.mean(axis=0, keepdims=True))
    assert negative_log_likelihood(np.array([[0.5, 0.5], [0.1, 0.9]]), np.array([0, 1])) == pytest.approx(
        -(np.log(0.5) + np.log(0.9)) / 2
    )


def test_the_calibration_error_is_that_computed_by_hand_whatever_the_chunks() -> None:
    # Confidence 0.9 four times, three right; 0.55 twice, none right: (4 |0.75 - 0.9| + 2 |0 - 0.55|) / 6.
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.45, 0.55]] * 2)
    targets = np.array([0, 0, 0, 1, 0, 0])
    whole, chunks = Reliability(), Reliability()
    whole.add(probabilities, targets)
    for index in range(6):
        chunks.add(probabilities[index : index + 1], targets[index : index + 1])
    assert whole.error == pytest.approx((4 * 0.15 + 2 * 0.55) / 6)
    assert chunks.error == pytest.approx(whole.error)
    sure = Reliability()
    sure.add(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1]))
    assert sure.error == 0
    assert np.isnan(Reliability().error)


def test_voxels_near_a_structure_are_those_within_the_margin_in_millimetres() -> None:
    one, other = np.zeros((14, 12, 10), dtype=np.uint8), np.zeros((14, 12, 10), dtype=np.uint8)
    one[2, 3, 4], other[9, 8, 9] = 1, 2
    spacing = (1.0, 2.0, 0.5)
    expected = ndimage.distance_transform_edt((one == 0) & (other == 0), sampling=spacing) <= 2.5
    assert (near([one, other], spacing, margin_mm=2.5) == expected).all()
    assert near([one], spacing, margin_mm=0).sum() == 1
    assert not near([np.zeros((3, 3, 3), dtype=np.uint8)], spacing, margin_mm=5).any()


def test_the_line_and_its_deviation_are_those_computed_by_hand() -> None:
    line = fit_line([0.0, 1.0, 2.0, 3.0], [0.1, 0.3, 0.5, 0.7])
    assert (line.intercept, line.slope, line.deviation) == pytest.approx((0.1, 0.2, 0.0), abs=1e-12)
    assert fit_line([0.0, 1.0, 2.0], [0.0, 1.0, 0.0]).deviation == pytest.approx(np.sqrt(2 / 3))
    same = fit_line([0.5, 0.5, 0.5], [0.6, 0.8, 1.0])
    assert (same.intercept, same.slope, same.cases) == (pytest.approx(0.8), 0.0, 3)
    with pytest.raises(ValueError, match="2 cases"):
        fit_line([0.0, 1.0], [0.0, 1.0])


def test_the_rank_correlation_follows_the_order_alone() -> None:
    assert rank_correlation([1, 2, 3, 4], [0.1, 0.2, 0.7, 0.9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [0.9, 0.7, 0.2, 0.1]) == pytest.approx(-1)
    assert np.isnan(rank_correlation([1, 1, 1], [0.1, 0.2, 0.3]))
