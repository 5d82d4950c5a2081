"""The engine's windows against MONAI's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.inferers.utils import compute_importance_map
from torch import nn

from medseg.inference.sliding_window import (
    Windows,
    importance_map,
    pad_to_window,
    sliding_window,
    window_count,
    window_starts,
)


def _network(channels: int, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(channels, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, classes, 3, padding=1)).eval()


@pytest.mark.parametrize("seed", range(12))
def test_logits_are_those_of_monai_for_random_shapes_windows_and_overlaps(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = tuple(int(n) for n in random.integers(5, 40, 3))
    roi = tuple(int(n) for n in random.integers(4, 20, 3))
    overlap = float(random.choice([0.0, 0.25, 0.5, 0.625, 0.75]))
    blend = "gaussian" if seed % 2 else "constant"
    value = float(random.normal())
    image = torch.from_numpy(random.normal(size=(2, *shape))).float()
    network = _network(2, 3)
    with torch.inference_mode():
        ours = sliding_window(
            image,
            network,
            Windows(roi_size=roi, overlap=overlap, blend=blend, padding_value=value, sw_batch_size=1 + seed % 3),
        )
        theirs = sliding_window_inference(
            image[None], roi, 2, network, overlap=overlap, mode=blend, padding_mode="constant", cval=value
        )[0]
    assert ours.shape == theirs.shape == (3, *shape)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert torch.equal(ours.argmax(0), theirs.argmax(0))


def test_importance_map_is_that_of_monai() -> None:
    theirs = compute_importance_map((32, 33, 8), mode="gaussian", sigma_scale=0.125).clamp(min=1e-3)
    torch.testing.assert_close(importance_map((32, 33, 8), "gaussian"), theirs, atol=1e-7, rtol=1e-6)


def test_windows_cover_every_voxel_and_end_at_the_border() -> None:
    for size in range(1, 60):
        for overlap in (0.0, 0.3, 0.5, 0.9):
            starts = window_starts(size, 16, overlap)
            covered = {voxel for start in starts for voxel in range(start, start + 16)}
            assert set(range(size)) <= covered
            assert starts == sorted(set(starts))
            assert starts[-1] == max(size - 16, 0)
    assert window_count((40, 10, 16), (16, 16, 16), 0.5) == len(window_starts(40, 16, 0.5))


def test_a_small_volume_is_padded_half_in_front_with_the_given_value_and_cut_back() -> None:
    image = torch.ones(1, 4, 9, 7)
    padded, inside = pad_to_window(image, (7, 8, 7), "constant", -2.5)
    assert padded.shape == (1, 7, 9, 7)
    assert torch.equal(padded[(slice(None), *inside)], image)
    assert inside[0] == slice(1, 5)
    assert float(padded[0, 0, 0, 0]) == float(padded[0, -1, 0, 0]) == -2.5
    replicated, _ = pad_to_window(torch.arange(4.0).reshape(1, 4, 1, 1), (7, 1, 1), "replicate", 0.0)
    assert replicated.flatten().tolist() == [0, 0, 1, 2, 3, 3, 3]


def test_of_several_outputs_the_first_is_taken_and_windows_are_reported() -> None:
    seen: list[tuple[int, int]] = []
    image = torch.rand(1, 20, 8, 8)
    found = sliding_window(
        image,
        lambda batch: (batch * 2, batch[..., ::2]),
        Windows(roi_size=(8, 8, 8), overlap=0.5),
        progress=lambda done, total: seen.append((done, total)),
    )
    torch.testing.assert_close(found, image * 2)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
