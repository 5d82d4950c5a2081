"""ParaTransCNN's importers: the published layout, torchvision's ResNet-34, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.checkpoints import load_pretrained, load_published
from medseg.errors import BundleError
from medseg.networks.paratranscnn import ParaTransCNN

TINY: dict[str, Any] = {
    "num_classes": 3,
    "heads": 4,
    "dim": 16,
    "depth": [1, 2, 1],
    "cnn_width": 8,
    "cnn_blocks": [1, 1, 2, 1],
}


def published_shapes(classes: int = 3) -> dict[str, tuple[int, ...]]:
    """The published keys and their shapes for the configuration above, written down from the publication's layout."""
    shapes: dict[str, tuple[int, ...]] = {}

    def weights(name: str, *shape: int, bias: int = 0) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = (bias,)

    def batch_norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    for level, (before, dim, patch, depth) in enumerate(((3, 16, 4, 1), (16, 32, 2, 2), (32, 64, 2, 1)), start=1):
        weights(f"patch_embed_{level}", dim, before, patch, patch, bias=dim)
        for layer in range(depth):
            attention, mlp = f"vit_{level}.net.{2 * layer}.fn", f"vit_{level}.net.{2 * layer + 1}.fn"
            weights(f"{attention}.norm", dim, bias=dim)
            weights(f"{attention}.fn.qkv", 3 * dim, dim)
            weights(f"{attention}.fn.proj", dim, dim, bias=dim)
            weights(f"{mlp}.norm", dim, bias=dim)
            weights(f"{mlp}.fn.net.0", 2 * dim, dim, bias=2 * dim)
            weights(f"{mlp}.fn.net.3", dim, 2 * dim, bias=dim)
    weights("firstconv", 8, 3, 7, 7)
    batch_norm("firstbn", 8)
    for stage, (before, channels, blocks) in enumerate(((8, 8, 1), (8, 16, 1), (16, 32, 2), (32, 64, 1)), start=1):
        for block in range(blocks):
            name = f"encoder{stage}.{block}"
            weights(f"{name}.conv1", channels, channels if block else before, 3, 3)
            batch_norm(f"{name}.bn1", channels)
            weights(f"{name}.conv2", channels, channels, 3, 3)
            batch_norm(f"{name}.bn2", channels)
            if stage > 1 and block == 0:
                weights(f"{name}.downsample.0", channels, before, 1, 1)
                batch_norm(f"{name}.downsample.1", channels)
    for level, (fused, decoded) in enumerate(((128, 128), (64, 128), (32, 96)), start=1):
        weights(f"SE_{level}.fc.0", fused // 16, fused)
        weights(f"SE_{level}.fc.2", fused, fused // 16)
        for number in (1, 3):
            weights(f"decoder{level}.conv{number}", decoded, decoded, 3, 3, bias=decoded)
            batch_norm(f"decoder{level}.norm{number}", decoded)
    weights("up3_1", 128, 64, 2, 2, bias=64)
    weights("up2_1", 128, 64, 2, 2, bias=64)
    weights("up1_1", 96, 16, 4, 4, bias=16)
    weights("out", classes, 16, 1, 1, bias=classes)
    return shapes


def published_state(classes: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        key: torch.rand(shape, generator=draw) + 0.5 if shape else torch.tensor(7)
        for key, shape in published_shapes(classes).items()
    }


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_layout_loads_strictly_and_each_tensor_finds_its_place(prefix: str) -> None:
    state = published_state()
    network = load_published("paratranscnn", TINY, {prefix + key: value for key, value in state.items()})
    assert isinstance(network, ParaTransCNN)
    assert not network.training
    assert torch.equal(network.transformer[1].layers[1].mlp.fc2.weight, state["vit_2.net.3.fn.fn.net.3.weight"])
    assert torch.equal(network.transformer[1].layers[1].mlp_norm.weight, state["vit_2.net.3.fn.norm.weight"])
    assert torch.equal(network.transformer[2].layers[0].attention.proj.bias, state["vit_3.net.0.fn.fn.proj.bias"])
    assert torch.equal(network.cnn.layer3[0].downsample[1].running_var, state["encoder3.0.downsample.1.running_var"])
    assert torch.equal(network.fusion[2].excite.weight, state["SE_3.fc.2.weight"])
    assert torch.equal(network.decoder[1][4].running_mean, state["decoder2.norm3.running_mean"])
    assert torch.equal(network.up[1].weight, state["up2_1.weight"])
    assert torch.equal(network.head.up.weight, state["up1_1.weight"])
    assert network.cnn.bn1.num_batches_tracked == 7


def test_loaded_network_shares_no_tensor_with_the_file() -> None:
    state = published_state()
    network = load_published("paratranscnn", TINY, state)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert state["out.weight"].all()
    assert all(isinstance(module.weight, nn.Parameter) for module in network.modules() if isinstance(module, nn.Linear))


def test_every_difference_of_a_checkpoint_is_in_one_error_under_its_published_name() -> None:
    state = published_state()
    del state["vit_2.net.2.fn.fn.qkv.weight"]
    state["vit_3.net.2.fn.fn.qkv.weight"] = torch.zeros(192, 64)
    state["up1_1.weight"] = torch.zeros(96, 16, 2, 2)
    with pytest.raises(BundleError) as caught:
        load_published("paratranscnn", TINY, state)
    message = str(caught.value)
    assert "does not fit ParaTransCNN" in message
    assert "missing: 1 (vit_2.net.2.fn.fn.qkv.weight)" in message
    assert "unexpected: 1 (vit_3.net.2.fn.fn.qkv.weight)" in message
    assert "up1_1.weight is (96, 16, 2, 2), not (96, 16, 4, 4)" in message


def test_checkpoint_of_another_network_is_refused() -> None:
    with pytest.raises(BundleError, match=r"no key firstconv\.weight"):
        load_published("paratranscnn", TINY, {"decoder.weight": torch.zeros(3)})


@pytest.mark.parametrize("counted", [True, False], ids=["with batch counters", "without, as older files"])
def test_torchvision_resnet34_fills_the_cnn(*, counted: bool) -> None:
    torch.manual_seed(0)
    network = ParaTransCNN(**(TINY | {"cnn_width": 64, "cnn_blocks": [3, 4, 6, 3]}))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    resnet = {key: torch.rand(value.shape) for key, value in network.cnn.state_dict().items() if value.ndim}
    assert sum(value.numel() for key, value in resnet.items() if "running" not in key) == 21_284_672  # without fc
    if counted:
        resnet |= {key: torch.tensor(5) for key, value in network.cnn.state_dict().items() if not value.ndim}
    classifier = {"fc.weight": torch.rand(1000, 512), "fc.bias": torch.rand(1000)}
    report = load_pretrained(network, resnet | classifier)
    after = network.state_dict()
    assert report.unused == ("fc.weight", "fc.bias")
    assert set(report.taken) == {f"cnn.{key}" for key, value in resnet.items() if value.ndim}
    assert all(torch.equal(after[key], resnet[key.removeprefix("cnn.")]) for key in report.taken)
    assert set(report.left) == set(after) - set(report.taken)
    assert all(torch.equal(after[key], before[key]) for key in report.left)


def test_resnet_of_another_width_is_refused_and_changes_nothing() -> None:
    torch.manual_seed(0)
    network, wider = ParaTransCNN(**TINY), ParaTransCNN(**(TINY | {"cnn_width": 16}))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(BundleError, match=r"conv1.weight is \(16, 3, 7, 7\), not \(8, 3, 7, 7\)"):
        load_pretrained(network, wider.cnn.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("layout", ["published", "own"])
def test_other_paratranscnn_gives_all_but_its_head(layout: str) -> None:
    published = published_state(classes=9)
    source = load_published("paratranscnn", TINY | {"num_classes": 9}, published)
    torch.manual_seed(0)
    network = ParaTransCNN(**TINY)
    report = load_pretrained(network, published if layout == "published" else source.state_dict())
    assert report.left == ("head.classify.weight", "head.classify.bias")
    after, theirs = network.state_dict(), source.state_dict()
    assert len(report.taken) == len(after) - 2
    assert all(torch.equal(after[key], theirs[key]) for key in report.taken)
