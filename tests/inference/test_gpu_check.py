"""`make gpu-check` where there is no GPU: the script runs to its end, sees a wrong result, and says what is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from medseg.networks.registry import names

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodec:UserWarning")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_whole_script_runs_on_the_cpu(script: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "gpu.json"
    assert script.main(["--device", "cpu", "--quick", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    checks = {part: [c for c in found["checks"] if c["part"] == part] for part in script.PARTS}
    assert all(checks.values())
    for name in names():
        assert any(check["name"].startswith(name) for check in checks["networks"])
    assert any("scan blocked" in check["name"] for check in checks["networks"])
    memory = " ".join(check["note"] for check in checks["memory"])
    for step in ("windows at once: 2", "sums of logits moved", "image moved", "went on with the CPU"):
        assert step in memory


def test_a_wrong_result_is_a_failure_by_name(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = script._logits

    def wrong(network: Any, image: Any, where: Any, precision: str) -> Any:
        logits = right(network, image, where, precision)
        return logits if precision == "fp32" else logits + 0.2 * logits.std() * torch.randn(logits.shape)

    monkeypatch.setattr(script, "_logits", wrong)
    monkeypatch.setattr("medseg.networks.registry.names", lambda: ["swin_unetr"])
    assert script.main(["--device", "cpu", "--quick", "--only", "networks"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["ok", "FAIL"]
    assert lines[-1] == "1 of 2 checks passed; FAIL networks: swin_unetr, auto"


def test_without_a_gpu_it_says_so_in_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 8
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: --device: cuda asked for, 0 CUDA devices found; use --device auto or cpu\n"
