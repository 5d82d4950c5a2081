"""TransUNet: what its golden vectors cannot see, its rules for configurations and sizes, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.networks import create
from medseg.networks.transunet import PUBLISHED_CONFIGS, FeedForward, HybridCNN, StandardisedConv, TransUNet

TINY: dict[str, Any] = {
    "img_size": 64,
    "num_classes": 3,
    "hidden_size": 48,
    "mlp_dim": 96,
    "num_heads": 3,
    "num_layers": 2,
    "decoder_channels": [32, 24, 16, 16],
    "head_channels": 32,
}
TINY_HYBRID = TINY | {"grid": [4, 4], "resnet_num_layers": [1, 2, 1], "resnet_width_factor": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier": "token"}, "classifier is 'token'; only 'seg' exists"),
        ({"img_size": 72}, "img_size is 72; it must be a multiple of 16"),
        ({"num_heads": 5}, "num_heads is 5; it must divide hidden_size 48"),
        ({"decoder_channels": [32, 16, 16]}, r"decoder_channels is \[32, 16, 16\]; it needs 4 entries"),
        ({"grid": [2, 2]}, r"grid is \[2, 2\]; img_size 64 needs \[4, 4\]"),
        ({"grid": None, "patch_size": [32, 32]}, r"patch_size is \[32, 32\]; the decoder needs \[16, 16\]"),
        ({"grid": None, "n_skip": 3}, "n_skip is 3; without a CNN"),
        ({"n_skip": 4}, "n_skip is 4; the CNN has 3 skips, give 0 to 3"),
        ({"resnet_width_factor": 0.75}, "resnet_width_factor is 0.75; 64 times it must be a multiple of 32"),
        ({"resnet_num_layers": [1, 1]}, r"resnet_num_layers is \[1, 1\]; it needs 3 entries"),
        ({"skip_channels": [512, 256, 64, 16]}, r"skip_channels is .* needs \[256, 128, 32\] first"),
        ({"window_size": 7}, "window_size"),
    ],
)
def test_configuration_that_cannot_work_is_refused_with_value_and_rule(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("transunet", **(TINY_HYBRID | change))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 72, 64), "height is 72; img_size 64 allows no other size"),
        ((1, 3, 64, 96), "width is 96; img_size 64 allows no other size"),
        ((1, 2, 64, 64), r"image is \(1, 2, 64, 64\); it must be \(B, C, H, W\) with C 1 or 3"),
        ((3, 64, 64), r"image is \(3, 64, 64\)"),
    ],
)
def test_image_of_another_size_is_refused_with_axis_value_and_rule(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransUNet(**TINY)(torch.zeros(shape))


def test_published_network_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = TransUNet(**PUBLISHED_CONFIGS["R50-ViT-B_16"])
    assert sum(parameter.numel() for parameter in network.parameters()) == 105_277_081


def test_norms_have_the_published_constants() -> None:
    network = TransUNet(**TINY_HYBRID)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.LayerNorm)}
    assert len(norms) == 5
    assert {norm.eps for norm in norms.values()} == {1e-6}
    groups = {name: module for name, module in network.named_modules() if isinstance(module, nn.GroupNorm)}
    shortcuts = {name: norm for name, norm in groups.items() if name.endswith("gn_proj")}
    assert (len(groups), len(shortcuts)) == (16, 3)
    assert all(norm.eps == 1e-5 and norm.num_groups == norm.num_channels for norm in shortcuts.values())
    assert all(norm.eps == 1e-6 and norm.num_groups == 32 for name, norm in groups.items() if name not in shortcuts)
    batch_norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in batch_norms} == {(1e-5, 0.1)}


def test_feed_forward_uses_the_exact_gelu() -> None:
    layer = FeedForward(4, 4, 0.0).eval()
    for linear in (layer.fc1, layer.fc2):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    x = torch.tensor([[-2.0, -0.5, 0.7, 2.0]])
    exact = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    torch.testing.assert_close(layer(x), exact, rtol=0, atol=1e-7)  # tanh differs by up to 4e-4 here


def test_standardised_convolution_uses_biased_variance_and_eps_in_the_root() -> None:
    torch.manual_seed(0)
    conv = StandardisedConv(3, 8, 3)
    nn.init.normal_(conv.weight, std=1e-3)  # small, so that eps of 1e-5 weighs more than the variance
    x = torch.randn(2, 3, 9, 9)
    raw = conv.weight.detach().double()
    mean = raw.mean(dim=(1, 2, 3), keepdim=True)
    variance = ((raw - mean) ** 2).mean(dim=(1, 2, 3), keepdim=True)
    expected = nn.functional.conv2d(x.double(), (raw - mean) / torch.sqrt(variance + 1e-5), padding=1)
    torch.testing.assert_close(conv(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_skip_at_a_quarter_is_filled_with_zeros_at_the_bottom_and_right() -> None:
    torch.manual_seed(0)
    _, (eighth, quarter, half) = HybridCNN(32, [1, 1, 1]).eval()(torch.randn(1, 3, 64, 64))
    assert eighth.shape == (1, 256, 8, 8)
    assert quarter.shape == (1, 128, 16, 16)
    assert half.shape == (1, 32, 32, 32)
    assert not quarter[..., -1, :].any()
    assert not quarter[..., :, -1].any()
    assert quarter[..., 0, :-1].any()
    assert quarter[..., :-1, 0].any()


def test_one_channel_is_repeated_three_times() -> None:
    torch.manual_seed(0)
    network = TransUNet(**TINY_HYBRID).eval()
    image = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        assert torch.equal(network(image), network(image.repeat(1, 3, 1, 1)))


def test_number_of_skips_of_one_network_does_not_change_the_next() -> None:
    widths = [32, 24, 16]  # what the decoder itself brings to its second, third and fourth step
    for n_skip in (1, 3, 0, 2, 3):
        network = TransUNet(**TINY_HYBRID, n_skip=n_skip).eval()
        brought = [block.conv1[0].in_channels for block in network.decoder.blocks]
        skips = [256, 128, 32, 0][:n_skip] + [0] * (4 - n_skip)
        assert brought == [a + b for a, b in zip([32, *widths], skips, strict=True)]
        with torch.inference_mode():
            assert network(torch.zeros(1, 1, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("config", [TINY, TINY_HYBRID], ids=["vit", "hybrid"])
def test_one_training_step_reaches_every_parameter_and_lowers_the_loss(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = TransUNet(**config, dropout_rate=0.0)
    image, labels = torch.randn(2, 1, 64, 64), torch.randint(0, 3, (2, 64, 64))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    before = nn.functional.cross_entropy(network(image), labels)
    before.backward()
    untouched = [
        name
        for name, parameter in network.named_parameters()
        # Softmax does not see a constant added to all keys: the gradient of that bias is zero by nature.
        if parameter.grad is None or not (parameter.grad.any() or name.endswith("attn.key.bias"))
    ]
    assert untouched == []
    optimizer.step()
    assert nn.functional.cross_entropy(network(image), labels) < before


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    network = TransUNet(**TINY, attention_dropout_rate=0.5, dropout_rate=0.5)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first, second = (network.transformer(image)[0] for _ in range(2))
        assert not torch.equal(first, second)
        network.eval()
        assert torch.equal(network(image), network(image))
