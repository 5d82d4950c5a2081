"""D-Former: grouping, padding and masks against loops over tokens; legal sizes; constants; training."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.networks import create
from medseg.networks.dformer import Block, DFormer

TINY: dict[str, Any] = {"num_classes": 3, "embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}


def block(*, group: tuple[int, int, int], interval: int, dilated: bool) -> Block:
    torch.manual_seed(0)
    made = Block(8, 2, group_size=group, interval=interval, dilated=dilated, mlp_ratio=4, qkv_bias=True, drop_path=0)
    nn.init.normal_(made.attn.qkv.bias)  # padded tokens show themselves by the bias alone
    return made.eval()


def attend_token_by_token(made: Block, x: Tensor, *, mask: bool, padded: tuple[int, ...], windows: bool) -> Tensor:
    """Attention of one volume (D, H, W, C), group by group, from the coordinates of the padded grid."""
    grid, group = x.shape[:3], made.group_size
    interval = [n // g for n, g in zip(padded, group, strict=True)]
    groups = defaultdict(list)
    for token in itertools.product(*map(range, padded)):
        edges = group if windows else interval
        groups[tuple(n // e if windows else n % e for n, e in zip(token, edges, strict=True))].append(token)
    result = torch.zeros_like(x)
    for tokens in groups.values():
        real = torch.tensor([all(n < size for n, size in zip(token, grid, strict=True)) for token in tokens])
        inputs = torch.stack([x[token] if ok else torch.zeros(8) for token, ok in zip(tokens, real, strict=True)])
        q, k, v = made.attn.qkv(inputs).view(-1, 3, 2, 4).permute(1, 2, 0, 3)
        logits = q @ k.mT / 2
        if mask:
            logits = logits - 1e6 * ~real
        out = made.attn.proj((logits.softmax(-1) @ v).permute(1, 0, 2).reshape(-1, 8))
        for token, ok, value in zip(tokens, real, out, strict=True):
            if ok:
                result[token] = value
    return result


@pytest.mark.parametrize(
    ("grid", "dilated", "mask", "padded", "windows"),
    [
        pytest.param((4, 8, 12), False, False, (4, 8, 12), True, id="windows"),
        pytest.param((5, 9, 10), False, True, (6, 12, 12), True, id="windows, padded"),
        pytest.param((3, 8, 8), False, True, (4, 8, 8), True, id="windows, depth padded: masked"),
        pytest.param((4, 8, 16), True, False, (4, 8, 16), False, id="dilated"),
        pytest.param((4, 10, 16), True, True, (4, 12, 16), False, id="dilated, height padded"),
        pytest.param((6, 8, 16), True, False, (8, 8, 16), False, id="dilated, depth padded: not masked"),
    ],
)
def test_attention_equals_loops_over_tokens(
    grid: tuple[int, int, int], dilated: bool, mask: bool, padded: tuple[int, ...], windows: bool
) -> None:
    made = block(group=(2, 4, 4), interval=4, dilated=dilated)
    x = torch.randn(2, *grid, 8)
    with torch.no_grad():
        expected = torch.stack(
            [attend_token_by_token(made, one, mask=mask, padded=padded, windows=windows) for one in x]
        )
        torch.testing.assert_close(made.attend(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dilated", [False, True])
def test_a_grid_lower_than_a_group_is_one_group_whatever_the_scope(dilated: bool) -> None:
    made = block(group=(2, 4, 4), interval=4, dilated=dilated)
    x = torch.randn(1, 3, 3, 5, 8)
    with torch.no_grad():
        expected = made.attn(x.reshape(1, 45, 8), None).reshape(x.shape)
        torch.testing.assert_close(made.attend(x), expected)


def test_a_small_input_does_not_change_what_a_large_one_gives() -> None:
    torch.manual_seed(0)
    network = create("dformer", **TINY, deep_supervision=False).eval()
    large = torch.randn(1, 1, 16, 64, 64)
    with torch.no_grad():
        before = network(large)
        network(torch.randn(1, 1, 16, 32, 32))
        assert torch.equal(network(large), before)


def sized(group: tuple[int, int, int]) -> DFormer:
    return DFormer(1, **TINY, group_size=group)


def legal(network: DFormer, *size: int) -> bool:
    try:
        network.check_roi_size(size)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("group", "planes", "depths", "wide"),
    [
        (
            (2, 8, 8),
            [32, 64, 96, 128, 160, 192, 256, 288, 320, 384, 512],
            [32, 48, 64, 96, 128, 160, 192, 224, 256],
            256,
        ),
        ((2, 7, 7), [32, 64, 96, 128, 160, 192, 224, 448], [32, 48, 64, 96, 128, 160, 192, 224, 256], 224),
    ],
)
def test_the_legal_sizes_are_those_of_the_published_network(
    group: tuple[int, int, int], planes: list[int], depths: list[int], wide: int
) -> None:
    network = sized(group)
    assert [n for n in range(1, 513) if legal(network, 32, n, n)] == planes
    assert [n for n in range(1, 257) if legal(network, n, wide, wide)] == depths
    assert [n for n in range(1, 257) if legal(network, n, 64, 64)] == list(range(16, 257, 16))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((24, 64, 64), "depth must be a positive multiple of 16, got 24"),
        ((16, 64, 40), "width must be a positive multiple of 32, got 40"),
        ((32, 224, 224), "height 224 gives 28 tokens at level 1, which do not divide into dilated groups of 8"),
        ((80, 288, 288), "depth 80 gives 5 tokens at level 3"),
        ((80, 288, 96), "width 96 gives 6 tokens at level 2"),
    ],
)
def test_an_illegal_size_is_refused_with_axis_value_and_rule(size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sized((2, 8, 8))(torch.zeros(1, 1, *size))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 2, 16, 32, 32), "must have 1 channels, got 2"), ((1, 1, 32, 32), r"5 axes .* got shape \(1, 1, 32, 32\)")],
)
def test_an_image_of_another_kind_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sized((2, 8, 8))(torch.zeros(shape))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_classes": 0}, "num_classes must be 1 or more, got 0"),
        ({"num_heads": (3, 2, 2, 4)}, "level 0 has 8 channels, not a multiple of 3 heads"),
        ({"depths": (2, 2, 2)}, "depths must be 4 positive numbers"),
        ({"group_size": (2, 0, 8)}, "group_size must be 3 positive numbers"),
        ({"drop_path": 1.0}, "drop_path must be from 0 to below 1, got 1.0"),
    ],
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("dformer", **{**TINY, **wrong})


def test_constants_are_the_published_ones() -> None:
    modules = list(sized((2, 8, 8)).modules())
    assert {module.eps for module in modules if isinstance(module, nn.LayerNorm)} == {1e-5}
    assert {module.approximate for module in modules if isinstance(module, nn.GELU)} == {"none"}


def test_the_default_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = DFormer()
    assert sum(parameter.numel() for parameter in network.parameters()) == 50_557_248


def test_without_deep_supervision_the_full_logits_are_the_same() -> None:
    torch.manual_seed(0)
    both = create("dformer", **TINY).eval()
    one = create("dformer", **TINY, deep_supervision=False).eval()
    one.load_state_dict(both.state_dict())
    image = torch.randn(1, 1, 16, 64, 96)
    with torch.no_grad():
        full, half = both(image)
        assert torch.equal(one(image), full)
    assert half.shape == (1, 3, 8, 32, 48)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_one_training_step_reaches_every_parameter_that_is_computed(use_checkpoint: bool) -> None:
    torch.manual_seed(0)
    network = create("dformer", **TINY, drop_path=0.1, use_checkpoint=use_checkpoint)
    full, half = network(torch.randn(2, 1, 16, 64, 64))
    (full.square().mean() + half.square().mean()).backward()
    idle = {name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()}
    assert idle == {name for name, value in network.named_parameters() if name.startswith("final.2.")}
    assert not any(value.requires_grad for name, value in network.named_parameters() if name in idle)
