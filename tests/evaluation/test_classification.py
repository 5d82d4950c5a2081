"""Accuracy, AUC and their intervals against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.evaluation.classification import (
    accuracy_gain,
    auc,
    balanced_accuracy,
    confusion_matrix,
    score_classification,
)

# Four patients of class 0, two of class 1, one of class 2.
TARGET = np.array([0, 0, 0, 0, 1, 1, 2])
CHANCES = np.array(
    [
        [0.8, 0.1, 0.1],
        [0.6, 0.3, 0.1],
        [0.5, 0.4, 0.1],
        [0.3, 0.6, 0.1],  # named 1
        [0.2, 0.7, 0.1],
        [0.5, 0.3, 0.2],  # named 0
        [0.1, 0.2, 0.7],
    ]
)


def test_figures_by_hand() -> None:
    found = score_classification(TARGET, CHANCES, resamples=50)
    assert found.confusion.tolist() == [[3, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert found.patients == 7
    assert found.accuracy.value == pytest.approx(5 / 7)
    assert found.balanced_accuracy.value == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    # Class 0: 4 x 3 pairs. 0.8 and 0.6 beat all three; 0.5 beats two and ties with 0.5; 0.3 beats 0.2 and 0.1.
    assert found.auc[0].value == pytest.approx((3 + 3 + 2.5 + 2) / 12)
    # Class 1: 0.7 beats all five; 0.3 beats 0.1 and 0.2, ties with 0.3.
    assert found.auc[1].value == pytest.approx((5 + 2.5) / 10)
    assert found.auc[2].value == 1
    assert found.mean_auc.value == pytest.approx((10.5 / 12 + 0.75 + 1) / 3)


def test_auc_is_half_without_information_and_undefined_without_one_group() -> None:
    assert auc(np.zeros(5), np.array([True, False, True, False, False])) == 0.5
    assert auc(np.array([1.0, 2, 3]), np.array([True, False, False])) == 0
    assert np.isnan(auc(np.ones(3), np.ones(3, dtype=bool)))


def test_a_class_without_patients_is_left_out() -> None:
    chances = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    found = score_classification(np.array([0, 1]), chances, resamples=20)
    assert found.balanced_accuracy.value == 1
    assert np.isnan(found.auc[2].value)
    assert np.isnan(found.auc[2].low)
    assert found.mean_auc.value == 1
    assert np.isnan(balanced_accuracy(np.zeros((2, 2), dtype=int)))
    assert confusion_matrix(np.array([1]), np.array([0]), 2).tolist() == [[0, 0], [1, 0]]


def test_the_interval_is_the_binomial_one_and_narrows_with_more_patients() -> None:
    widths = []
    for patients in (100, 1600):
        target = np.zeros(patients, dtype=int)
        chances = np.tile([0.9, 0.1], (patients, 1))
        chances[: patients // 5] = [0.1, 0.9]  # one in five is wrong
        found = score_classification(target, chances, resamples=800).accuracy
        assert found.value == pytest.approx(0.8)
        error = 1.96 * np.sqrt(0.8 * 0.2 / patients)
        assert found.low == pytest.approx(0.8 - error, abs=0.25 * error)
        assert found.high == pytest.approx(0.8 + error, abs=0.25 * error)
        widths.append(found.high - found.low)
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.2)
    again = score_classification(target, chances, resamples=800).accuracy
    assert again == found


def test_a_gain_on_the_same_patients_is_seen_where_two_intervals_overlap() -> None:
    target = np.zeros(100, dtype=int)
    before = np.tile([0.9, 0.1], (100, 1))
    before[:30] = [0.1, 0.9]
    after = before.copy()
    after[:8] = [0.9, 0.1]  # eight are mended and none is spoiled
    gain = accuracy_gain(target, before, after)
    assert gain.value == pytest.approx(0.08)
    assert 0.02 < gain.low < 0.08 < gain.high < 0.15
    first, second = (score_classification(target, chances, resamples=200).accuracy for chances in (before, after))
    assert first.high > second.low


@pytest.mark.parametrize(
    ("target", "chances", "problem"),
    [
        ([0, 1], [[0.5, 0.5]], "must be .N,. and .N, classes."),
        ([], np.zeros((0, 2)), "must be"),
        ([0], [[np.nan, 1.0]], "not finite"),
        ([2], [[0.5, 0.5]], "classes must be 0 to 1"),
    ],
)
def test_what_does_not_belong_together_is_refused(target: list[int], chances: list[list[float]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        score_classification(np.array(target), np.array(chances))
