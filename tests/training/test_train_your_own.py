"""docs/train_your_own.md, followed: its script, its three commands, and what comes after them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medseg.bundles.verify import verify_bundle
from medseg.cli.main import app
from medseg.errors import InputError
from medseg.training.dataset import read_dataset
from tests.builders import blob_dataset, save_scan

PAGE = Path(__file__).parents[2] / "docs" / "train_your_own.md"


def commands() -> list[list[str]]:
    """The page's medseg commands in their order, each once."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    medseg ")]
    return [shlex.split(line)[1:] for line in dict.fromkeys(lines)]


def body(folder: Path) -> tuple[Path, Path]:
    """A scan and a segmentation with the values that the page's script picks."""
    shape, random = (100, 78, 30), np.random.default_rng(0)
    labels = np.zeros(shape, dtype=np.uint8)
    for value, (x, y) in {5: (60, 30), 1: (20, 40), 2: (70, 60), 3: (30, 60)}.items():
        labels[x : x + 16, y : y + 12, 4:26] = value
    image = random.normal(0, 10, shape) + 60.0 * (labels > 0) + 20.0 * labels
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    scan = save_scan(folder / "ct.nii.gz", image.astype(np.int16), affine)
    return scan, save_scan(folder / "seg.nii.gz", labels, affine)


@pytest.mark.slow
def test_the_page_leads_from_a_folder_of_scans_to_a_bundle_and_its_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan, segmentation = body(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSEG_HOME", str(tmp_path / "home"))
    subprocess.run([sys.executable, "-c", script, scan, segmentation, "organs"], check=True)
    assert len(read_dataset(tmp_path / "organs").cases) == 10
    (tmp_path / "results").mkdir()
    done = []
    for words in commands():
        short = ["--steps" if word == "--max-time" else "2" if word == "12m" else word for word in words]
        result = CliRunner().invoke(app, short)
        assert result.exit_code == 0, (short, result.output, result.exception)
        done.append(words[0] if words[0] != "data" else "check")
    assert done == ["check", "train", "bundles", "infer", "infer", "evaluate"]
    assert all(check.passed for check in verify_bundle(tmp_path / "home" / "bundles" / "organs"))
    assert {path.name for path in (tmp_path / "results").iterdir()} >= {"crop_8_seg.nii.gz", "crop_9_seg.nii.gz"}


def test_check_names_what_is_wrong_and_exits_with_3(tmp_path: Path) -> None:

    root = blob_dataset(tmp_path / "balls", cases=3)
    good = CliRunner().invoke(app, ["data", "check", str(root), "--json"])
    assert good.exit_code == 0, good.output
    assert '"cases_with": {\n    "1": 3,\n    "2": 3\n  }' in good.output
    label = np.zeros((34, 50, 33), dtype=np.uint8)
    label[0, 0, 0] = 9
    save_scan(root / "labelsTr" / "case_1.nii.gz", label)
    shifted = np.eye(4)
    shifted[2, 3] = 0.5
    save_scan(root / "labelsTr" / "case_2.nii.gz", np.ones((34, 50, 33), dtype=np.uint8), shifted)
    save_scan(root / "imagesTr" / "forgotten.nii.gz", label)
    (tmp_path / "split.json").write_text('{"train": ["case_0", "case_7"]}')
    bad = CliRunner().invoke(app, ["data", "check", str(root), "--split", str(tmp_path / "split.json")])
    assert isinstance(bad.exception, InputError)
    assert "3 problems, the first: " in str(bad.exception)
    assert "label values [9] mean nothing" in str(bad.exception)
    assert "lies 0.5 voxels off its image" in bad.output
    assert "1 cases of part 'train' are not there (case_7, ...)" in bad.output
    assert "1 files in imagesTr belong to no labelled case (forgotten.nii.gz, ...)" in bad.output
