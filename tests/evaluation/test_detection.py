"""Lesions one by one: matching, scores and the curve, on cases small enough to count."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from medseg.evaluation.detection import Detections, components, detect, froc, overlap_matrix


def line(*parts: tuple[int, int, float], length: int = 40) -> NDArray[np.float64]:
    """A row of voxels (length, 1, 1) with values from begin to end (not included)."""
    values = np.zeros((length, 1, 1))
    for begin, end, value in parts:
        values[begin:end] = value
    return values


def test_overlaps_are_intersection_over_union() -> None:
    found, _ = components(line((0, 4, 1), (10, 20, 1)) > 0)
    wanted, _ = components(line((2, 6, 1), (10, 12, 1), (16, 20, 1)) > 0)
    np.testing.assert_allclose(overlap_matrix(found, wanted), [[2 / 6, 0, 0], [0, 2 / 10, 4 / 10]])
    assert overlap_matrix(found, np.zeros_like(found)).shape == (2, 0)


def test_corners_connect_and_crumbs_are_left_out() -> None:
    mask = np.zeros((4, 4, 4), dtype=bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    parts, count = components(mask)
    assert count == 2
    assert parts[0, 0, 0] == parts[1, 1, 1] != parts[3, 3, 3]
    parts, count = components(mask, min_voxels=2)
    assert (count, parts[3, 3, 3], parts.max()) == (1, 0, 1)


def test_no_lesion_is_hit_twice_and_the_better_match_wins() -> None:
    # One lesion, two candidates on it: six and two of its ten voxels. The better one hits, whatever its score.
    found = detect(line((0, 6, 0.6), (8, 10, 0.9)), line((0, 10, 1)) > 0)
    assert found.lesions == 1
    assert found.scores.tolist() == [0.6, 0.9]
    assert found.hits.tolist() == [True, False]
    # One candidate over two lesions hits one of them.
    found = detect(line((0, 20, 0.8)), line((0, 8, 1), (10, 20, 1)) > 0)
    assert (found.hits.tolist(), found.lesions) == ([True], 2)


def test_matching_is_by_all_pairs_and_not_greedy() -> None:
    # A [0, 10) and B [10, 16); candidates [0, 3) + gap + [4, 16): the second overlaps both lesions.
    found = detect(line((0, 3, 0.7), (4, 16, 0.8)), (line((0, 10, 1)) + line((11, 16, 1))) > 0, min_iou=0.2)
    # 3/10 with A for the first; 6/16 with A and 5/12 with B for the second: both hit, A by the first.
    assert found.hits.tolist() == [True, True]


def test_too_small_an_overlap_is_no_hit() -> None:
    probability, reference = line((0, 10, 0.9)), line((8, 18, 1)) > 0  # 2 of 18
    assert detect(probability, reference, min_iou=0.1).hits.tolist() == [True]
    assert detect(probability, reference, min_iou=0.12).hits.tolist() == [False]


def test_the_curve_by_hand() -> None:
    cases = [
        Detections(np.array([0.9, 0.5]), np.array([True, False]), lesions=1),
        Detections(np.array([0.8, 0.5]), np.array([False, True]), lesions=2),
    ]
    curve = froc(cases)
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.5]
    np.testing.assert_allclose(curve.sensitivity, [1 / 3, 1 / 3, 2 / 3])
    assert curve.false_positives.tolist() == [0, 0.5, 1]
    assert curve.at(0) == pytest.approx(1 / 3)
    assert curve.at(0.9) == pytest.approx(1 / 3)
    assert curve.at(1) == pytest.approx(2 / 3)


def test_cases_without_candidates_or_lesions_count_as_cases() -> None:
    nothing = detect(np.zeros((3, 3, 3)), np.zeros((3, 3, 3), dtype=bool))
    missed = detect(np.zeros((3, 3, 3)), np.ones((3, 3, 3), dtype=bool))
    false = detect(np.full((3, 3, 3), 0.7), np.zeros((3, 3, 3), dtype=bool))
    curve = froc([nothing, missed, false])
    assert curve.sensitivity.tolist() == [0]
    assert curve.false_positives.tolist() == [1 / 3]
    assert froc([missed]).at(1) == 0
    assert np.isnan(froc([false]).at(1))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one \(X, Y, Z\)"):
        detect(np.zeros((3, 3, 3)), np.zeros((3, 3, 4), dtype=bool))
    with pytest.raises(ValueError, match="min_iou"):
        detect(np.zeros((3, 3, 3)), np.zeros((3, 3, 3), dtype=bool), min_iou=0)
    with pytest.raises(ValueError, match="no cases"):
        froc([])
