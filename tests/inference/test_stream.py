"""The stream of planes against whole volumes: blending by MONAI, resampling of every class, argmax."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.transforms import Compose, Invertd, Orientationd, Spacingd
from torch import Tensor, nn

from medseg.bundles.spec import Region
from medseg.inference.export import NotFiniteError, export_labels, export_maps, paint_regions, strongest_class
from medseg.inference.resample import resample_linear
from medseg.inference.sliding_window import Windows, logit_planes, stacked, stream_axis


def _network(channels: int, classes: int, *, sharpness: float = 4.0) -> nn.Module:
    torch.manual_seed(classes)
    last = nn.Conv3d(4, classes, 3, padding=1)
    last.weight.data.mul_(sharpness)
    return nn.Sequential(nn.Conv3d(channels, 4, 3, padding=1), nn.Tanh(), last).eval()


def _image(random: np.random.Generator, channels: int, shape: tuple[int, ...]) -> Tensor:
    coarse = torch.from_numpy(random.normal(size=(1, channels, 4, 4, 4))).float()
    return 3 * nn.functional.interpolate(coarse, size=shape, mode="trilinear")[0]


def _differ_only_at_ties(labels: np.ndarray, maps: Tensor) -> None:
    """Where the label is not the strongest class, it may miss the best value by rounding only."""
    expected = maps.argmax(0).numpy()
    other = np.nonzero(labels != expected)
    chosen = maps.numpy()[(labels[other], *other)]
    assert (maps.amax(0).numpy()[other] - chosen < 1e-6).all()
    assert len(chosen) <= 1e-4 * labels.size


def _export(logits: Tensor, shape: tuple[int, int, int], step: tuple[float, float, float], axis: int) -> np.ndarray:
    order = (axis, *(other for other in range(3) if other != axis))
    labels = np.full(shape, 99, dtype=np.uint8)
    export_labels(
        iter(logits.movedim(1 + axis, 0).contiguous()),
        labels.transpose(order),
        size=tuple(logits.shape[1 + one] for one in order),
        step=tuple(step[one] for one in order),
    )
    return labels


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_those_of_blended_resampled_classes_for_random_settings(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = tuple(int(n) for n in random.integers(1 if seed % 5 == 0 else 6, 24, 3))
    shape = tuple(int(n) for n in random.integers(1, 40, 3))
    roi = tuple(int(n) for n in random.integers(7, 16, 3))
    classes = int(random.choice([2, 3, 14, 104]))
    overlap, axis = float(random.choice([0.0, 0.25, 0.5, 0.625])), seed % 3
    blend = "gaussian" if seed % 2 else "constant"
    padding, value = [("constant", 0.3), ("replicate", 0.0)][seed // 2 % 2]
    step = tuple(float(x) for x in random.choice([1.0, 0.5, 0.73, 1.9, 2.4], 3))
    image, network = _image(random, 2, size), _network(2, classes)
    with torch.inference_mode():
        expected = sliding_window_inference(
            image[None], roi, 2, network, overlap=overlap, mode=blend, padding_mode=padding, cval=value
        )[0]
        planes = logit_planes(
            image,
            network,
            Windows(
                roi_size=roi,
                overlap=overlap,
                blend=blend,
                padding=padding,
                padding_value=value,
                sw_batch_size=1 + seed % 4,
            ),
            axis=axis,
        )
        logits = stacked(planes, size, axis)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
        maps = resample_linear(expected.softmax(0), shape, step)
    _differ_only_at_ties(_export(logits, shape, step, axis), maps)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.9, 2.0), (2.2, 0.7, 1.0)])
def test_labels_are_those_of_monai_invertd_followed_by_argmax(spacing: tuple[float, float, float]) -> None:
    random = np.random.default_rng(3)
    scan = _image(random, 1, (40, 31, 22))
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    forward = Compose(
        [Orientationd("image", axcodes="RAS", labels=None), Spacingd("image", (1.3, 1.3, 1.3), mode="bilinear")]
    )
    case = forward({"image": MetaTensor(scan, affine=affine)})
    logits = _network(1, 6)(case["image"].as_tensor().float()[None])[0].detach()
    case["pred"] = MetaTensor(logits.softmax(0), meta=case["image"].meta)
    invert = Invertd("pred", transform=forward, orig_keys="image", nearest_interp=False, to_tensor=True)
    maps = invert(case)["pred"].as_tensor().float()
    labels = _export(logits, maps.shape[1:], tuple(s / 1.3 for s in spacing), axis=0)
    assert len(np.unique(labels)) > 2
    _differ_only_at_ties(labels, maps)


@pytest.mark.parametrize("classes", [2, 5, 104, 300])
def test_random_fields_of_any_number_of_classes_equal_full_interpolation(classes: int) -> None:
    torch.manual_seed(classes)
    logits = 3 * torch.randn(classes, 7, 9, 8)
    step, shape = (0.45, 0.6, 1.4), (15, 16, 6)
    labels = np.zeros(shape, dtype=np.uint16)
    export_labels(iter(logits.movedim(1, 0)), labels, size=(7, 9, 8), step=step)
    _differ_only_at_ties(labels, resample_linear(logits.softmax(0), shape, step))


def test_of_equal_classes_the_lowest_wins_everywhere() -> None:
    logits = torch.zeros(5, 4, 6, 6)
    logits[3:, :, 3:] = 1.0  # 3 and 4 tie there; at the border all corners disagree
    labels = np.zeros((7, 11, 11), dtype=np.uint8)
    export_labels(iter(logits.movedim(1, 0)), labels, size=(4, 6, 6), step=(0.5, 0.5, 0.5))
    assert set(np.unique(labels)) == {0, 3}
    assert strongest_class(np.float32([[[1, 2]], [[1, 3]], [[0, 3]]])).tolist() == [[0, 1]]


def test_values_that_are_not_finite_are_found_in_any_class() -> None:
    for value, where in itertools.product((np.nan, np.inf), range(3)):
        values = np.zeros((3, 2, 2), dtype=np.float32)
        values[where, 1, 0] = value
        with pytest.raises(NotFiniteError):
            strongest_class(values)
    ruled_out = np.zeros((3, 2, 2), dtype=np.float32)
    ruled_out[1] = -np.inf
    assert (strongest_class(ruled_out) == 0).all()
    with pytest.raises(NotFiniteError):
        strongest_class(np.full((2, 1, 1), -np.inf, dtype=np.float32))
    with pytest.raises(NotFiniteError):
        paint_regions(torch.full((1, 2, 2), torch.nan), [Region("a", 0, 1)], np.zeros((2, 2), dtype=np.uint8))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("flips", [(0,), (1, 2), (0, 1, 2)])
def test_flips_inside_the_stream_are_those_of_the_whole_volume(axis: int, flips: tuple[int, ...]) -> None:
    random = np.random.default_rng(5)
    image, network = _image(random, 1, (23, 7, 17)), _network(1, 4)
    windows = Windows(roi_size=(9, 10, 8), overlap=0.6, padding_value=-1.0, sw_batch_size=3)
    dims = [1 + one for one in flips]
    with torch.inference_mode():
        inside = stacked(logit_planes(image, network, windows, axis=axis, flips=flips), (23, 7, 17), axis)
        outside = stacked(logit_planes(image.flip(dims), network, windows), (23, 7, 17), 0).flip(dims)
    torch.testing.assert_close(inside, outside, atol=1e-5, rtol=0)


def test_a_constant_window_is_evaluated_once_for_each_value_and_changes_nothing() -> None:
    image = torch.zeros(2, 40, 12, 12)
    image[:, 24:] = 0.5
    image[:, 30:34, 5:8, 5:8] = torch.rand(2, 4, 3, 3)
    network, seen = _network(2, 3), []
    windows = Windows(roi_size=(8, 8, 8), overlap=0.5, sw_batch_size=2)

    def counted(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return network(batch)

    with torch.inference_mode():
        reused = stacked(logit_planes(image, counted, windows), (40, 12, 12), 0)
        evaluated = sum(seen)
        plain = stacked(logit_planes(image, counted, windows, reuse=False), (40, 12, 12), 0)
    assert torch.equal(reused.argmax(0), plain.argmax(0))
    torch.testing.assert_close(reused, plain, atol=1e-6, rtol=0)
    assert sum(seen) - evaluated == 36
    assert evaluated < 22
    noisy = nn.Dropout(0.5).train()
    with torch.inference_mode():
        windows = Windows(roi_size=(8, 8, 8), overlap=0.0)
        found = stacked(logit_planes(torch.ones(1, 16, 8, 8), noisy, windows), (16, 8, 8), 0)
    assert not torch.equal(found[:, :8], found[:, 8:])


def test_a_pointwise_network_gives_the_same_labels_for_every_tiling() -> None:
    random = np.random.default_rng(7)
    image = _image(random, 1, (21, 18, 25))
    network = nn.Conv3d(1, 5, 1).eval()
    network.weight.data.mul_(5)
    found = set()
    for axis, roi, overlap, batch in itertools.product(range(3), (8, 13, 40), (0.0, 0.6), (1, 4)):
        with torch.inference_mode():
            planes = logit_planes(
                image, network, Windows(roi_size=(roi, roi, roi), overlap=overlap, sw_batch_size=batch), axis=axis
            )
            logits = stacked(planes, (21, 18, 25), axis)
        found.add(_export(logits, (30, 18, 20), (0.7, 1.0, 1.25), axis).tobytes())
    assert len(found) == 1


def test_planes_leave_as_soon_as_no_window_reaches_them_and_the_network_is_not_ahead() -> None:
    done: list[int] = []
    planes = logit_planes(
        torch.rand(1, 32, 8, 8),
        _network(1, 2),
        Windows(roi_size=(8, 8, 8), overlap=0.5),
        progress=lambda n, _all: done.append(n),
    )
    next(planes)
    assert len(done) == 1  # the second window begins at plane 4, so planes 0 to 3 are final before it is added
    for _ in range(4):
        next(planes)
    assert len(done) == 2


def test_maps_of_all_classes_are_those_of_whole_volumes() -> None:
    torch.manual_seed(1)
    probabilities = torch.randn(3, 6, 7, 5).softmax(0)
    step, shape = (0.4, 1.3, 0.9), (14, 5, 6)
    found = torch.stack(list(export_maps(iter(probabilities.movedim(1, 0)), size=(6, 7, 5), step=step, shape=shape)), 1)
    torch.testing.assert_close(found, resample_linear(probabilities, shape, step), atol=1e-6, rtol=0)


def test_the_streamed_axis_is_the_first_unless_another_is_clearly_longer_in_windows() -> None:
    assert stream_axis((200, 210, 220), (96, 96, 96)) == 0
    assert stream_axis((200, 210, 500), (96, 96, 96)) == 2
    assert stream_axis((200, 210, 100), (96, 96, 1)) == 2
    assert stream_axis((50, 60, 70), (96, 96, 96)) == 0


def test_networks_that_hand_back_their_input_do_not_change_the_image() -> None:
    image = torch.rand(1, 12, 8, 8)
    before = image.clone()
    windows = Windows(roi_size=(8, 8, 8), overlap=0.5)
    found = stacked(logit_planes(image, lambda batch: batch, windows), (12, 8, 8), 0)
    assert torch.equal(image, before)
    torch.testing.assert_close(found, before)
