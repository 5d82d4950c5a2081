"""Resampling by slabs against SciPy, for every type and layout of the source."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from medseg.inference.resample import Positions, resample_cubic, resample_linear


def _scipy(image: np.ndarray, shape: tuple[int, ...], step: tuple[float, ...], order: int = 1) -> np.ndarray:
    places = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, step, strict=True)), indexing="ij")
    return np.stack([map_coordinates(one.astype(np.float64), places, order=order, mode="nearest") for one in image])


@pytest.mark.parametrize("seed", range(10))
def test_values_are_those_of_linear_interpolation_with_the_border_held(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = tuple(int(n) for n in random.integers(1, 40, 3))
    wanted = tuple(int(n) for n in random.integers(1, 50, 3))
    step = tuple(float(s) for s in random.choice([1.0, 0.25, 0.31, 1.7, 3.4], 3))
    image = random.integers(-1000, 1000, (2, *shape)).astype(random.choice(["i2", "u1", "f4", "i8"]))
    found = resample_linear(image, wanted, step)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), _scipy(image, wanted, step), atol=1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_a_cubic_spline_is_scipys_with_the_border_repeated(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = tuple(int(n) for n in random.integers(1, 90, 3))
    wanted = tuple(int(n) for n in random.integers(1, 50, 3))
    step = tuple(float(s) for s in random.choice([1.0, 0.31, 1.7, 3.4], 3))
    image = random.integers(-1000, 1000, (2, *shape)).astype(random.choice(["i2", "u1", "f4", "i8"]))
    found = resample_cubic(image, wanted, step)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), _scipy(image, wanted, step, order=3), atol=5e-3)


def test_the_layout_of_the_source_changes_no_bit() -> None:
    image = np.random.default_rng(0).integers(-1000, 1000, (1, 37, 21, 18)).astype(np.int16)
    expected = resample_linear(image, (20, 30, 15), (1.8, 0.7, 1.2))
    assert torch.equal(resample_linear(torch.from_numpy(image), (20, 30, 15), (1.8, 0.7, 1.2)), expected)
    for axes in itertools.permutations(range(3)):
        stored = np.ascontiguousarray(image.transpose(0, *(1 + axis for axis in axes)))
        view = stored[:, ::-1].copy()[:, ::-1].transpose(0, *(1 + axes.index(axis) for axis in range(3)))
        assert torch.equal(resample_linear(view, (20, 30, 15), (1.8, 0.7, 1.2)), expected), axes


def test_positions_that_round_to_a_voxel_lie_on_it() -> None:
    found = Positions.along(11, 8, 1.5)
    assert found.lower.tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert found.upper.tolist() == [0, 2, 3, 5, 6, 8, 9, 10]
    assert Positions.along(4, 9, 1 - 1e-12).lower.tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3]
    assert Positions.along(5, 5, 1.0).identity
    assert not Positions.along(4, 5, 1.0).identity
