"""What the engine does for models of nnU-Net, each step against the library function that nnU-Net calls for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.bundles.nnunet import ChannelNormalization, Resampling
from medseg.errors import InputError
from medseg.inference.nnunet import nonzero_box, normalize, resample
from medseg.inference.resample import Positions
from medseg.inference.sliding_window import importance_map, window_starts


def zoomed(image: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """What skimage's resize makes of an image, with the arguments of nnU-Net."""
    zoom = [new / old for new, old in zip(shape, image.shape, strict=True)]
    found = ndimage.zoom(image.astype(float), zoom, order=order, mode="nearest", grid_mode=True)
    return np.clip(found, image.min(), image.max())


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("shape", [(9, 14, 21), (17, 5, 6), (12, 20, 1)])
def test_all_axes_at_once_are_resampled_edge_to_edge(order: int, shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).normal(size=(2, 12, 9, 14)).astype(np.float32)
    found = resample(torch.from_numpy(image), shape, order=order, order_z=0, apart=None)
    for channel, source in zip(found.numpy(), image, strict=True):
        np.testing.assert_allclose(channel, zoomed(source, shape, order), atol=2e-5)


@pytest.mark.parametrize("apart", [0, 1, 2])
@pytest.mark.parametrize("order_z", [0, 1])
def test_an_axis_apart_is_resampled_slice_by_slice(apart: int, order_z: int) -> None:
    image = np.random.default_rng(1).normal(size=(1, 6, 7, 8)).astype(np.float32)
    shape = (11, 5, 13)
    across = tuple(size for axis, size in enumerate(shape) if axis != apart)
    slices = np.stack([zoomed(plane, across, 3) for plane in np.moveaxis(image[0], apart, 0)], axis=apart)
    grid = list(np.meshgrid(*(np.arange(size, dtype=float) for size in shape), indexing="ij"))
    grid[apart] = image.shape[1 + apart] / shape[apart] * (grid[apart] + 0.5) - 0.5
    wanted = ndimage.map_coordinates(slices, grid, order=order_z, mode="nearest")
    found = resample(torch.from_numpy(image), shape, order=3, order_z=order_z, apart=apart)
    np.testing.assert_allclose(found[0].numpy(), wanted, atol=2e-5)


def test_nearest_positions_round_a_half_up_and_stay_inside() -> None:
    assert Positions.along(4, 8, 0.5, centred=True, nearest=True).lower.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert Positions.along(8, 4, 2.0, centred=True, nearest=True).lower.tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("current", "new", "separate_z", "axis"),
    [
        ((5.0, 1.0, 1.0), (1.0, 1.0, 1.0), None, 0),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 3.5), None, 2),
        ((3.0, 1.0, 1.0), (1.0, 1.0, 1.0), None, None),  # three times is not yet anisotropic
        ((0.24, 1.25, 1.25), (1.0, 1.0, 1.0), None, None),  # two long edges
        ((0.24, 1.25, 1.2500001), (1.0, 1.0, 1.0), None, None),  # and that of an oblique affine
        ((2.0, 1.0, 1.0), (1.0, 1.0, 1.0), True, 0),
        ((9.0, 1.0, 1.0), (1.0, 1.0, 1.0), False, None),
    ],
)
def test_the_axis_of_thick_slices_is_found(
    current: tuple[float, ...], new: tuple[float, ...], separate_z: bool | None, axis: int | None
) -> None:
    assert Resampling(3, 0, separate_z).axis_apart(current, new) == axis


def test_the_box_holds_what_is_not_zero_in_some_channel() -> None:
    image = np.zeros((2, 6, 7, 8), dtype=np.float32)
    assert nonzero_box(image) == (slice(0, 6), slice(0, 7), slice(0, 8))
    image[0, 2, 3, 4], image[1, 4, 3, 1] = 1, -1
    assert nonzero_box(image) == (slice(2, 5), slice(3, 4), slice(1, 5))


def test_normalisations_follow_their_formulas() -> None:
    image = np.zeros((1, 3, 3, 3), dtype=np.float32)
    image[0, :, :, :2] = np.arange(18, dtype=np.float32).reshape(3, 3, 2) * 10 + 5
    image[0, 1, 1, 0] = 0  # on the edge of the image, so not a hole

    def found(scheme: str, **numbers: float) -> np.ndarray:
        return normalize(image, [ChannelNormalization(scheme, **numbers)], name="scan").numpy()[0]  # type: ignore[arg-type]

    np.testing.assert_allclose(found("ZScoreNormalization"), (image[0] - image[0].mean()) / image[0].std(), atol=1e-5)
    inside = image[0] != 0
    scored = np.where(inside, (image[0] - image[0][inside].mean()) / image[0][inside].std(), 0)
    np.testing.assert_allclose(found("ZScoreNormalization", inside=True), scored, atol=1e-5)
    clipped = (np.clip(image[0], 20, 100) - 50) / 8
    np.testing.assert_allclose(found("CTNormalization", mean=50, std=8, lower=20, upper=100), clipped, atol=1e-5)
    np.testing.assert_allclose(found("RescaleTo01Normalization"), image[0] / 175, atol=1e-6)
    np.testing.assert_allclose(found("RGBTo01Normalization"), image[0] / 255, atol=1e-6)
    assert np.array_equal(found("NoNormalization"), image[0])
    with pytest.raises(InputError, match=r"channel 0 runs from 0 to 350; the bundle takes colours"):
        normalize(image * 2, [ChannelNormalization("RGBTo01Normalization")], name="scan")


@pytest.mark.parametrize("size", [(16, 16, 16), (20, 33, 7), (1, 40, 32), (96, 64, 80)])
def test_the_importance_map_is_a_filtered_impulse_in_half_precision(size: tuple[int, int, int]) -> None:
    impulse = np.zeros(size)
    impulse[tuple(n // 2 for n in size)] = 1
    filtered = ndimage.gaussian_filter(impulse, [n / 8 for n in size], mode="constant")
    wanted = torch.from_numpy(filtered / filtered.max() * 10).half().float()
    wanted[wanted == 0] = wanted[wanted > 0].min()
    found = importance_map(size, "gaussian", "nnunet")
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-7)  # a unit in the last place of half precision


def test_windows_are_spaced_evenly() -> None:
    assert window_starts(110, 64, 0.5, "nnunet") == [0, 23, 46]
    assert window_starts(110, 64, 0.5) == [0, 32, 46]
    assert window_starts(64, 64, 0.5, "nnunet") == [0]
