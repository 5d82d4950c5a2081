"""Every network computes the numbers of the published one, reached through its importer of published checkpoints."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.checkpoints import load_pretrained, load_published
from medseg.networks import names
from tests.golden.cases import HERE, Case, draw_input, fill, find_cases, golden_folders, strided

TOLERANCE = 1e-4  # of the largest output, at least of 1: another order of summation, not another function
SLOW_PARAMETERS, SLOW_VOXELS = 45_000_000, 800_000


def _parameters() -> list[Any]:
    cases = [case for name in names() for case in find_cases(name)]
    return [pytest.param(case, id=str(case), marks=_marks(case)) for case in cases]


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    description = case.description()
    voxels = max(math.prod(shape) for shape in description["inputs"].values())
    return [pytest.mark.slow] if description["parameters"] > SLOW_PARAMETERS or voxels > SLOW_VOXELS else []


@pytest.mark.parametrize("case", _parameters())
def test_the_network_computes_the_published_numbers(
    case: Case, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    description = case.description()
    config = dict(description["config"])
    container = config.pop("checkpoint_container", None)
    config.pop("checkpoint_prefix", None)
    config.pop("layout", None)
    state: dict[str, Any] = dict(fill(description["state"]))
    if container is not None:
        state = {"epoch": 3, container: state, "optimizer": {"param_groups": []}}

    network = load_published(case.architecture, config, state)
    del state
    if "npz" in description:
        np.savez(tmp_path / "pretrained.npz", **fill(description["npz"]))
        load_pretrained(network, tmp_path / "pretrained.npz")

    assert sum(parameter.numel() for parameter in network.parameters()) == description["parameters"]
    assert not network.training
    inputs = [torch.from_numpy(draw_input(name, shape)) for name, shape in description["inputs"].items()]
    with torch.inference_mode():
        results = network(*inputs)
    results = (results,) if isinstance(results, torch.Tensor) else results
    stored = case.outputs()
    assert len(results) == len(description["outputs"])
    errors = {}
    for result, (name, output) in zip(results, description["outputs"].items(), strict=True):
        assert list(result.shape) == output["shape"], name
        got, want = strided(result.numpy(), output["stride"]), stored[name]
        errors[name] = float(np.abs(got - want).max())
        limit = description.get("tolerance", TOLERANCE) * max(1.0, float(np.abs(want).max()))
        assert errors[name] <= limit, f"{name}: error {errors[name]:.3g}, allowed {limit:.3g}"
    record_property("largest_absolute_error", max(errors.values()))
    print(f"{case}: largest absolute error {max(errors.values()):.3g}")  # noqa: T201, the table in the docs is made of it


@pytest.mark.parametrize("architecture", names())
def test_each_architecture_has_a_case_of_the_project_itself(architecture: str) -> None:
    assert (HERE / f"{architecture}.json").is_file(), "write one with python -m tests.golden.make_fixtures"


def test_the_golden_folders_hold_cases() -> None:
    folders = golden_folders()
    if "MEDSEG_GOLDEN" not in os.environ and not folders[0].is_dir():
        pytest.skip(f"{folders[0]} is not there; name folders of golden cases in MEDSEG_GOLDEN")
    empty = [str(folder) for folder in folders if not any(folder.glob("*/*.json"))]
    assert not empty, "no <architecture>/<case>.json in these folders"
