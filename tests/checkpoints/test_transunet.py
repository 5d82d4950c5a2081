"""TransUNet's importers: trained checkpoints, Google's ImageNet files, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import zoom
from torch import Tensor

from medseg.checkpoints import load_pretrained, load_published
from medseg.errors import BundleError
from medseg.networks.transunet import TransUNet

POSITIONS = "transformer.embeddings.position_embeddings"
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
HYBRID = TINY | {"grid": [4, 4], "resnet_num_layers": [1, 2, 1], "resnet_width_factor": 0.5}


def trained(config: dict[str, Any], seed: int = 1) -> TransUNet:
    torch.manual_seed(seed)
    network = TransUNet(**config)
    with torch.no_grad():
        network.state_dict()[POSITIONS].normal_()
    return network.eval()


def imagenet_file(*, hybrid: bool, side: int, heads: int = 3, layers: int = 2) -> dict[str, NDArray[np.float32]]:
    """Random values under the names and shapes of Google's files, for hidden size 48, CNN width 32, units 1, 2, 1."""
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, 48),
        "embedding/kernel": (1, 1, 512, 48) if hybrid else (16, 16, 3, 48),
        "embedding/bias": (48,),
        "Transformer/posembed_input/pos_embedding": (1, 1 + side**2, 48),
        "Transformer/encoder_norm/scale": (48,),
        "Transformer/encoder_norm/bias": (48,),
        "head/kernel": (48, 5),
        "head/bias": (5,),
    }
    for layer in range(layers):
        block = f"Transformer/encoderblock_{layer}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}{norm}/scale": (48,), f"{block}{norm}/bias": (48,)}
        for part in ("query", "key", "value"):
            attention = f"{block}MultiHeadDotProductAttention_1/{part}/"
            shapes |= {f"{attention}kernel": (48, heads, 48 // heads), f"{attention}bias": (heads, 48 // heads)}
        shapes |= {f"{block}MultiHeadDotProductAttention_1/out/kernel": (heads, 48 // heads, 48)}
        shapes |= {f"{block}MultiHeadDotProductAttention_1/out/bias": (48,)}
        shapes |= {f"{block}MlpBlock_3/Dense_0/kernel": (48, 96), f"{block}MlpBlock_3/Dense_0/bias": (96,)}
        shapes |= {f"{block}MlpBlock_3/Dense_1/kernel": (96, 48), f"{block}MlpBlock_3/Dense_1/bias": (48,)}
    if hybrid:
        shapes |= {"conv_root/kernel": (7, 7, 3, 32), "gn_root/scale": (1, 1, 1, 32), "gn_root/bias": (32,)}
        for block, units, before, mid in ((1, 1, 32, 32), (2, 2, 128, 64), (3, 1, 256, 128)):
            for unit in range(1, units + 1):
                inside = before if unit == 1 else 4 * mid
                name = f"block{block}/unit{unit}/"
                for number, conv in enumerate(((1, 1, inside, mid), (3, 3, mid, mid), (1, 1, mid, 4 * mid)), start=1):
                    shapes[f"{name}conv{number}/kernel"] = conv
                    shapes |= {f"{name}gn{number}/{kind}": (1, 1, 1, conv[-1]) for kind in ("scale", "bias")}
            shapes[f"block{block}/unit1/conv_proj/kernel"] = (1, 1, before, 4 * mid)
            shapes |= {f"block{block}/unit1/gn_proj/{kind}": (1, 1, 1, 4 * mid) for kind in ("scale", "bias")}
    return {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("config", [TINY, HYBRID], ids=["vit", "hybrid"])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_trained_checkpoint_gives_the_same_network(config: dict[str, Any], prefix: str) -> None:
    network = trained(config)
    state = {prefix + key: value for key, value in network.state_dict().items()}
    loaded = load_published("transunet", config, state)
    image = torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        assert not loaded.training
        assert torch.equal(loaded(image), network(image))


def test_every_difference_of_a_checkpoint_is_in_one_error() -> None:
    state = dict(trained(HYBRID).state_dict())
    del state["transformer.encoder.layer.1.attn.out.bias"]
    state["transformer.encoder.layer.2.attn.out.bias"] = torch.zeros(48)
    state["segmentation_head.0.weight"] = torch.zeros(9, 16, 3, 3)
    with pytest.raises(BundleError) as caught:
        load_published("transunet", HYBRID, state)
    message = str(caught.value)
    assert "missing: 1 (transformer.encoder.layer.1.attn.out.bias)" in message
    assert "unexpected: 1 (transformer.encoder.layer.2.attn.out.bias)" in message
    assert "segmentation_head.0.weight is (9, 16, 3, 3), not (3, 16, 3, 3)" in message


def test_imagenet_file_is_no_trained_model() -> None:
    with pytest.raises(BundleError, match="without decoder and head"):
        load_published("transunet", HYBRID, imagenet_file(hybrid=True, side=4))


def test_imagenet_file_fills_the_transformer_and_leaves_the_rest(tmp_path: Path) -> None:
    content = imagenet_file(hybrid=True, side=14)
    np.savez(tmp_path / "R50+ViT.npz", **content)
    network = trained(HYBRID)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    report = load_pretrained(network, tmp_path / "R50+ViT.npz")
    after: dict[str, Tensor] = network.state_dict()

    kernel = content["block2/unit2/conv2/kernel"]
    conv = after["transformer.embeddings.hybrid_model.body.block2.unit2.conv2.weight"]
    assert conv[5, 7, 0, 2] == kernel[0, 2, 7, 5]
    projection = after["transformer.embeddings.hybrid_model.body.block3.unit1.downsample.weight"]
    assert projection[500, 200, 0, 0] == content["block3/unit1/conv_proj/kernel"][0, 0, 200, 500]
    query = after["transformer.encoder.layer.1.attn.query.weight"]
    attention = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/"
    assert query[16 * 2 + 3, 40] == content[attention + "query/kernel"][40, 2, 3]
    assert after["transformer.encoder.layer.1.attn.value.bias"][16 + 3] == content[attention + "value/bias"][1, 3]
    out = after["transformer.encoder.layer.1.attn.out.weight"]
    assert out[40, 16 * 2 + 3] == content[attention + "out/kernel"][2, 3, 40]
    dense = content["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"]
    assert after["transformer.encoder.layer.0.ffn.fc1.weight"][90, 40] == dense[40, 90]
    scale = content["block1/unit1/gn_proj/scale"].ravel()
    assert np.array_equal(after["transformer.embeddings.hybrid_model.body.block1.unit1.gn_proj.weight"], scale)

    grid = content["Transformer/posembed_input/pos_embedding"][0, 1:].reshape(14, 14, 48)
    expected = zoom(grid, (4 / 14, 4 / 14, 1), order=1).reshape(1, 16, 48)
    np.testing.assert_allclose(after[POSITIONS], expected, rtol=0, atol=1e-7)

    inside = {key for key in before if key.startswith("transformer.")}
    assert set(report.taken) == inside - {POSITIONS}
    assert report.adapted == (f"{POSITIONS}: class token dropped, interpolated from 14 x 14 to 4 x 4",)
    assert set(report.left) == set(before) - inside
    assert set(report.unused) == {"cls", "head/kernel", "head/bias"}
    assert all(torch.equal(after[key], before[key]) for key in report.left)
    assert not any(torch.equal(after[key], before[key]) for key in inside)


def test_imagenet_positions_of_the_same_grid_are_copied_without_the_class_token() -> None:
    content = imagenet_file(hybrid=False, side=4)
    positions = content["Transformer/posembed_input/pos_embedding"]
    network = trained(TINY)
    load_pretrained(network, content)
    assert np.array_equal(network.state_dict()[POSITIONS], positions[:, 1:])

    content["Transformer/posembed_input/pos_embedding"] = positions[:, :16]  # a file without class token
    load_pretrained(network, content)
    assert np.array_equal(network.state_dict()[POSITIONS], positions[:, :16])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, r"query/kernel is \(48, 4, 12\), not \(48, 3, 16\)"),
        ({"layers": 3}, "unexpected: 16 .*encoderblock_2/"),
        ({"layers": 1}, "missing: 16 .*encoderblock_1/"),
        (
            {"hybrid": False},
            r"missing: .*conv_root/kernel.*embedding/kernel is \(16, 16, 3, 48\), not \(1, 1, 512, 48\)",
        ),
    ],
    ids=["heads", "deeper", "shallower", "without CNN"],
)
def test_imagenet_file_for_another_network_is_refused_and_changes_nothing(
    options: dict[str, Any], message: str
) -> None:
    network = trained(HYBRID)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(BundleError, match=message):
        load_pretrained(network, imagenet_file(**({"hybrid": True, "side": 4} | options)))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_other_transunet_gives_all_but_its_head_and_its_positions_are_interpolated() -> None:
    source = trained(HYBRID | {"img_size": 96, "grid": [6, 6], "num_classes": 9}, seed=2)
    network = trained(HYBRID)
    head = network.state_dict()["segmentation_head.0.weight"].clone()
    report = load_pretrained(network, {"state_dict": source.state_dict()})
    assert report.left == ("segmentation_head.0.weight", "segmentation_head.0.bias")
    assert report.adapted == (f"{POSITIONS}: interpolated from 6 x 6 to 4 x 4",)
    after, theirs = network.state_dict(), source.state_dict()
    assert torch.equal(after["segmentation_head.0.weight"], head)
    assert all(torch.equal(after[key], theirs[key]) for key in report.taken)
    assert torch.equal(after[POSITIONS][0, [0, 3, 12, 15]], theirs[POSITIONS][0, [0, 5, 30, 35]])  # the corners


def test_other_transunet_of_another_width_is_refused() -> None:
    source = trained(HYBRID | {"mlp_dim": 128})
    with pytest.raises(BundleError, match=r"fc1.weight is \(128, 48\), not \(96, 48\)"):
        load_pretrained(trained(HYBRID), source.state_dict())
