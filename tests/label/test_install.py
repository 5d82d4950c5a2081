"""What ``medseg label install`` would do, and what it says when it cannot."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from medseg.errors import DeviceError
from medseg.label import install

_PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_LEFT_OUT = {"numpymaxflow", "pydicom-seg", "sam2", "monai", "torch", "numpy"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", one)[0].lower().replace("_", "-") for one in requirements}


def test_the_dry_run_prints_commands_that_hold_what_is_installed_and_runs_none() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "medseg", "label", "install", "--dry-run"], capture_output=True, text=True, check=False
    )
    listing, packages, alone, check = run.stdout.splitlines()
    assert (run.returncode, run.stderr) == (0, "")
    assert shlex.split(listing)[-2:] == [">", "constraints.txt"]
    assert shlex.split(packages)[-3:] == ["--constraint", "constraints.txt", "medseg[label]"]
    assert shlex.split(alone)[-2:] == ["--no-deps", "monailabel==0.8.5"]
    assert check.endswith("'import medseg.label.server'")


def test_the_extra_names_what_monai_label_needs_without_it_and_without_a_second_torch() -> None:
    extra = names(_PROJECT["optional-dependencies"]["label"])
    assert not extra & (_LEFT_OUT | {"monailabel"})
    try:
        declared = importlib.metadata.requires("monailabel") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("MONAI Label is not installed: medseg label install")
    needed = names([one for one in declared if "extra ==" not in one]) - _LEFT_OUT
    assert needed - extra - names(_PROJECT["dependencies"]) == set()


def test_without_a_network_one_line_says_so_and_the_code_is_8(monkeypatch: pytest.MonkeyPatch) -> None:
    # A package that is not installed, from an index that nobody serves.
    monkeypatch.setattr(install, "PACKAGE", "medseg-no-such-package==1.0")
    monkeypatch.setattr(install, "steps", lambda path: _only_last_package(path))
    said: list[str] = []
    nowhere = {
        **os.environ,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
    }
    with pytest.raises(DeviceError, match="MONAI Label: the package index cannot be reached; connect") as refused:
        install.install({key: value for key, value in nowhere.items() if key != "PIP_EXTRA_INDEX_URL"}, said.append)
    assert refused.value.exit_code == 8
    assert "1/1 MONAI Label" in said


_steps = install.steps


def _only_last_package(path: Path) -> tuple[install.Step, ...]:
    return (_steps(path)[1],)
