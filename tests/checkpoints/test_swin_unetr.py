"""Published Swin UNETR checkpoints: layouts, prefixes, the choice of merging, differences, partial starts."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.checkpoints import load_pretrained, load_published
from medseg.checkpoints.state import State
from medseg.errors import BundleError
from medseg.networks import create
from medseg.networks.swin_unetr import merging_of

PLAIN: dict[str, Any] = {"in_channels": 1, "out_channels": 2, "feature_size": 12, "window_size": 4}


def make(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return create("swin_unetr", **{**PLAIN, **config})


def published(*, tables: bool = True, **config: Any) -> dict[str, Tensor]:
    state = make(**config).state_dict()
    return {key: value for key, value in state.items() if tables or not key.endswith("relative_position_index")}


def encoder_file() -> dict[str, Tensor]:
    """The layout of model_swinvit.pt: keys at the root, fc1 and fc2, heads of the pretext tasks."""
    state = {
        key.removeprefix("swinViT.").replace("mlp.linear", "mlp.fc"): value
        for key, value in published().items()
        if key.startswith("swinViT.")
    }
    extra = ("norm.weight", "rotation_head.weight", "contrastive_head.bias", "convTrans3d.weight", "conv.bias")
    return state | {key: torch.ones(3) for key in (*extra, "rotation_pre.x", "contrastive_pre.x")}


def disruptive_file() -> dict[str, Tensor]:
    state = {
        key.replace("swinViT.", "encoder.").replace(".0.", ".0.0.", 1): value
        for key, value in published().items()
        if key.startswith("swinViT.")
    }
    return state | {"encoder.mask_token": torch.ones(1), "encoder.norm.weight": torch.ones(3), "out.x": torch.ones(2)}


@pytest.mark.parametrize(
    "config",
    [
        {"spatial_dims": dims, "use_v2": v2, "in_channels": 3, "window_size": window}
        for dims, v2, window in itertools.product((2, 3), (False, True), (4, 7))
    ],
)
@pytest.mark.parametrize("tables", [True, False])
def test_the_configuration_follows_from_the_tensors(config: dict[str, Any], tables: bool) -> None:
    state = published(tables=tables, **config)
    network = load_published("swin_unetr", {"merging": "current", "img_size": 96}, state)
    assert not network.training
    assert network.state_dict().keys() == make(**config).state_dict().keys()
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "prefix", ["", "module.", "backbone.", "_orig_mod.module.", "module.backbone._orig_mod.", "student.model."]
)
def test_a_prefix_is_stripped_from_every_key(prefix: str) -> None:
    state = {prefix + key: value for key, value in published().items()} | {"loss.weight": torch.ones(1)}
    if not prefix.startswith("student"):
        del state["loss.weight"]
    network = load_published("swin_unetr", {}, state)
    assert torch.equal(network.state_dict()["out.conv.conv.weight"], state[prefix + "out.conv.conv.weight"])


def test_early_names_are_renamed() -> None:
    renamed = {
        key.replace("swinViT.", "swin_vit.").replace(".linear", ".fc"): value for key, value in published().items()
    }
    network = load_published("swin_unetr", {"merging": "legacy"}, renamed)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in published().items())


@pytest.mark.parametrize(("file", "skipped"), [(encoder_file, 7), (disruptive_file, 3)])
def test_an_encoder_only_file_gives_the_encoder_and_its_hidden_states(file: Any, skipped: int) -> None:
    encoder = load_published("swin_unetr", PLAIN, {"state_dict": file()})
    assert merging_of(nn.ModuleDict({"swinViT": encoder})) == "legacy"
    whole = make(merging="legacy")
    report = load_pretrained(whole, {"model": file()})
    assert (len(report.taken), len(report.left)) == (118, 33)
    assert len(report.unused) == skipped + 8
    assert not any(key.startswith("swinViT.") for key in report.left)
    image = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        hidden = encoder(image)
        expected = whole.eval().get_submodule("swinViT")(image)
    assert [tuple(state.shape) for state in hidden] == [
        (1, 12 * 2**level, 32 // 2**level, 16 // 2**level, 16 // 2**level) for level in range(5)
    ]
    assert all(torch.equal(got, want) for got, want in zip(hidden, expected, strict=True))


@pytest.mark.parametrize(
    ("config", "content", "merging", "assumed"),
    [
        ({"merging": "mergingv2"}, {"state_dict": published}, "mergingv2", False),
        ({}, published, "current", True),
        ({}, {"state_dict": published}, "legacy", True),
        ({}, {"model": published}, "current", True),
    ],
)
def test_the_merging_is_the_argument_or_assumed_aloud(
    config: dict[str, Any], content: Any, merging: str, assumed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    state = content() if callable(content) else {name: make_state() for name, make_state in content.items()}
    with caplog.at_level(logging.WARNING):
        network = load_published("swin_unetr", config, state)
    assert merging_of(network) == merging
    assert ("assumed" in caplog.text) == assumed


def test_a_published_file_is_known_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    state = State(published(), source="/weights/swin_unetr.base_5000ep_f48_lr2e-4_pretrained.pt")
    assert merging_of(load_published("swin_unetr", {}, state)) == "legacy"
    assert not caplog.text


def test_what_is_no_single_swin_unetr_is_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(BundleError, match="it is no Swin UNETR checkpoint"):
        load_published("swin_unetr", {}, {"conv.weight": one})
    both = {f"{role}.{key}": value for role in ("student", "teacher") for key, value in published().items()}
    with pytest.raises(BundleError, match=r"several networks in it: student\.swinViT\.patch_embed\.proj\.weight, tea"):
        load_published("swin_unetr", {}, both)
    clash = published() | {"swin_vit.patch_embed.proj.bias": one}
    with pytest.raises(BundleError, match=r"both mean swinViT\.patch_embed\.proj\.bias"):
        load_published("swin_unetr", {}, clash)


def test_differences_are_listed_with_their_likely_cause() -> None:
    state = published()
    del state["out.conv.conv.bias"]
    with pytest.raises(BundleError) as refused:
        load_published("swin_unetr", {"in_channels": 4}, state | {"extra": torch.ones(1)})
    message = str(refused.value)
    assert "missing: 1 (out.conv.conv.bias)" in message
    assert "unexpected: 1 (extra)" in message
    assert "swinViT.patch_embed.proj.weight is (12, 1, 2, 2, 2), not (12, 4, 2, 2, 2)" in message
    assert "the file has in_channels 1, not 4" in message
    with pytest.raises(BundleError, match="another window size"):
        load_published("swin_unetr", {"window_size": 7}, published())


def test_another_head_is_left_and_the_networks_merging_is_kept() -> None:
    network = make(out_channels=5)
    report = load_pretrained(network, {"state_dict": published()})
    assert report.left == ("out.conv.conv.weight", "out.conv.conv.bias")
    assert merging_of(network) == "current"
    assert "build the network with merging='legacy'" in report.notes[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file.pop("layers3.0.blocks.1.attn.proj.bias"), r"missing: 1 \(swinViT\.layers3\.0\.blocks\.1"),
        (lambda file: file.update({"layers5.0.w": torch.ones(1)}), r"unexpected: 1 \(layers5\.0\.w\)"),
    ],
)
def test_an_incomplete_or_foreign_encoder_leaves_the_network_unchanged(change: Any, problem: str) -> None:
    file, network = encoder_file(), make()
    change(file)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(BundleError, match=problem):
        load_pretrained(network, file)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
