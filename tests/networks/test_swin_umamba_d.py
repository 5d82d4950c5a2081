"""Swin-UMamba-D: its decoder and its constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg.networks import create
from medseg.networks.layers.vss import SS2D, VSSBlock
from medseg.networks.swin_umamba_d import PatchExpand, SwinUMambaD

SMALL: dict[str, Any] = {
    "in_channels": 2,
    "out_channels": 3,
    "encoder_depths": (1, 1, 2, 1),
    "dims": (8, 16, 32, 64),
    "decoder_depths": (1, 2, 1),
    "d_state": 4,
}


def test_the_defaults_are_the_paper_s_network_for_abdomen_mri() -> None:
    with torch.device("meta"):
        network = SwinUMambaD()
        outputs = network(torch.empty(1, 1, 320, 320))
    assert sum(parameter.numel() for parameter in network.parameters()) == 27_497_720
    assert [tuple(output.shape) for output in outputs] == [(1, 14, n, n) for n in (320, 80, 40, 20)]


def test_one_training_step_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    network = SwinUMambaD(**SMALL).train()
    for output in network(torch.randn(2, 2, 64, 32)):
        target = torch.randint(0, 3, (2, *output.shape[2:]))
        F.cross_entropy(output, target).backward(retain_graph=True)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_without_deep_supervision_the_output_is_the_first_of_the_same_network() -> None:
    network = SwinUMambaD(**SMALL).eval()
    single = SwinUMambaD(**SMALL, deep_supervision=False).eval()
    single.load_state_dict(network.state_dict())
    image = torch.randn(1, 2, 32, 64)
    with torch.no_grad():
        outputs, logits = network(image), single(image)
    assert isinstance(outputs, tuple)
    assert torch.equal(logits, outputs[0])


def test_constants_that_the_golden_cases_cannot_see() -> None:
    network = SwinUMambaD(**{**SMALL, "encoder_depths": (2, 2, 9, 2), "decoder_depths": (2, 2, 2)})
    assert all(module.eps == 1e-5 for module in network.modules() if isinstance(module, nn.LayerNorm))

    def rates(part: nn.Module) -> torch.Tensor:
        return torch.tensor([block.drop_path.drop_prob for block in part.modules() if isinstance(block, VSSBlock)])

    torch.testing.assert_close(rates(network.vssm_encoder), torch.linspace(0, 0.2, 15))
    torch.testing.assert_close(rates(network.decoder), torch.linspace(0.2, 0, 6))


def test_every_convolution_starts_kaiming_normal_without_bias() -> None:
    torch.manual_seed(0)
    network = SwinUMambaD(**SMALL)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 1 + 5 + 4 + 4  # patches, encoder scans, decoder scans, heads
    assert all((module.bias == 0).all() for module in convolutions)
    head = network.decoder.seg_layers[0]
    assert float(head.weight.detach().std()) == pytest.approx((2 / 32) ** 0.5, rel=0.2)
    embedding = network.decoder.concat_back_dim[0].weight.detach()  # PyTorch's default, unlike the encoder's 0.02
    assert 0.9 * 64**-0.5 < float(embedding.abs().max()) <= 64**-0.5


def test_patch_expansion_fills_rows_first() -> None:
    expand = PatchExpand(4, 1, factor=2)
    expand.norm = nn.Identity()  # type: ignore[assignment]
    expand.expand = nn.Identity()  # type: ignore[assignment]
    tokens = expand(torch.arange(8.0).view(1, 1, 2, 4))
    assert tokens[0, :, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_the_state_can_follow_the_width() -> None:
    network = SwinUMambaD(**{**SMALL, "d_state": None})
    sizes = [module.A_logs.shape[1] for module in network.modules() if isinstance(module, SS2D)]
    assert sizes == [2] * 5 + [11, 6, 6, 3]  # encoder ceil(8 / 6); decoder ceil(32 / 3), ceil(16 / 3), ceil(8 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 2}, "patch_size must be 4, got 2"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"decoder_depths": (2, 2)}, "decoder_depths must be three numbers of at least 1, got (2, 2)"),
        ({"dims": (8, 16, 24, 64)}, "each twice the one before, got (8, 16, 24, 64)"),
        ({"encoder_depths": (1, 0, 1, 1)}, "encoder_depths must be 4 numbers of at least 1, got (1, 0, 1, 1)"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        create("swin_umamba_d", **{**SMALL, **change})
    assert message in str(caught.value)


def test_a_size_that_cannot_be_halved_five_times_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^height must be a positive multiple of 32, got 40$"):
        SwinUMambaD(**SMALL)(torch.zeros(1, 2, 40, 64))
