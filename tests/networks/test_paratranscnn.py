"""ParaTransCNN: what its golden vectors cannot see, its rules for configurations and sizes, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.networks import create
from medseg.networks.paratranscnn import FeedForward, ParaTransCNN, UpsamplingHead

TINY: dict[str, Any] = {
    "num_classes": 3,
    "heads": 4,
    "dim": 32,
    "depth": [1, 2, 1],
    "cnn_width": 16,
    "cnn_blocks": [1, 1, 2, 1],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_channels": 1}, "n_channels is 1; the CNN takes 3"),
        ({"patch_size": 4}, "patch_size is 4; only 2 makes the two encoders meet"),
        ({"heads": 3}, "heads is 3; it must divide dim 32"),
        ({"depth": [1, 1]}, r"depth is \[1, 1\]; it needs 3 entries"),
        ({"cnn_blocks": [1, 1, 0, 1]}, r"cnn_blocks is \[1, 1, 0, 1\]; it needs 4 entries"),
        ({"dim": 4, "cnn_width": 4}, "cnn_width is 4; dim \\+ 2 cnn_width must be at least 16"),
        ({"window_size": 7}, "window_size"),
    ],
)
def test_configuration_that_cannot_work_is_refused_with_value_and_rule(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("paratranscnn", **(TINY | change))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 40, 64), "height is 40; it must be a multiple of 16"),
        ((1, 3, 64, 8), "width is 8; it must be a multiple of 16"),
        ((1, 4, 64, 64), r"image is \(1, 4, 64, 64\); it must be \(B, C, H, W\) with C 1 or 3"),
    ],
)
def test_image_of_another_size_is_refused_with_axis_value_and_rule(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParaTransCNN(**TINY)(torch.zeros(shape))


def test_published_network_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = ParaTransCNN()
    assert sum(parameter.numel() for parameter in network.parameters()) == 245_468_937


def test_norms_have_the_published_constants() -> None:
    network = ParaTransCNN(**TINY)
    layer_norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm)]
    assert len(layer_norms) == 8
    assert {norm.eps for norm in layer_norms} == {1e-5}
    batch_norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in batch_norms} == {(1e-5, 0.1)}


def test_feed_forward_uses_the_exact_gelu() -> None:
    layer = FeedForward(4, 0.0).eval()
    for linear in (layer.fc1, layer.fc2):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    x = torch.tensor([[-2.0, -0.5, 0.7, 2.0]])
    exact = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    torch.testing.assert_close(layer(x), exact, rtol=0, atol=1e-7)  # tanh differs by up to 4e-4 here


def test_head_run_as_one_equals_its_two_layers_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    head = UpsamplingHead(12, 7, 3).double()
    x = torch.randn(2, 12, 4, 5, dtype=torch.float64)
    as_one, in_turn = head(x), head.classify(head.up(x))
    torch.testing.assert_close(as_one, in_turn, rtol=0, atol=1e-12)
    parameters = list(head.parameters())
    gradients = zip(
        torch.autograd.grad(as_one.square().sum(), parameters),
        torch.autograd.grad(in_turn.square().sum(), parameters),
        strict=True,
    )
    for got, expected in gradients:
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_one_channel_is_repeated_and_rectangles_are_allowed() -> None:
    torch.manual_seed(0)
    network = ParaTransCNN(**TINY).eval()
    image = torch.randn(2, 1, 48, 80)
    with torch.inference_mode():
        logits = network(image)
        assert logits.shape == (2, 3, 48, 80)
        assert torch.equal(logits, network(image.repeat(1, 3, 1, 1)))


def test_one_training_step_reaches_every_parameter_and_lowers_the_loss() -> None:
    torch.manual_seed(0)
    network = ParaTransCNN(**TINY, dropout_rate=0.0)
    image, labels = torch.randn(2, 1, 64, 64), torch.randint(0, 3, (2, 64, 64))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    before = nn.functional.cross_entropy(network(image), labels)
    before.backward()
    untouched = [
        name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert untouched == []
    optimizer.step()
    assert nn.functional.cross_entropy(network(image), labels) < before


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    network = ParaTransCNN(**TINY, dropout_rate=0.5)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(network.transformer[0](image), network.transformer[0](image))
        network.eval()
        assert torch.equal(network(image), network(image))
