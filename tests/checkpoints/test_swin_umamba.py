"""Published Swin-UMamba checkpoints load completely or not at all; VMamba starts the encoder as published."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.checkpoints import load_pretrained, load_published
from medseg.errors import BundleError
from medseg.networks import create

SHARED: dict[str, Any] = {"in_channels": 1, "out_channels": 3, "encoder_depths": (1, 1, 2, 1), "d_state": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "swin_umamba": {
        **SHARED,
        "feature_sizes": (4, 8, 16, 32, 64),
        "hidden_size": 64,
        "encoder_dims": (8, 16, 32, 64),
    },
    "swin_umamba_d": {**SHARED, "dims": (8, 16, 32, 64), "decoder_depths": (1, 2, 1)},
}
HEADS = {"swin_umamba": "out_layers.", "swin_umamba_d": "decoder.seg_layers."}


def build(architecture: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return create(architecture, **{**CONFIGS[architecture], **changes})


def random_state(network: nn.Module) -> dict[str, Tensor]:
    """A state dict of the network's shapes and values that the network does not have."""
    generator = torch.Generator().manual_seed(5)
    return {key: torch.randn(value.shape, generator=generator) for key, value in network.state_dict().items()}


def vmamba_state(in_channels: int = 3) -> dict[str, Tensor]:
    """The keys of VMamba-tiny, for the small encoder: classifier on top, downsampling inside the layers."""
    state = random_state(build("swin_umamba_d", in_channels=in_channels))
    encoder = {
        re.sub(r"^downsamples\.(\d)\.", r"layers.\1.downsample.", key.removeprefix("vssm_encoder.")): value
        for key, value in state.items()
        if key.startswith("vssm_encoder.")
    }
    classifier = {"norm.weight": (64,), "norm.bias": (64,), "head.weight": (1000, 64), "head.bias": (1000,)}
    return {**encoder, **{key: torch.randn(shape) for key, shape in classifier.items()}}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_nnunet_s_checkpoint_loads_whole_and_tells_the_configuration(architecture: str) -> None:
    state = random_state(build(architecture))
    weights = {f"module.{key}": value.numpy() for key, value in state.items()}
    checkpoint = {"network_weights": weights, "trainer_name": "nnUNetTrainer", "current_epoch": 99}

    network = load_published(architecture, {"deep_supervision": False}, checkpoint)

    assert not network.training
    loaded = network.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_difference_is_named_in_one_error(architecture: str) -> None:
    state = random_state(build(architecture))
    missing = "vssm_encoder.downsamples.1.norm.bias"
    del state[missing]
    state["vssm_encoder.norm.weight"] = torch.zeros(64)
    misshapen = "vssm_encoder.layers.2.blocks.1.self_attention.Ds"
    state[misshapen] = state[misshapen][:-1]

    with pytest.raises(BundleError) as caught:
        load_published(architecture, CONFIGS[architecture], state)

    for part in (missing, "vssm_encoder.norm.weight", f"{misshapen} is (255,), not (256,)"):
        assert part in str(caught.value)


def test_the_other_network_s_checkpoint_is_refused() -> None:
    state = random_state(build("swin_umamba_d"))
    with pytest.raises(BundleError, match=r"missing: .*stem\.0\.weight.*unexpected"):
        load_published("swin_umamba", CONFIGS["swin_umamba"], state)


def test_vmamba_starts_swin_umamba_without_its_patches_but_with_their_bias() -> None:
    """The published list of keys to drop forgets the bias of the patch embedding's norm."""
    network, vmamba = build("swin_umamba"), vmamba_state()
    before = {key: value.clone() for key, value in network.state_dict().items()}

    report = load_pretrained(network, {"model": vmamba})

    after = network.state_dict()
    untouched = {"proj.weight", "proj.bias", "norm.weight"}
    expected = {
        key
        for key in after
        if key.startswith("vssm_encoder.") and key.removeprefix("vssm_encoder.patch_embed.") not in untouched
    }
    assert set(report.taken) == expected
    assert set(report.left) == after.keys() - expected
    assert "vssm_encoder.patch_embed.norm.bias" in expected
    assert set(report.unused) == {
        "norm.weight", "norm.bias", "head.weight", "head.bias",
        *(f"patch_embed.{key}" for key in untouched),
    }  # fmt: skip
    assert torch.equal(after["vssm_encoder.downsamples.2.norm.bias"], vmamba["layers.2.downsample.norm.bias"])
    for key in report.taken:
        if "downsamples" not in key:
            assert torch.equal(after[key], vmamba[key.removeprefix("vssm_encoder.")]), key
    assert all(torch.equal(after[key], before[key]) for key in report.left)


@pytest.mark.parametrize(("in_channels", "taken"), [(1, False), (3, True)])
def test_vmamba_s_patches_start_swin_umamba_d_where_the_image_is_in_colour(in_channels: int, taken: bool) -> None:
    report = load_pretrained(build("swin_umamba_d", in_channels=in_channels), vmamba_state())
    patches = {f"vssm_encoder.patch_embed.{key}" for key in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")}
    assert patches <= set(report.taken if taken else report.left)
    assert all(key.startswith("decoder.") for key in set(report.left) - patches)


def test_vmamba_s_further_blocks_are_ignored_and_said() -> None:
    vmamba = vmamba_state()
    vmamba["layers.0.blocks.7.ln_1.weight"] = torch.zeros(8)
    report = load_pretrained(build("swin_umamba"), vmamba)
    assert "vssm_encoder.layers.0.blocks.7.ln_1.weight" in report.unused
    assert any("ignored" in note for note in report.notes)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("layers.0.blocks.0.ln_1.weight", r"vssm_encoder\.layers\.0\.blocks\.0\.ln_1\.weight is \(9,\), not \(8,\)"),
        ("layers.3.downsample.norm.weight", r"has no vssm_encoder\.downsamples\.3\.norm\.weight"),
    ],
)
def test_a_vmamba_of_another_size_is_refused_and_changes_nothing(architecture: str, key: str, message: str) -> None:
    network = build(architecture)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(BundleError, match=message):
        load_pretrained(network, {**vmamba_state(), key: torch.zeros(9)})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_checkpoint_for_other_classes_gives_everything_but_the_heads(architecture: str) -> None:
    state = random_state(build(architecture, out_channels=7))
    network = build(architecture)
    report = load_pretrained(network, {"network_weights": state})
    assert report.left
    assert all(key.startswith(HEADS[architecture]) for key in report.left)
    assert set(report.taken) | set(report.left) == network.state_dict().keys()
    assert all(torch.equal(network.state_dict()[key], state[key]) for key in report.taken)
