"""Swin UNETR: MONAI's function, the three patch mergings, legal inputs, constants, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
from torch import nn

from medseg.networks import create
from medseg.networks.swin_unetr import LegacyPatchMerging, check_roi_size, merging_of


def tiny(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return create("swin_unetr", **{"in_channels": 1, "out_channels": 2, "feature_size": 12, **config}).eval()


@pytest.mark.parametrize(("merging", "downsample"), [("current", "merging"), ("mergingv2", "mergingv2")])
@pytest.mark.parametrize(("spatial_dims", "use_v2", "window_size"), [(3, True, 4), (2, False, 7)])
def test_it_is_monais_network(merging: str, downsample: str, spatial_dims: int, use_v2: bool, window_size: int) -> None:
    config = {"feature_size": 12, "spatial_dims": spatial_dims, "use_v2": use_v2, "window_size": window_size}
    ours = tiny(merging=merging, use_flash_attention=False, **config)
    theirs = MonaiSwinUNETR(1, 2, downsample=downsample, **config).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, 1, *(64, 32, 32)[:spatial_dims])
    with torch.no_grad():
        assert torch.equal(ours(image), theirs(image))


def test_fused_attention_gives_the_same_logits() -> None:
    plain, fused = tiny(use_flash_attention=False, window_size=4), tiny(window_size=4)
    image = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused(image), plain(image), rtol=1e-4, atol=1e-5)


def test_legacy_merging_takes_two_sub_grids_twice_and_two_never() -> None:
    layer = LegacyPatchMerging(1, spatial_dims=3)
    seen = []
    layer.norm.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    d, h, w = torch.meshgrid(torch.arange(2.0), torch.arange(2.0), torch.arange(2.0), indexing="ij")
    layer((100 * d + 10 * h + w)[None, ..., None])
    assert seen[0].flatten().tolist() == [0, 100, 10, 1, 101, 10, 1, 111]


@pytest.mark.parametrize(("spatial_dims", "same"), [(2, True), (3, False)])
def test_the_mergings_differ_in_3d_and_agree_in_2d(spatial_dims: int, same: bool) -> None:
    image = torch.randn(1, 1, *(64, 32, 32)[:spatial_dims])
    networks = [
        tiny(merging=name, spatial_dims=spatial_dims, window_size=4) for name in ("current", "mergingv2", "legacy")
    ]
    with torch.no_grad():
        first, second, third = (network(image) for network in networks)
    assert [merging_of(network) for network in networks] == ["current", "mergingv2", "legacy"]
    assert torch.equal(first, second) == torch.equal(second, third) == torch.equal(first, third) == same


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((64, 48, 64), "height must be a positive multiple of 32, got 48"),
        ((64, 64, 0), "width must be a positive multiple of 32, got 0"),
        ((32, 32, 32), r"at least one of depth, height, width must be 64 or more, got \(32, 32, 32\)"),
        ((32, 32), r"at least one of height, width must be 64 or more"),
    ],
)
def test_an_illegal_size_is_refused_with_axis_value_and_rule(size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_roi_size(size)
    network = tiny(spatial_dims=len(size))
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(1, 1, *size))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 64, 64, 64), "must have 1 channels, got 3"), ((1, 1, 64, 64), "must have 5 axes")],
)
def test_an_image_of_another_kind_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"feature_size": 20}, "feature_size must be a positive multiple of 12, got 20"),
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
        ({"merging": "old"}, "merging must be one of current, mergingv2, legacy, got 'old'"),
        ({"in_channels": 0}, "in_channels must be 1 or more, got 0"),
        ({"num_heads": (5, 6, 12, 24)}, "stage 0 has 12 channels, not a multiple of 5 heads"),
        ({"depths": (2, 2)}, "depths must be four positive numbers"),
        ({"window_size": (7, 7)}, "window_size must be 2 or more, one number or 3 of them"),
        ({"img_size": 96}, "swin_unetr: .*img_size"),
    ],
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**wrong)


@pytest.mark.parametrize(
    ("feature_size", "use_v2", "parameters", "entries"),
    [(12, False, 4_078_220, 159), (24, True, 18_347_144, 167)],
)
def test_the_numbers_of_parameters_are_the_published_ones(
    feature_size: int, use_v2: bool, parameters: int, entries: int
) -> None:
    network = tiny(out_channels=14, feature_size=feature_size, use_v2=use_v2)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == entries


def test_constants_are_the_published_ones() -> None:
    modules = list(tiny().modules())
    assert {module.eps for module in modules if isinstance(module, nn.LayerNorm | nn.InstanceNorm3d)} == {1e-5}
    assert {module.approximate for module in modules if isinstance(module, nn.GELU)} == {"none"}
    assert {module.negative_slope for module in modules if isinstance(module, nn.LeakyReLU)} == {0.01}


@pytest.mark.parametrize("merging", ["current", "legacy"])
def test_one_training_step_reaches_every_parameter(merging: str) -> None:
    network = tiny(merging=merging, window_size=4, use_v2=True).train()
    logits = network(torch.randn(2, 1, 64, 32, 32))
    nn.functional.cross_entropy(logits, torch.randint(0, 2, (2, 64, 32, 32))).backward()
    assert [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()] == []
