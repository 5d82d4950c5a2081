"""Dice, HD95, NSD and volume error against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from medseg.evaluation.dice import dice, volume_error_percent
from medseg.evaluation.surface import hausdorff_95, surface_dice

SPACING = (2.0, 1.0, 3.0)


def mask(*voxels: tuple[int, int, int], shape: tuple[int, int, int] = (12, 60, 12)) -> NDArray[np.bool_]:
    array = np.zeros(shape, dtype=bool)
    for voxel in voxels:
        array[voxel] = True
    return array


def box(
    x: slice, y: slice = slice(4, 24), z: slice = slice(4, 24), shape: tuple[int, int, int] = (30, 30, 30)
) -> NDArray[np.bool_]:
    array = np.zeros(shape, dtype=bool)
    array[x, y, z] = True
    return array


def test_dice_of_two_cubes_that_share_two_of_three_layers_is_two_thirds() -> None:
    first, second = box(slice(2, 5), slice(2, 5), slice(2, 5)), box(slice(3, 6), slice(2, 5), slice(2, 5))
    assert dice(first, second) == pytest.approx(2 * 18 / 54)


def test_hd95_uses_the_spacing_of_each_axis() -> None:
    # (2, 1, 3) mm apart by (2, 4, 1) voxels: (4, 4, 3) mm, sqrt(41) mm.
    assert hausdorff_95(mask((3, 10, 5)), mask((5, 14, 6)), SPACING) == pytest.approx(math.sqrt(41), abs=1e-5)


def test_hd95_interpolates_the_95th_percentile_and_takes_the_larger_direction() -> None:
    # Reference: 38 voxels in a row. Prediction: the same and two more, 2 and 4 mm away.
    # Prediction to reference: 38 zeros, 2, 4; the percentile's rank is 0.95 * 39 = 37.05, so 0 + 0.05 * (2 - 0) = 0.1.
    row = [(4, y, 5) for y in range(10, 48)]
    reference, prediction = mask(*row), mask(*row, (5, 20, 5), (6, 20, 5))
    assert hausdorff_95(prediction, reference, SPACING) == pytest.approx(0.1, abs=1e-5)
    assert hausdorff_95(reference, prediction, SPACING) == pytest.approx(0.1, abs=1e-5)


def test_surface_at_the_edge_of_the_array_counts() -> None:
    # Both fill the array's first layers; the far sides are two voxels of 2 mm apart, the sides at the edge coincide.
    shape = (12, 40, 40)
    prediction, reference = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    prediction[:3], reference[:5] = True, True
    assert hausdorff_95(prediction, reference, SPACING) == pytest.approx(4.0)
    whole = np.ones(shape, dtype=bool)
    assert hausdorff_95(whole, whole, SPACING) == 0.0
    assert surface_dice(whole, whole, SPACING, tolerance_mm=0.0) == 1.0


@pytest.mark.parametrize(("tolerance_mm", "expected"), [(1.9, 0.0), (2.0, 0.5), (3.9, 0.5), (4.0, 1.0)])
def test_nsd_of_two_voxels_follows_the_tolerance(tolerance_mm: float, expected: float) -> None:
    # A single voxel's surface is an octahedron of eight equal elements at the voxel's corners. Two voxels apart in x
    # (4 mm): the four facing corners are 2 mm from the other surface, the four far ones 4 mm.
    score = surface_dice(mask((3, 10, 5)), mask((5, 10, 5)), SPACING, tolerance_mm=tolerance_mm)
    assert score == pytest.approx(expected)


def test_nsd_weights_surface_by_its_area_in_mm2() -> None:
    # A 20 x 20 x 80 mm block of 1 x 1 x 4 mm voxels, moved by 1 mm in x: the two x faces, 1600 of 7200 mm2 each, miss a
    # tolerance of 0.5 mm. Counting elements instead of mm2 would give 1 - 2 * 400 / 2400 = 0.67. The bevelled edges of
    # the polygonal surface move the value by less than 0.01.
    score = surface_dice(box(slice(4, 24)), box(slice(5, 25)), (1.0, 1.0, 4.0), tolerance_mm=0.5)
    assert score == pytest.approx(1 - 2 * 1600 / 7200, abs=0.01)


def test_a_distance_equal_to_the_tolerance_is_within_it_whatever_the_rounding() -> None:
    score = surface_dice(mask((3, 10, 5)), mask((4, 10, 5)), (0.3, 1.0, 1.0), tolerance_mm=0.3)
    assert score == 1.0


def test_two_empty_masks_are_not_applicable_and_one_empty_mask_is_the_worst() -> None:
    empty, full = mask(), mask((3, 10, 5))
    assert math.isnan(dice(empty, empty))
    assert math.isnan(hausdorff_95(empty, empty, SPACING))
    assert math.isnan(surface_dice(empty, empty, SPACING))
    for prediction, reference in ((empty, full), (full, empty)):
        assert dice(prediction, reference) == 0.0
        assert hausdorff_95(prediction, reference, SPACING) == math.inf
        assert surface_dice(prediction, reference, SPACING) == 0.0


def test_volume_error_is_signed_and_has_no_percentage_without_a_reference() -> None:
    assert volume_error_percent(1.5, 2.0) == pytest.approx(-25.0)
    assert volume_error_percent(2.5, 2.0) == pytest.approx(25.0)
    assert math.isnan(volume_error_percent(1.0, 0.0))


def test_masks_of_different_shapes_are_refused() -> None:
    small = np.zeros((2, 2, 2), dtype=bool)
    for metric in (lambda: dice(small, mask()), lambda: hausdorff_95(small, mask(), SPACING)):
        with pytest.raises(ValueError, match=r"\(2, 2, 2\) and \(12, 60, 12\)"):
            metric()
    with pytest.raises(ValueError, match=r"tolerance_mm .* got -1"):
        surface_dice(small, small, SPACING, tolerance_mm=-1)
