"""nnU-Net's networks: the function and the state dict of dynamic_network_architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg.checkpoints import load_pretrained, load_published
from medseg.errors import BundleError
from medseg.networks import create

DEPTHS = {"plain_conv_unet": "n_conv_per_stage", "resenc_unet": "n_blocks_per_stage"}
CLASSES = {"plain_conv_unet": "PlainConvUNet", "resenc_unet": "ResidualEncoderUNet"}


def anisotropic(name: str, spatial_dims: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a network of three levels whose first axis is spared at the upper two."""
    return {
        "in_channels": 2,
        "out_channels": 3,
        "spatial_dims": spatial_dims,
        "features_per_stage": [4, 6, 6],
        "kernel_sizes": [[1, 3, 3][-spatial_dims:], 3, 3],
        "strides": [1, [1, 2, 2][-spatial_dims:], 2],
        DEPTHS[name]: [1, 2, 3],
        "n_conv_per_stage_decoder": [1, 2],
        **changes,
    }


def theirs(name: str, spatial_dims: int, *, deep_supervision: bool) -> nn.Module:
    """The same network of the published package, with random weights."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet", reason="nnU-Net is not installed")
    conv, norm = (nn.Conv3d, nn.InstanceNorm3d) if spatial_dims == 3 else (nn.Conv2d, nn.InstanceNorm2d)
    network: nn.Module = getattr(unet, CLASSES[name])(
        2, 3, [4, 6, 6], conv, [[1, 3, 3][-spatial_dims:], [3] * spatial_dims, [3] * spatial_dims],
        [[1] * spatial_dims, [1, 2, 2][-spatial_dims:], [2] * spatial_dims], [1, 2, 3], 3, [1, 2],
        conv_bias=True, norm_op=norm, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=deep_supervision,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network


@pytest.mark.parametrize("spatial_dims", [3, 2])
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_it_is_nnunets_network_and_its_state_dict_loads(name: str, spatial_dims: int) -> None:
    published = theirs(name, spatial_dims, deep_supervision=True)
    ours = load_published(name, anisotropic(name, spatial_dims, deep_supervision=True), published.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in published.parameters())
    image = torch.randn(1, 2, *(6, 16, 12)[-spatial_dims:])
    with torch.no_grad():
        found, wanted = ours(image), published(image)
        assert torch.equal(found, wanted[0])
        every = ours.train()(image)
    assert torch.equal(every[0], wanted[0])
    assert len(every) == len(wanted)
    assert torch.equal(every[1][..., ::2, ::2], wanted[1]), "the coarser level, stretched"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_second_names_of_a_published_state_dict_are_left_out(name: str) -> None:
    config = anisotropic(name, 3)
    torch.manual_seed(1)
    network = create(name, **config)
    state = network.state_dict()
    assert not any("all_modules" in key or "decoder.encoder" in key for key in state)
    doubled = {f"module.{key}": value for key, value in state.items()}
    for key, value in state.items():
        if ".conv." in key:
            doubled["module." + key.replace(".conv.", ".all_modules.0.")] = value
        if key.startswith("encoder."):
            doubled[f"module.decoder.{key}"] = value
    loaded = load_published(name, config, {"network_weights": doubled, "epoch": 3})
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_another_architecture_s_state_dict_is_refused_by_its_keys() -> None:
    plain = create("plain_conv_unet", **anisotropic("plain_conv_unet", 3)).state_dict()
    with pytest.raises(BundleError, match="does not fit ResidualEncoderUNet"):
        load_published("resenc_unet", anisotropic("resenc_unet", 3), plain)


def test_a_start_with_other_classes_takes_all_but_the_outputs() -> None:
    source = create("resenc_unet", **anisotropic("resenc_unet", 3))
    ours = create("resenc_unet", **anisotropic("resenc_unet", 3, out_channels=7))
    report = load_pretrained(ours, source.state_dict())
    assert torch.equal(ours.encoder.stem.convs[0].conv.weight, source.encoder.stem.convs[0].conv.weight)
    assert report.left
    assert all(key.startswith("decoder.seg_layers.") for key in report.left)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"strides": [1, 2]}, "3 levels of features, 3 kernels, 2 strides"),
        ({"strides": [1, [2, 2], 2]}, "no kernel or stride of 3 axes"),
        ({"n_conv_per_stage_decoder": [1]}, "1 depths of the decoder for 2 levels"),
        ({"norm": "group"}, "no 'group' norm"),
    ],
)
def test_what_is_no_network_is_refused(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        create("plain_conv_unet", **anisotropic("plain_conv_unet", 3, **config))


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((1, 2, 6, 16, 10), r"multiple of \(2, 4, 4\)"),
        ((1, 1, 6, 16, 12), "2 channels"),
        ((1, 2, 16, 12), "3 axes"),
        ((1, 2, 2, 4, 4), "larger"),
    ],
)
def test_an_image_it_cannot_take_is_refused(shape: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        create("plain_conv_unet", **anisotropic("plain_conv_unet", 3))(torch.zeros(shape))
