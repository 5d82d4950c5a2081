"""2D networks over volumes: each rule against the plain slice-by-slice computation, for each axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom
from torch import Tensor, nn

from medseg.inference.slices import SlicePredictor
from medseg.networks import create

AXES = [0, 1, 2]


class Pointwise(nn.Module):
    """K = 2 logits from each pixel alone; keeps the batches that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.batches.append(image)
        return torch.cat([image[:, :1] * 2, 1 - image[:, -1:]], dim=1)


def small_network(classes: int = 4, channels: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 3, padding=1)).eval()


def volume(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("axis", AXES)
def test_pointwise_network_gives_its_own_result_on_the_volume(axis: int) -> None:
    image = volume(1, 2, 5, 6, 7)
    size = tuple(n for dimension, n in enumerate((5, 6, 7)) if dimension != axis)
    predictor = SlicePredictor(Pointwise().eval(), axis=axis, size=size, batch_size=3)
    assert torch.equal(predictor(image), torch.cat([image[:, :1] * 2, 1 - image[:, 1:]], dim=1))


@pytest.mark.parametrize("axis", AXES)
def test_slices_are_padded_in_the_middle_with_the_minimum_of_the_volume(axis: int) -> None:
    image = volume(1, 2, 5, 6, 7)
    height, width = (n for dimension, n in enumerate((5, 6, 7)) if dimension != axis)
    network = Pointwise().eval()
    logits = SlicePredictor(network, axis=axis, size=(9, 16), batch_size=4)(image)
    assert torch.equal(logits, torch.cat([image[:, :1] * 2, 1 - image[:, 1:]], dim=1))
    fields = torch.cat(network.batches)
    top, left = (9 - height) // 2, (16 - width) // 2
    slices = image[0].movedim(1 + axis, 0)
    assert torch.equal(fields[:, :, top : top + height, left : left + width], slices)
    for channel in range(2):
        inside = slices[:, channel].sum()
        outside = fields[:, channel].sum() - inside
        pixels = fields[:, channel].numel() - slices[:, channel].numel()
        torch.testing.assert_close(outside, pixels * image[0, channel].min())


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_are_channels_and_the_last_slice_is_repeated(axis: int) -> None:
    image = volume(1, 1, 5, 6, 7)
    size = tuple(n for dimension, n in enumerate((5, 6, 7)) if dimension != axis)
    network = Pointwise().eval()
    logits = SlicePredictor(network, axis=axis, size=size, batch_size=2, neighbours=1)(image)
    stack = image[0, 0].movedim(axis, 0)
    before = torch.cat([stack[:1], stack[:-1]])
    after = torch.cat([stack[1:], stack[-1:]])
    assert torch.equal(torch.cat(network.batches), torch.stack([before, stack, after], dim=1))
    assert torch.equal(logits[0, 0].movedim(axis, 0), before * 2)
    assert torch.equal(logits[0, 1].movedim(axis, 0), 1 - after)


# 512 and 58 to 224: rounding takes SciPy past the end of the slice; 224 to 96: past the end of the labels.
@pytest.mark.parametrize(("height", "width"), [(50, 300), (512, 58), (96, 224), (224, 131)])
def test_published_resize_is_that_of_scipy(height: int, width: int) -> None:
    image = volume(1, 1, 3, height, width)
    network = small_network()
    logits = SlicePredictor(network, axis=0, size=(224, 224), batch_size=2, resize="published")(image)
    assert logits.shape == (1, 4, 3, height, width)
    different = 0
    for index in range(3):
        zoomed = zoom(image[0, 0, index].numpy(), (224 / height, 224 / width), order=3)
        with torch.inference_mode():
            labels = network(torch.from_numpy(zoomed)[None, None])[0].argmax(0).numpy()
        expected = zoom(labels, (height / 224, width / 224), order=0)
        different += int((logits[0, :, index].argmax(0).numpy() != expected).sum())
    # Logits of two classes may be as close as float32's rounding of the zoom.
    assert different <= 3 * height * width * 1e-5


def test_published_resize_gives_the_network_what_scipy_gives_it() -> None:
    image = volume(1, 1, 4, 512, 58)
    network = Pointwise().eval()
    SlicePredictor(network, axis=0, size=(224, 224), resize="published")(image)
    expected = zoom(image[0, 0].numpy(), (1, 224 / 512, 224 / 58), order=3)
    assert not expected[:, -1].any()  # SciPy's rounding, see the module
    np.testing.assert_allclose(network.batches[0][:, 0], expected, rtol=0, atol=3e-6)


def test_smooth_resize_brings_logits_back_linearly_with_corners_on_corners() -> None:
    rows, columns = torch.linspace(-1, 1, 512), torch.linspace(0, 3, 90)
    ramp = (rows[:, None] + columns)[None, None, None].repeat(1, 1, 2, 1, 1)
    predictor = SlicePredictor(Pointwise().eval(), axis=0, size=(224, 224), resize="smooth")
    logits = predictor(ramp)
    # A straight ramp survives both ways; splines mirrored at the ends bend it there by little.
    torch.testing.assert_close(logits[:, :1, :, 8:-8, 3:-3], ramp[:, :, :, 8:-8, 3:-3] * 2, rtol=0, atol=1e-3)
    torch.testing.assert_close(logits[:, :1], ramp * 2, rtol=0, atol=2e-2)


def test_resize_of_slices_that_fit_changes_nothing() -> None:
    image = volume(1, 1, 3, 20, 24)
    network = small_network()
    results = [
        SlicePredictor(network, axis=0, size=(20, 24), resize=resize)(image)
        for resize in ("none", "published", "smooth")
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "transunet",
            {"img_size": 64, "hidden_size": 48, "mlp_dim": 96, "num_heads": 3, "num_layers": 1, "grid": [4, 4]}
            | {"resnet_num_layers": [1, 1, 1], "resnet_width_factor": 0.5, "head_channels": 32},
        ),
        ("paratranscnn", {"heads": 4, "dim": 16, "depth": [1, 1, 1], "cnn_width": 8, "cnn_blocks": [1, 1, 1, 1]}),
    ],
)
@pytest.mark.parametrize("neighbours", [0, 1])
def test_batches_of_a_published_network_equal_single_slices(name: str, config: dict[str, Any], neighbours: int) -> None:
    torch.manual_seed(0)
    network = create(name, num_classes=3, **config).eval()
    image = volume(1, 1, 36, 7, 50)
    predictor = SlicePredictor(network, axis=1, size=(64, 64), batch_size=5, neighbours=neighbours)
    logits = predictor(image)
    assert logits.shape == (1, 3, 36, 7, 50)
    assert not logits.requires_grad
    for index in range(7):
        field = torch.full((1, 1 + 2 * neighbours, 64, 64), float(image.min()))
        for channel, offset in enumerate(range(-neighbours, neighbours + 1)):
            field[0, channel, 14:50, 7:57] = image[0, 0, :, min(max(index + offset, 0), 6)]
        with torch.inference_mode():
            expected = network(field)[:, :, 14:50, 7:57]
        torch.testing.assert_close(logits[:, :, :, index], expected, rtol=0, atol=1e-5)


