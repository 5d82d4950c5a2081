"""Measurements of lesions, against ellipsoids whose size is known and phantoms whose place is known."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.evaluation.findings import diameters, measure_lesions, organ_axis, part_of
from medseg.io.geometry import world
from medseg.phantom.pancreas import make_case


def ellipsoid(affine: np.ndarray, shape: tuple[int, int, int], axes: tuple[float, float, float]) -> np.ndarray:
    """Semi-axes in mm; turned by 30 degrees about the vertical axis, in the middle of the grid."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    away = world(affine, index) - world(affine, (np.array(shape) - 1) / 2)
    angle = np.deg2rad(30)
    turned = away @ np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return np.asarray(((turned / axes) ** 2).sum(axis=-1) < 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_diameters_are_those_of_an_ellipsoid_whatever_the_axes_of_the_array(order: tuple[int, int, int]) -> None:
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    steps = (-1.0, 1.2, 1.6)
    for axis, source in enumerate(order):
        affine[source, axis] = steps[source]
    shape = tuple((81, 61, 41)[source] for source in order)
    mask = ellipsoid(affine, shape, (24.0, 12.0, 17.0))
    axial, coronal, sagittal = diameters(mask, affine)
    assert (axial.plane, coronal.plane, sagittal.plane) == ("axial", "coronal", "sagittal")
    assert axial.longest_mm == pytest.approx(48, abs=1.5)
    assert axial.short_mm == pytest.approx(24, abs=1.5)
    # Through the middle, the coronal section of the turned ellipsoid is 2 / sqrt(cos2/a2 + sin2/b2) wide.
    width = 2 / np.sqrt(np.cos(np.deg2rad(30)) ** 2 / 24**2 + np.sin(np.deg2rad(30)) ** 2 / 12**2)
    assert sorted((coronal.longest_mm, coronal.short_mm)) == pytest.approx(sorted((width, 34)), abs=1.8)
    for one in (axial, coronal, sagittal):
        begin, end = (np.array(point) for point in one.longest_ends_mm)
        assert np.linalg.norm(end - begin) == pytest.approx(one.longest_mm, abs=0.05)
        left, right = (np.array(point) for point in one.short_ends_mm)
        assert abs((end - begin) @ (right - left)) < 0.02 * one.longest_mm * one.short_mm
    middle = order.index(2)
    assert axial.slice_index == pytest.approx((shape[middle] - 1) / 2, abs=1)
    assert axial.longest_ends_mm[0][2] == pytest.approx(world(affine, (np.array(shape) - 1) / 2)[2], abs=1.7)


def test_one_voxel_has_its_own_size_as_diameter() -> None:
    mask = np.zeros((5, 5, 5), dtype=bool)
    mask[2, 2, 2] = True
    for one in diameters(mask, np.diag([2.0, 2.0, 2.0, 1.0])):
        assert one.longest_mm == pytest.approx(2.0)
        assert one.short_mm == pytest.approx(2.0)


def test_head_body_and_tail_follow_the_glands_own_course() -> None:
    right = 0
    numbers = [number for number in range(1, 27) if number % 9]
    for number in numbers:
        case = make_case(5, number)
        axis = organ_axis(case.labels == 1, case.grid.affine)
        assert axis is not None
        centre = world(case.grid.affine, np.argwhere(case.labels > 1).mean(axis=0))
        third = ("head", "body", "tail")[min(int(3 * case.plan.site), 2)]
        right += part_of(axis.place(centre)) == third
    assert right >= len(numbers) - 1
    assert part_of(None) == "unknown"
    assert organ_axis(np.zeros((4, 4, 4), dtype=bool), np.eye(4)) is None


def test_findings_are_single_lesions_with_volume_contrast_and_confidence() -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    organ, lesion = np.zeros((2, 40, 20, 20), dtype=bool)
    organ[2:38, 8:12, 8:12] = True
    lesion[3:9, 3:8, 8:12] = True
    lesion[30:36, 12:19, 8:12] = True
    lesion[20, 15, 15] = True  # 0.008 ml
    native, venous = np.zeros((2, 40, 20, 20), dtype=np.float32)
    native[...], venous[organ], venous[lesion] = 30, 100, 60
    probability = np.where(lesion, 0.6, 0.1)
    probability[5, 5, 9] = 0.9
    found = measure_lesions(lesion, organ, probability, {"NC": native, "V": venous}, affine, least_ml=0.3)
    assert [one.voxels for one in found] == [168, 120]
    assert found[1].volume_ml == pytest.approx(0.96)
    assert found[1].peak_voxel == (5, 5, 9)
    assert [one.confidence for one in found] == [0.6, 0.9]
    assert found[0].contrast_hu == pytest.approx({"NC": 0.0, "V": -40.0})
    # The first coordinate grows to the right: the lesion with the higher index lies at the head.
    assert [one.part for one in found] == ["head", "tail"]
    alone = measure_lesions(lesion, np.zeros_like(organ), probability, {"V": venous}, affine, least_ml=0.3)
    assert (alone[0].contrast_hu, alone[0].place, alone[0].part) == ({}, None, "unknown")
