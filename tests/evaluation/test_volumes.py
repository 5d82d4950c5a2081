"""Label statistics against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.evaluation.volumes import label_statistics, voxel_volume_ml

# 2 x 0.5 x 4 mm voxels, x flipped, origin (10, 20, 30): 4 mm3 each.
AFFINE = np.array([[-2.0, 0, 0, 10], [0, 0.5, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])


def test_volume_centroid_box_and_components_on_an_anisotropic_flipped_grid() -> None:
    labels = np.zeros((6, 8, 7), dtype=np.uint8)
    labels[1:3, 2:6, 3] = 1  # 8 voxels: index mean (1.5, 3.5, 3)
    labels[5, 7, 6] = 3
    labels[0, 0, 0] = 3
    first, absent, third = label_statistics(labels, AFFINE, {0: "background", 1: "plate", 2: "none", 3: "dots"})

    assert (first.value, first.name, first.voxels, first.components) == (1, "plate", 8, 1)
    assert first.volume_ml == pytest.approx(0.032)
    assert first.centroid_mm == pytest.approx((10 - 2 * 1.5, 20 + 0.5 * 3.5, 30 + 4 * 3))
    assert first.bounding_box == ((1, 2), (2, 5), (3, 3))

    assert (absent.value, absent.name, absent.voxels, absent.volume_ml, absent.components) == (2, "none", 0, 0.0, 0)
    assert absent.centroid_mm is None
    assert absent.bounding_box is None

    assert (third.voxels, third.components) == (2, 2)
    assert third.bounding_box == ((0, 5), (0, 7), (0, 6))


def test_voxels_that_touch_at_a_corner_are_one_component_and_another_label_between_does_not_join() -> None:
    labels = np.zeros((5, 5, 5), dtype=np.uint16)
    labels[0, 0, 0] = labels[1, 1, 1] = 7
    labels[2, 1, 1] = 9
    labels[3, 1, 1] = 7
    seven, nine = label_statistics(labels, np.eye(4), {9: "nine", 7: "seven"})
    assert (seven.name, seven.voxels, seven.components) == ("seven", 3, 2)
    assert (nine.name, nine.voxels, nine.components) == ("nine", 1, 1)


def test_voxel_volume_of_an_oblique_and_sheared_grid_is_the_determinant() -> None:
    angle = np.deg2rad(30)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[2.0, 0.3, 0], [0, 3, 0], [0, 0, 5]])
    assert voxel_volume_ml(affine) == pytest.approx(0.030)


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i2", "int32", "int64", "uint16"])
def test_every_integer_type_gives_the_same_numbers(dtype: str) -> None:
    labels = np.zeros((4, 4, 4), dtype=dtype)
    labels[1:3, 1, 1] = 2
    (only,) = label_statistics(labels, np.eye(4), {2: "two"})
    assert (only.voxels, only.bounding_box, only.components) == (2, ((1, 2), (1, 1), (1, 1)), 1)


def test_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"integers \(X, Y, Z\), got float32 \(2, 2, 2\)"):
        label_statistics(np.zeros((2, 2, 2), dtype=np.float32), np.eye(4), {1: "one"})  # type: ignore[arg-type]