def test_first_of_several_outputs_counts_and_volumes_of_a_batch_are_independent() -> None:
    network = Pointwise().eval()
    image = volume(2, 1, 3, 4, 5)

    def several(slices: Tensor) -> tuple[Tensor, ...]:
        return network(slices), network(slices)[:, :, ::2, ::2]

    predictor = SlicePredictor(several, axis=2, size=(6, 8), batch_size=2)
    assert torch.equal(predictor(image), torch.cat([image * 2, 1 - image], dim=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axis": 3}, "axis is 3; it must be 0, 1 or 2"),
        ({"size": (0, 64)}, r"size is \(0, 64\); both numbers must be positive"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"resize": "cubic"}, "resize is 'cubic'; it must be one of none, published, smooth"),
        ({"neighbours": -1}, "neighbours is -1; it must not be negative"),
    ],
)
def test_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlicePredictor(Pointwise(), **({"axis": 0, "size": (64, 64)} | settings))


def test_what_cannot_be_run_is_refused_with_the_reason() -> None:
    predictor = SlicePredictor(Pointwise().eval(), axis=1, size=(64, 48))
    with pytest.raises(ValueError, match="W is 50; slices of at most 48 can be padded"):
        predictor(torch.zeros(1, 1, 64, 3, 50))
    with pytest.raises(ValueError, match=r"image is \(1, 64, 64\); it must be \(B, C, D, H, W\)"):
        predictor(torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="training mode"):
        SlicePredictor(Pointwise(), axis=0, size=(8, 8))(torch.zeros(1, 1, 2, 8, 8))
