"""Intensity, resampling and the way back, against MONAI's transforms and against invariants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import NormalizeIntensity as MonaiNormalize
from monai.transforms import ScaleIntensityRange as MonaiRange
from monai.transforms import ScaleIntensityRangePercentiles as MonaiPercentiles
from monai.transforms import Spacing

from medseg.bundles.spec import Interpolation, NormalizeIntensity, ScaleIntensityRange, ScaleIntensityRangePercentiles
from medseg.inference.export import export_labels, export_maps
from medseg.inference.intensity import apply_intensity
from medseg.inference.preprocess import preprocess, strongest, to_model_grid
from medseg.io.volume import Source, Volume
from tests.builders import blob_scan, tiny_spec

STEPS = [
    (NormalizeIntensity(), MonaiNormalize(channel_wise=True)),
    (NormalizeIntensity(nonzero=True), MonaiNormalize(nonzero=True, channel_wise=True)),
    (NormalizeIntensity(channel_wise=False), MonaiNormalize()),
    (ScaleIntensityRange(-175, 250), MonaiRange(-175, 250, 0, 1, clip=True)),
    (ScaleIntensityRange(0, 100, -1, 1, clip=False), MonaiRange(0, 100, -1, 1, clip=False)),
    (ScaleIntensityRangePercentiles(1, 99), MonaiPercentiles(1, 99, 0, 1, clip=True, channel_wise=True)),
]


def _volume(data: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(data.astype(np.float32), affine, Source(Path("scan.nii"), "nifti"))


@pytest.mark.parametrize(("ours", "theirs"), STEPS, ids=lambda step: type(step).__name__)
def test_intensity_steps_are_those_of_monai(ours: object, theirs: object) -> None:
    image = torch.from_numpy(np.stack([blob_scan(), 3 * blob_scan(seed=1) - 500]))
    image[:, :5] = 0
    expected = torch.as_tensor(theirs(image))
    torch.testing.assert_close(apply_intensity(image, ours), expected, atol=2e-5, rtol=1e-5)


def test_a_constant_volume_and_huge_values_stay_finite() -> None:
    assert torch.equal(apply_intensity(torch.full((1, 3, 3, 3), 7.0), NormalizeIntensity()), torch.zeros(1, 3, 3, 3))
    huge = torch.full((1, 4, 4, 4), 1e33)
    huge[0, 0] = 3e38
    assert torch.isfinite(apply_intensity(huge, NormalizeIntensity())).all()


@pytest.mark.parametrize(("interpolation", "mode"), [("linear", "bilinear"), ("cubic", 3)])
@pytest.mark.parametrize("spacing", [(0.7, 1.3, 2.0), (2.5, 1.0, 0.6)])
def test_the_model_grid_is_that_of_monai_spacing(
    spacing: tuple[float, float, float], interpolation: Interpolation, mode: str | int
) -> None:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [10, -20, 30]
    case = preprocess(_volume(blob_scan()[None], affine), tiny_spec(intensity=(), interpolation=interpolation))
    theirs = Spacing(pixdim=(1.0, 1.0, 1.0), mode=mode, dtype=torch.float64)(
        MetaTensor(torch.from_numpy(blob_scan()[None]), affine=torch.from_numpy(affine))
    )
    assert case.image.shape == theirs.shape
    torch.testing.assert_close(case.image, theirs.as_tensor().float(), atol=1e-3, rtol=1e-5)
    np.testing.assert_allclose(case.grid.affine, theirs.affine.numpy(), atol=1e-9)


def test_labels_come_back_onto_the_scans_grid() -> None:
    affine = np.diag([-0.8, 1.5, 2.0, 1.0])[[1, 0, 2, 3]]  # permuted and flipped
    spec = tiny_spec(intensity=())
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 30, 24)), indexing="ij")
    ball = x**2 + y**2 + z**2 < 0.6
    labels = ball.astype(np.uint8) + (ball & (x > 0.4))
    case = preprocess(_volume(labels[None], affine), spec)
    on_model = to_model_grid(labels, affine, spec)
    assert on_model.shape == case.image.shape[1:]
    probabilities = torch.nn.functional.one_hot(on_model.long(), 3).movedim(-1, 0).float()
    size, shape = case.grid.shape, case.grid.turned_shape
    step = tuple(1 / part for part in case.grid.step)
    turned = np.empty(shape, dtype=np.uint8)
    export_labels(iter(probabilities.movedim(1, 0)), turned, size=size, step=step, softmax=False)
    back = case.grid.order.invert(turned)
    assert back.shape == labels.shape
    assert back.dtype == np.uint8
    for value in (1, 2):
        both = ((back == value) & (labels == value)).sum()
        assert 2 * both / ((back == value).sum() + (labels == value).sum()) > 0.95
    planes = export_maps(iter(probabilities.movedim(1, 0)), size=size, step=step, shape=shape)
    maps = case.grid.order.invert(torch.stack(list(planes), dim=1).numpy())
    assert maps.shape == (3, *labels.shape)
    np.testing.assert_allclose(maps.sum(axis=0), 1.0, atol=1e-5)
    assert (maps.argmax(axis=0) == back).all()


def test_the_strongest_map_wins_and_the_lower_index_where_two_are_equal() -> None:
    maps = torch.tensor([[0.2, 0.5, 0.1], [0.7, 0.5, 0.1], [0.1, 0.0, 0.8]])
    assert strongest(iter(maps)).tolist() == [1, 0, 2]
