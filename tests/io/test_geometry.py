"""Affine arithmetic: invariants over every orientation, and numbers worked out by hand."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_shape_offset
from scipy.spatial.transform import Rotation

from medseg.io import geometry
from medseg.io.geometry import AxisOrder

ORDERS = [AxisOrder(axes, flips) for axes in permutations(range(3)) for flips in product((False, True), repeat=3)]  # type: ignore[arg-type]
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (12, -9, 20), degrees=True).as_matrix() * (0.7, 0.9, 2.5)
OBLIQUE[:3, 3] = (-80, 35, 10)


def test_spacing_extent_and_world_by_hand() -> None:
    affine = np.array([[0, 0, -3, 9], [2, 0, 0, -4], [0, 1, 0, 5], [0, 0, 0, 1]], dtype=float)
    np.testing.assert_array_equal(geometry.spacing(affine), (2, 1, 3))
    assert geometry.orientation(affine) == "ASL"
    np.testing.assert_array_equal(geometry.extent_mm((10, 20, 30), affine), (20, 20, 90))
    np.testing.assert_array_equal(geometry.extent_mm((10, 20, 30), affine, canonical=True), (90, 20, 20))
    np.testing.assert_array_equal(geometry.world(affine, [[1, 2, 3], [0, 0, 0.5]]), [(0, -2, 7), (7.5, -4, 5)])
    np.testing.assert_array_equal(geometry.from_lps(np.eye(3), (1, 2, 3), (4, 5, 6))[:3], [
        [-1, 0, 0, -4], [0, -2, 0, -5], [0, 0, 3, 6],
    ])  # fmt: skip


def test_there_are_48_orders_and_each_has_its_inverse() -> None:
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert len(set(ORDERS)) == 48
    for order in ORDERS:
        np.testing.assert_array_equal(order.invert(order.apply(array)), array)
        assert order.apply(array).shape[1:] == order.shape((3, 4, 5))
        assert order.inverse.inverse == order


@pytest.mark.parametrize("axcodes", ["RAS", "LPI", "SAL"])
def test_every_orientation_of_a_scan_has_the_same_canonical_array_and_affine(axcodes: str) -> None:
    array = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    wanted = AxisOrder.to_canonical(OBLIQUE, axcodes)
    for order in ORDERS:
        turned, affine = order.apply(array), order.affine(OBLIQUE, array.shape)
        back = AxisOrder.to_canonical(affine, axcodes)
        np.testing.assert_array_equal(back.apply(turned), wanted.apply(array))
        np.testing.assert_allclose(back.affine(affine, turned.shape), wanted.affine(OBLIQUE, array.shape), atol=1e-12)
        assert geometry.orientation(back.affine(affine, turned.shape)) == axcodes


def test_a_turned_voxel_stays_where_it_was() -> None:
    array = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    for order in ORDERS:
        turned, affine = order.apply(array), order.affine(OBLIQUE, array.shape)
        for value in (0, 17, 59):
            here, there = np.argwhere(array == value)[0], np.argwhere(turned == value)[0]
            np.testing.assert_allclose(geometry.world(affine, there), geometry.world(OBLIQUE, here), atol=1e-12)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0, 0.8),
)
def test_any_regular_affine_gets_a_permutation(seed: int, shear: float) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    skewed = np.eye(3) + shear * np.triu(rng.uniform(-1, 1, (3, 3)), k=1)
    affine[:3, :3] = Rotation.random(rng=rng).as_matrix() @ skewed * rng.uniform(0.1, 10, 3)
    order = AxisOrder.to_canonical(affine)
    assert sorted(order.axes) == [0, 1, 2]
    assert geometry.orientation(order.affine(affine, (4, 5, 6))) == "RAS"


def test_45_degrees_about_an_axis_still_is_one_to_one() -> None:
    for axis in "xyz":
        affine = np.eye(4)
        affine[:3, :3] = Rotation.from_euler(axis, 45, degrees=True).as_matrix()
        assert sorted(AxisOrder.to_canonical(affine).axes) == [0, 1, 2]


def test_bad_axis_codes_are_refused() -> None:
    for code in ("RAR", "RA", "XYZ", "RLS"):
        with pytest.raises(ValueError, match="axcodes must hold"):
            AxisOrder.to_canonical(np.eye(4), code)


def test_shear_is_measured_in_degrees() -> None:
    sheared = OBLIQUE @ np.array([[1, np.tan(np.radians(2)), 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    angle = np.degrees(np.arctan(np.tan(np.radians(2)) * 0.7 / 0.9))
    assert geometry.shear_degrees(sheared) == pytest.approx(angle, abs=1e-9)
    assert not geometry.is_orthogonal(sheared)
    assert geometry.is_orthogonal(OBLIQUE)
    assert geometry.is_singular(np.diag([1.0, 0, 1, 1]))
    assert not geometry.is_singular(sheared)


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[st.integers(1, 90)] * 3), st.tuples(*[st.floats(0.3, 6)] * 3), st.tuples(*[st.floats(0.3, 6)] * 3))
def test_the_resampled_grid_is_that_of_monai(
    shape: tuple[int, int, int], old: tuple[float, float, float], new: tuple[float, float, float]
) -> None:
    affine = np.diag([*old, 1.0])
    affine[:3, 3] = (3, -7, 20)
    expected, offset = compute_shape_offset(shape, affine, np.diag([*new, 1.0]))
    assert geometry.resampled_shape(shape, old, new) == tuple(int(n) for n in expected)
    resampled = geometry.resampled_affine(affine, new)
    np.testing.assert_allclose(geometry.spacing(resampled), new)
    np.testing.assert_allclose(resampled[:3, 3], offset)
