"""Swin-UMamba and the visual state space blocks that it shares with Swin-UMamba-D."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks import create
from medseg.networks.layers.selective_scan import selective_scan
from medseg.networks.layers.vss import SS2D, PatchMerging, VSSBlock
from medseg.networks.swin_umamba import SwinUMamba

SMALL: dict[str, Any] = {
    "in_channels": 2,
    "out_channels": 3,
    "feature_sizes": (4, 8, 16, 32, 64),
    "hidden_size": 64,
    "encoder_depths": (1, 1, 2, 1),
    "encoder_dims": (8, 16, 32, 64),
    "d_state": 4,
}


def test_the_defaults_are_the_paper_s_network_for_abdomen_mri() -> None:
    with torch.device("meta"):
        network = SwinUMamba()
        outputs = network(torch.empty(1, 1, 320, 320))
    assert sum(parameter.numel() for parameter in network.parameters()) == 59_889_368
    assert [tuple(output.shape) for output in outputs] == [(1, 14, n, n) for n in (320, 160, 80, 40)]


def test_one_training_step_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    network = SwinUMamba(**SMALL).train()
    for output in network(torch.randn(2, 2, 64, 32)):
        target = torch.randint(0, 3, (2, *output.shape[2:]))
        F.cross_entropy(output, target).backward(retain_graph=True)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_without_deep_supervision_the_output_is_the_first_of_the_same_network() -> None:
    network = SwinUMamba(**SMALL).eval()
    single = SwinUMamba(**SMALL, deep_supervision=False).eval()
    single.load_state_dict(network.state_dict())
    image = torch.randn(1, 2, 32, 64)
    with torch.no_grad():
        outputs, logits = network(image), single(image)
    assert isinstance(outputs, tuple)
    assert torch.equal(logits, outputs[0])


def test_constants_that_the_golden_cases_cannot_see() -> None:
    network = SwinUMamba(**{**SMALL, "encoder_depths": (2, 2, 9, 2)})
    for name, module in network.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5, name
        if isinstance(module, nn.GroupNorm):  # one channel a group: instance norm
            assert (module.eps, module.num_groups) == (1e-5, module.num_channels), name
            assert module.affine == (name == "stem.1"), name
        if isinstance(module, nn.LeakyReLU):
            assert module.negative_slope == 0.01, name
    assert not any(isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d) for module in network.modules())
    rates = [module.drop_path.drop_prob for module in network.modules() if isinstance(module, VSSBlock)]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.2, 15))


def test_the_scan_parameters_start_as_published() -> None:
    torch.manual_seed(0)
    scan = SwinUMamba(**SMALL).vssm_encoder.layers[2].blocks[1].self_attention
    torch.testing.assert_close(scan.A_logs.exp(), torch.arange(1.0, 5).expand(4 * 64, 4))
    assert (scan.Ds == 1).all()
    steps = F.softplus(scan.dt_projs_bias.detach())
    assert steps.min() >= 1e-3 * (1 - 1e-4)
    assert steps.max() <= 0.1 * (1 + 1e-4)
    assert abs(float(steps.log().mean()) - (math.log(1e-3) + math.log(0.1)) / 2) < 0.3
    assert 0.9 * 64**-0.5 < float(scan.x_proj_weight.detach().abs().max()) <= 64**-0.5
    assert 0.9 * 2**-0.5 < float(scan.dt_projs_weight.detach().abs().max()) <= 2**-0.5
    assert abs(float(scan.in_proj.weight.detach().std()) - 0.02) < 0.002


def test_the_two_dimensional_scan_is_four_sequences_merged() -> None:
    """Against the published formulation: four copies of the image, transposed and reversed, scanned in float64."""
    torch.manual_seed(0)
    block = SS2D(6, d_state=3).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        image = torch.randn(2, 5, 7, 6, dtype=torch.float64)
        x, gate = block.in_proj(image).split(12, dim=-1)
        x = F.silu(F.conv2d(x.permute(0, 3, 1, 2), block.conv2d.weight, block.conv2d.bias, padding=1, groups=12))
        rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
        sequences = torch.stack([rows, columns, rows.flip(2), columns.flip(2)], 1)
        projected = torch.einsum("kpe,bkel->bkpl", block.x_proj_weight, sequences)
        dt_low, b, c = projected.split([1, 3, 3], dim=2)
        dt = torch.einsum("ker,bkrl->bkel", block.dt_projs_weight, dt_low)
        y = selective_scan(
            sequences.flatten(1, 2), dt.flatten(1, 2), -block.A_logs.exp(), b, c, block.Ds,
            block.dt_projs_bias.flatten(), backend="loop",
        ).unflatten(1, (4, 12))  # fmt: skip

        def untransposed(z: Tensor) -> Tensor:
            return z.unflatten(2, (7, 5)).transpose(2, 3).flatten(2)

        y = y[:, 0] + y[:, 2].flip(2) + untransposed(y[:, 1]) + untransposed(y[:, 3].flip(2))
        y = F.layer_norm(y.transpose(1, 2), (12,), block.out_norm.weight, block.out_norm.bias, eps=1e-5)
        expected = F.linear(y.unflatten(1, (5, 7)) * F.silu(gate), block.out_proj.weight)
        torch.testing.assert_close(block(image), expected, rtol=1e-6, atol=1e-7)  # the rates go through float32


def test_an_exported_block_needs_no_compiled_kernel() -> None:
    block, image = SS2D(4, d_state=2).eval(), torch.randn(1, 6, 5, 4)
    with torch.no_grad():
        exported = torch.export.export(block, (image,))
        torch.testing.assert_close(exported.module()(image), block(image), rtol=1e-5, atol=1e-6)


def test_patch_merging_takes_the_neighbourhood_column_by_column() -> None:
    merging = PatchMerging(1)
    merging.norm = nn.Identity()  # type: ignore[assignment]
    merging.reduction = nn.Identity()  # type: ignore[assignment]
    tokens = merging(torch.arange(8.0).view(1, 2, 4, 1))
    assert tokens.tolist() == [[[[0, 4, 1, 5], [2, 6, 3, 7]]]]


def test_drop_path_skips_whole_samples_in_training_only() -> None:
    torch.manual_seed(0)
    block = VSSBlock(4, d_state=2, drop_path=0.5)
    image = torch.randn(64, 2, 2, 4)
    with torch.no_grad():
        step = block.eval()(image) - image
        dropped = block.train()(image) - image
    skipped = (dropped == 0).flatten(1).all(1)
    assert 16 < int(skipped.sum()) < 48
    torch.testing.assert_close(dropped[~skipped], 2 * step[~skipped], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 64, 48), "width must be a positive multiple of 32, got 48"),
        ((1, 2, 0, 64), "height must be a positive multiple of 32, got 0"),
        ((1, 3, 64, 64), "channels must be 2 as configured, got 3"),
        ((0, 2, 64, 64), "batch must hold at least one image, got 0"),
        ((2, 64, 64), "image must have four axes (B, C, H, W), got shape (2, 64, 64)"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(shape: tuple[int, ...], message: str) -> None:
    network = SwinUMamba(**SMALL)
    with pytest.raises(ValueError, match=r".") as caught:
        network(torch.zeros(shape))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_channels": 0}, "out_channels must be at least 1, got 0"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"hidden_size": 32}, "hidden_size must equal the last of encoder_dims, 64, got 32"),
        ({"encoder_depths": (1, 1, 1)}, "encoder_depths must be 4 numbers of at least 1, got (1, 1, 1)"),
        ({"encoder_dims": (8, 16, 32, 60)}, "each twice the one before, got (8, 16, 32, 60)"),
        ({"feature_sizes": (4, 8, 16, 32)}, "the last four equal to encoder_dims (8, 16, 32, 64), got (4, 8, 16, 32)"),
        ({"norm": "batch"}, "norm must be 'instance', got 'batch'"),
        ({"residual_blocks": False}, "residual_blocks must be True, got False"),
        ({"patch_size": 2}, "patch_size"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        create("swin_umamba", **{**SMALL, **change})
    assert message in str(caught.value)
