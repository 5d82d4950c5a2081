"""DynUNet: MONAI's function, in 2D and 3D, with and without deep supervision; MONAI's state dict loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.nets import DynUNet as MonaiDynUNet
from torch import nn

from medseg.checkpoints import load_pretrained, load_published
from medseg.networks import create

FILTERS = [4, 6, 8, 10, 12]


def monais(*, spatial_dims: int, res_block: bool, heads: int) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = MonaiDynUNet(
        spatial_dims, 2, 3, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, FILTERS,
        res_block=res_block, deep_supervision=heads > 0, deep_supr_num=max(heads, 1),
    )  # fmt: skip
    return network


@pytest.mark.parametrize(("spatial_dims", "res_block", "heads"), [(3, True, 3), (3, False, 1), (2, True, 0)])
def test_it_is_monais_network_and_its_state_dict_loads(spatial_dims: int, res_block: bool, heads: int) -> None:
    theirs = monais(spatial_dims=spatial_dims, res_block=res_block, heads=heads)
    config: dict[str, Any] = {"in_channels": 2, "out_channels": 3, "filters": FILTERS, "spatial_dims": spatial_dims}
    config |= {"res_block": res_block, "deep_supervision": heads > 0, "deep_supr_num": max(heads, 1)}
    ours = load_published("dynunet", config, theirs.state_dict())
    image = torch.randn(1, 2, *(48, 32, 16)[:spatial_dims])
    with torch.no_grad():
        assert torch.equal(ours(image), theirs.eval()(image))
        if heads:
            found, wanted = ours.train()(image), theirs.train()(image)
            assert len(found) == heads + 1
            assert torch.equal(torch.stack(found, dim=1), wanted)


def test_each_tensor_is_stored_once() -> None:
    network = create("dynunet", in_channels=1, out_channels=2, filters=[4, 6, 8])
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == sum(
        p.numel() for p in network.parameters()
    )


def test_a_start_with_other_classes_takes_all_but_the_outputs() -> None:
    theirs = monais(spatial_dims=3, res_block=True, heads=1)
    ours = create("dynunet", in_channels=2, out_channels=7, filters=FILTERS, res_block=True, deep_supervision=True)
    report = load_pretrained(ours, theirs.state_dict())
    assert torch.equal(ours.bottleneck.conv1.conv.weight, theirs.bottleneck.conv1.conv.weight)
    assert report.left
    assert all(key.startswith(("output_block.", "deep_supervision_heads.")) for key in report.left)


@pytest.mark.parametrize(
    ("config", "problem"),
    [({"filters": [4, 8]}, "at least 3 levels"), ({"filters": [4, 6, 8], "strides": [1, 2]}, "as many strides")],
)
def test_what_is_no_network_is_refused(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        create("dynunet", in_channels=1, out_channels=2, **config)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((1, 1, 8, 8, 6), "multiple of"),
        ((1, 2, 8, 8, 8), "1 channels"),
        ((1, 1, 8, 8), "3 axes"),
        ((1, 1, 4, 4, 4), "larger"),
    ],
)
def test_an_image_it_cannot_take_is_refused(shape: tuple[int, ...], problem: str) -> None:
    network = create("dynunet", in_channels=1, out_channels=2, filters=[4, 6, 8])
    with pytest.raises(ValueError, match=problem):
        network(torch.zeros(shape))
