"""Accuracy: two bundles on the same cases, from the command line to the page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medseg.benchmark.accuracy import BundleResult, CaseResult, Spread, compare
from medseg.benchmark.process import BundleProcess
from medseg.benchmark.statistics import bootstrap_interval
from medseg.cli.benchmark import app
from medseg.errors import MedsegError
from medseg.training.dataset import CaseFiles
from tests.builders import blob_dataset, tiny_bundle


class Done:
    """What one call of the command left behind."""

    def __init__(self, *options: object) -> None:
        result = CliRunner().invoke(app, ["accuracy", *(str(option) for option in options)])
        known = isinstance(result.exception, MedsegError)
        self.error = str(result.exception) if known else ""
        self.code = result.exception.exit_code if known else result.exit_code
        self.stdout, self.stderr = result.stdout, result.stderr


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four cases, three of them in the part that is evaluated."""
    root = blob_dataset(tmp_path / "data", cases=4)
    (tmp_path / "split.json").write_text('{"train": ["case_0"], "val": ["case_1", "case_2", "case_3"]}')
    return root


@pytest.mark.slow
def test_page_plot_and_figures_of_two_bundles_one_case_damaged_and_one_process_killed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tiny_bundle(tmp_path, "one"), tiny_bundle(tmp_path, "other", padding_value=1.0)
    (data / "imagesTr" / "case_2.nii.gz").write_bytes(b"damaged")
    segment = BundleProcess.segment

    def killed_once(self: BundleProcess, case: CaseFiles) -> None:
        if (self.described.name, case.name) == ("one", "case_2"):
            self._process.kill()
        segment(self, case)

    monkeypatch.setattr(BundleProcess, "segment", killed_once)
    page, figures = tmp_path / "page.md", tmp_path / "page.json"
    options = ["--data", data, "--split", tmp_path / "split.json", "-b", one, "-b", other, "--threads", 1]
    done = Done(*options, "--baseline", other, "-o", page, "--json", figures)
    assert done.code == 7
    assert "2 results are missing" in done.error
    assert done.stderr.count("case_2") >= 2

    found = json.loads(figures.read_text())
    assert found["schema"] == 1
    assert found["baseline"] == "other"
    assert found["cases"] == ["case_1", "case_2", "case_3"]
    first, second = found["bundles"]
    assert {first["name"], second["name"]} == {"one", "other"}
    assert first["dice"]["mean"] >= second["dice"]["mean"]
    for bundle in (first, second):
        assert [case["case"] for case in bundle["cases"]] == ["case_1", "case_3"]
        (failed,) = bundle["failed"]
        assert failed["case"] == "case_2"
        assert {"one": "the process ended with -9", "other": "case_2.nii.gz"}[bundle["name"]] in failed["problem"]
        means = [sum(label["dice"] for label in case["labels"]) / 2 for case in bundle["cases"]]
        assert [case["dice"] for case in bundle["cases"]] == pytest.approx(means)
        assert bundle["dice"]["mean"] == pytest.approx(sum(means) / 2)
        assert (bundle["dice"]["low"], bundle["dice"]["high"]) == pytest.approx(bootstrap_interval(means))
        assert {case["windows"] for case in bundle["cases"]} == {4}  # 34x50x33 in windows of 32x64x32
        assert bundle["gmacs_case"] == pytest.approx(4 * bundle["gmacs_window"])
        assert [label["name"] for label in bundle["labels"]] == ["ball 1", "ball 2"]
        assert bundle["seconds_case"] > 0
        assert bundle["peak_rss_mib"] > 100
    (comparison,) = found["comparisons"]
    assert (comparison["bundle"], comparison["cases"], comparison["p"]) == ("one", 2, 0.5)

    text = page.read_text()
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert "![Dice of each case, and what it costs](page.png)" in text
    assert f"--data DATA --split split.json --part val --bundle {one}" in text
    for heading in ("## Bundles", "## Against other", "## Labels", "## Cost", "## Cases without scores"):
        assert f"\n{heading}\n" in text
    mean, low, high = (f"{first['dice'][key]:.4f}" for key in ("mean", "low", "high"))
    assert re.search(rf"^\| {first['name']} \| {mean} \[{low}, {high}\] \| .* \| 2 of 3 \|$", text, re.MULTILINE)
    assert "Published" not in text  # of this data set none are known
    rows = [line for line in text.splitlines() if line.startswith("| 1 ball 1 |")]
    assert [row.split(" | ")[1] for row in rows] == [first["name"], second["name"]]


def _result(name: str, dice: dict[str, float]) -> BundleResult:
    cases = tuple(
        CaseResult(case=case, dice=value, seconds=0, windows=0, gmacs=0, labels=()) for case, value in dice.items()
    )
    nothing: dict[str, None] = dict.fromkeys(("gmacs_case", "seconds_case", "seconds_case_median", "hd95_mm", "nsd"))
    return BundleResult(
        name=name, sha256="", members=(name,), training_cases=(None,), parameters=0, gmacs_window=0, peak_rss_mib=0,
        dice=Spread(count=len(dice)), labels=(), cases=cases, failed=(), **nothing,
    )  # fmt: skip


def test_bundles_are_compared_case_by_case_on_the_cases_that_both_have() -> None:
    base = _result("base", {f"case_{n}": 0.8 for n in range(6)})
    better = _result("better", {f"case_{n}": 0.81 + n / 100 for n in range(5)} | {"unknown": 0.1})
    same = _result("same", {f"case_{n}": 0.8 for n in range(6)})
    none = _result("none", {})
    found = compare([better, none, same], base)
    assert [(one.bundle, one.cases) for one in found] == [("better", 5), ("none", 0), ("same", 6)]
    assert found[0].difference == pytest.approx(0.03)
    assert (found[0].p, found[0].p_holm) == (pytest.approx(2 / 32), pytest.approx(4 / 32))
    assert (found[1].difference, found[1].p, found[1].p_holm) == (None, None, None)
    assert (found[2].difference, found[2].p, found[2].p_holm) == (0, 1, 1)


def test_wrong_use_is_one_line_and_nothing_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    bundle, split = tmp_path / "bundle", tmp_path / "split.json"
    for options, code, message in (
        (["--data", tmp_path / "nowhere"], 3, "dataset.json: no such file"),
        (["--data", data, "--split", split, "--part", "test"], 2, "no part 'test'"),
        (["--data", data, "--baseline", "other"], 2, "--baseline: other is none of the bundles"),
        (["--data", data, "-o", tmp_path / "page.txt"], 2, "suffix '.txt' is not known"),
        (["--data", data, "--split", split, "--json", split], 2, "the output is the input"),
        (["--data", data], 4, f"bundle '{bundle}': not found"),
    ):
        done = Done("-b", bundle, *options, *(() if "-o" in options else ("-o", page)))
        assert (done.code, message in done.error) == (code, True), done.error
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = Done("-b", bundle, "--data", data, "-o", page)
    assert (done.code, done.error) == (8, "matplotlib: is not installed; pip install 'medseg[benchmark]'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "split.json"]
