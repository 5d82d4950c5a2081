"""Published D-Former checkpoints: what the tensors tell, wrappers, differences, another head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medseg.checkpoints import load_pretrained, load_published
from medseg.errors import BundleError
from medseg.networks import create

NOT_IN_TENSORS: dict[str, Any] = {"num_heads": (1, 2, 2, 4), "group_size": (2, 4, 4)}
TINY: dict[str, Any] = {**NOT_IN_TENSORS, "num_classes": 2, "embed_dim": 8, "depths": (1, 2, 1, 1)}


def state(**config: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return create("dformer", **{**TINY, **config}).state_dict()


def test_all_but_heads_groups_and_intervals_follow_from_the_tensors() -> None:
    config = {"in_channels": 2, "mlp_ratio": 2, "qkv_bias": False, "patch_norm": False, "patch_size": (2, 2, 2)}
    published = state(**config)
    network = load_published("dformer", NOT_IN_TENSORS, published)
    expected = create("dformer", **TINY, **config).eval()
    expected.load_state_dict(published)
    image = torch.randn(1, 2, 16, 32, 32)
    with torch.no_grad():
        for got, want in zip(network(image), expected(image), strict=True):
            assert torch.equal(got, want)


def test_a_lightning_modules_prefix_and_loss_are_set_aside() -> None:
    published = {f"model.{key}": value for key, value in state().items()} | {"loss.weight": torch.ones(2)}
    network = load_published("dformer", TINY, {"state_dict": published})
    assert torch.equal(network.state_dict()["final.0.1.weight"], published["model.final.0.1.weight"])


def test_a_configuration_that_contradicts_the_file_is_refused_with_keys_and_shapes() -> None:
    with pytest.raises(BundleError, match=r"of another shape: 3 \(final\.0\.1\.weight is \(2, 8, 1, 1, 1\), not \(5,"):
        load_published("dformer", {**TINY, "num_classes": 5}, state())
    incomplete = {key: value for key, value in state().items() if not key.startswith("final.2.")}
    with pytest.raises(BundleError, match=r"missing: 4 \(final\.2\.0\.expand\.weight, "):
        load_published("dformer", TINY, incomplete | {"final.3": torch.ones(1)})


def test_another_head_keeps_its_initial_values() -> None:
    network = create("dformer", **{**TINY, "num_classes": 5})
    head = network.state_dict()["final.0.1.weight"].clone()
    report = load_pretrained(network, state())
    assert report.left == tuple(f"final.{level}.1.weight" for level in range(3))
    assert len(report.taken) == len(network.state_dict()) - 3
    assert torch.equal(network.state_dict()["final.0.1.weight"], head)
    with pytest.raises(BundleError, match=r"of another shape.*nothing was loaded"):
        load_pretrained(create("dformer", **{**TINY, "embed_dim": 16}), state())
