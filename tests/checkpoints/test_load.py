"""Loading in general: containers, prefixes, differences listed in one error, reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medseg.checkpoints import PretrainedReport, load_pretrained, load_published
from medseg.checkpoints.state import State, load_partly, load_strictly, rename, strip_prefixes, strip_wrapper, unwrap
from medseg.errors import BundleError
from medseg.networks import create

DFORMER: dict[str, Any] = {"num_classes": 2, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_containers_are_entered_until_there_are_tensors_and_the_rest_is_named() -> None:
    content = {"epoch": 3, "state_dict": {"model": {"w": np.float64([1, 2]), "step": 4}, "lr": 0.1}}
    state = unwrap(content, source="file.pth")
    assert state["w"].dtype == torch.float64
    assert (state.source, state.containers) == ("file.pth", ("state_dict", "model"))
    assert state.ignored == ("epoch", "lr", "step")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, "no state dict in it: it is empty"),
        ({"generator": {"w": np.ones(2)}}, r"no state dict in it: it holds 1 \(generator\); known containers"),
        ({"w": np.array(["text"])}, "w holds <U4, not numbers"),
        ({"w": torch.eye(2).to_sparse()}, "w is not a plain tensor of numbers"),
        ({"w": torch.empty(2, device="meta")}, "w is not a plain tensor of numbers"),
    ],
)
def test_what_holds_no_numbers_is_refused(content: dict[str, Any], problem: str) -> None:
    with pytest.raises(BundleError, match=problem):
        unwrap(content)


def test_prefixes_go_from_the_start_of_a_key_only_and_repeatedly() -> None:
    one = torch.ones(1)
    state = {"module._orig_mod.module.a": one, "a.module.b": one, "modules.c": one}
    assert list(strip_prefixes(state)) == ["a", "a.module.b", "modules.c"]
    with pytest.raises(BundleError, match=r"f: module\.a and a both mean a"):
        strip_prefixes(State({"module.a": one, "a": one}, source="f"))
    assert list(rename({"a": one}, str.upper)) == ["A"]


def test_a_wrapper_is_found_by_a_key_of_the_network() -> None:
    one = torch.ones(1)
    bare, outside = strip_wrapper({"trainer.net.stem.w": one, "trainer.net.b": one, "loss.w": one}, "stem.w")
    assert (list(bare), outside) == (["stem.w", "b"], ("loss.w",))
    with pytest.raises(BundleError, match=r"no key stem\.w"):
        strip_wrapper({"stem.weight": one}, "stem.w")
    with pytest.raises(BundleError, match=r"in it: student\., teacher\."):
        strip_wrapper({"student.stem.w": one, "teacher.stem.w": one}, "stem.w")


def test_a_strict_load_lists_all_differences_at_once_and_loads_nothing() -> None:
    target = network()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = {"0.weight": torch.ones(5, 3), "0.bias": torch.ones(4), **{f"x{n}": torch.ones(1) for n in range(5)}}
    with pytest.raises(BundleError) as refused:
        load_strictly(target, state, source="model.pth")
    assert str(refused.value) == (
        "model.pth: does not fit Sequential; missing: 2 (1.weight, 1.bias); unexpected: 5 (x0, x1, x2, ...); "
        "of another shape: 1 (0.weight is (5, 3), not (4, 3)); nothing was loaded"
    )
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_a_strict_load_leaves_computed_buffers_alone() -> None:
    target = network()
    target.register_buffer("table", torch.arange(3))
    weights = {key: torch.full_like(value, 2) for key, value in target.state_dict().items() if key != "table"}
    load_strictly(target, weights, computed=["table"])
    load_strictly(target, weights | {"table": torch.zeros(3, dtype=torch.int64)}, computed=["table"])
    assert target.table.tolist() == [0, 1, 2]
    assert all(bool((parameter == 2).all()) for parameter in target.parameters())


def test_a_partial_load_leaves_a_head_of_another_shape_and_reports_everything() -> None:
    target = network()
    head = target[1].weight.clone()
    state = {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4), "1.weight": torch.ones(9, 4), "old": torch.ones(1)}
    report = load_partly(target, state, head=["1."], adapted={"0.bias": "resized"}, unused=["loss"])
    assert report == PretrainedReport(
        taken=("0.weight",), adapted=("0.bias: resized",), left=("1.weight", "1.bias"), unused=("loss", "old")
    )
    assert str(report) == (
        "taken: 1 tensors\nadapted: 1 (0.bias: resized)\n"
        "left at their initial values: 2 (1.weight, 1.bias)\nnot used: 2 (loss, old)"
    )
    assert torch.equal(target[1].weight, head)
    with pytest.raises(BundleError, match=r"of another shape: 1 \(1.weight is"):
        load_partly(network(), state)
    with pytest.raises(BundleError, match="nothing in it fits Sequential"):
        load_partly(network(), {"old": torch.ones(1)})


@pytest.mark.parametrize("container", ["state_dict", "model", "model_state_dict", "network_weights", "net"])
@pytest.mark.parametrize("arrays", [True, False])
def test_a_published_state_is_found_in_any_container(container: str, arrays: bool) -> None:
    torch.manual_seed(0)
    own = create("dformer", **DFORMER).state_dict()
    state = {f"module.{key}": value.numpy() if arrays else value for key, value in own.items()}
    loaded = load_published("dformer", DFORMER, {"epoch": 1, container: state})
    assert not loaded.training
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())


def test_a_pretrained_start_reads_a_file_and_names_it_in_errors(tmp_path: Path) -> None:
    target = create("dformer", **DFORMER)
    torch.save({"state_dict": create("dformer", **DFORMER).state_dict()}, tmp_path / "other.pth")
    assert len(load_pretrained(target, tmp_path / "other.pth").taken) == len(target.state_dict())
    torch.save({"w": torch.ones(1)}, tmp_path / "foreign.pth")
    with pytest.raises(BundleError, match=r"foreign\.pth: no key model_down"):
        load_pretrained(target, str(tmp_path / "foreign.pth"))


def test_an_unknown_architecture_or_network_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'unet'"):
        load_published("unet", {}, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match="Linear is none of the architectures dformer, "):
        load_pretrained(nn.Linear(1, 1), {"w": torch.ones(1)})
