"""Ensembles as bundles and on the command line: made, found, checked, refused, run one by one and in batches."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import medseg
from medseg.batch.run import run_batch
from medseg.batch.worker import Settings
from medseg.bundles.ensemble import load_ensemble, make_ensemble
from medseg.bundles.integrity import write_manifest
from medseg.bundles.load import Bundle, load_bundle
from medseg.bundles.spec import ENSEMBLE, Calibration, DiceFit, NormalizeIntensity, parse_calibration
from medseg.bundles.verify import verify_bundle
from medseg.checkpoints.files import read
from medseg.cli.main import app
from medseg.errors import BundleError, MedsegError, OutputError, UsageError
from medseg.io.read import read_volume
from tests.builders import blob_scan, conv_network, save_scan, tiny_bundle

RUN = CliRunner()


@pytest.fixture
def home(own: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with quick networks."""
    monkeypatch.setattr(Bundle, "network", conv_network)
    return own


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own bundles: `one` and `two`, which differ in weights, spacing and window."""
    monkeypatch.setenv("MEDSEG_HOME", str(tmp_path))
    folder = tmp_path / "bundles"
    tiny_bundle(folder, "one")
    other_weights(tiny_bundle(folder, "two", spacing=(1.3, 1.0, 1.1), roi_size=(64, 32, 32)))
    return folder


def other_weights(root: Path) -> Path:
    """The same bundle with its weights changed, manifest included."""
    path = root / "models" / "model.pt"
    state = read(path)
    torch.save({"model": {key: value.flip(0) if value.ndim > 1 else value for key, value in state.items()}}, path)
    write_manifest(root)
    return root


def _scan(folder: Path) -> Path:
    return save_scan(folder / "scan.nii.gz", blob_scan((32, 44, 30)))


def test_an_ensemble_is_the_weighted_mean_of_its_members_named_or_kept_as_a_bundle(home: Path, tmp_path: Path) -> None:
    scan = _scan(tmp_path)
    parts = [medseg.infer(scan, bundle=name, probabilities=True).probabilities for name in ("one", "two")]
    assert parts[0] is not None
    assert parts[1] is not None
    assert np.abs(parts[0] - parts[1]).max() > 0.1
    mean = (3 * parts[0] + parts[1]) / 4
    kept = make_ensemble("both", ["one", "two"], home, weights=[3, 1])
    for bundle, weights in ((["one", home / "two"], [0.6, 0.2]), ("both", None), (kept, None)):
        result = medseg.infer(scan, bundle=bundle, weights=weights, probabilities=True, uncertainty=True)
        np.testing.assert_allclose(result.probabilities, mean, atol=1e-5)
        members = result.record.bundle.members
        assert [(member.name, round(member.weight, 6)) for member in members] == [("one", 0.75), ("two", 0.25)]
        assert [member.weights_sha256 for member in members] == [load_bundle(name).sha256 for name in ("one", "two")]
        assert result.record.bundle.weights_sha256 == load_ensemble(bundle, weights).sha256
        assert result.uncertainty is not None
        assert result.mutual_information is not None
        assert result.mutual_information.max() > 0
    assert medseg.infer(scan, bundle="both").record.bundle.name == "both"
    assert medseg.infer(scan, bundle=["one", "two"]).record.bundle.name == "one + two"
    assert medseg.infer(scan, bundle="one").record.bundle.members == ()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"labels": {0: "background", 1: "Anterior", 2: "Tail"}}, "labels 2 Tail instead of 2 Posterior"),
        ({"channels": ("CT",)}, "channels CT instead of MRI"),
    ],
    ids=["labels", "channels"],
)
def test_bundles_that_differ_in_labels_or_channels_are_refused_with_what_differs(
    home: Path, tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    tiny_bundle(home, "other", **changes)
    with pytest.raises(BundleError, match=f"other: cannot be averaged with one: {problem}"):
        medseg.infer(_scan(tmp_path), bundle=["one", "other"])


def test_weights_that_do_not_fit_are_refused_before_anything_is_read(home: Path) -> None:
    for bundles, weights, problem in (
        (["one", "two"], [1.0], "1 weights for 2 bundles"),
        ("one", [1.0, 2.0], "2 weights for 1 bundles"),
        (["one", "two"], [1.0, -1.0], "-1 is not a positive number"),
        (["one", "two"], [1.0, 0.0], "0 is not a positive number"),
        (["one", "two"], [1.0, float("nan")], "nan is not a positive number"),
        ([], None, "no bundle given"),
    ):
        with pytest.raises(UsageError, match=problem):
            medseg.infer("no such scan.nii", bundle=bundles, weights=weights)


def test_the_scan_must_suit_every_member(home: Path, tmp_path: Path) -> None:
    strict = load_bundle("two")
    suitable = replace(strict.spec.suitability, extent_mm=((80.0,) * 3, (90.0,) * 3))
    strict = replace(strict, spec=replace(strict.spec, suitability=suitable))
    with pytest.raises(BundleError, match="not what one \\+ two was trained on: field of view"):
        medseg.infer(_scan(tmp_path), bundle=["one", strict])
    assert medseg.infer(_scan(tmp_path), bundle=["one", strict], force=True).record.parameters.forced


def test_flips_are_those_of_the_members_that_allow_them(home: Path, tmp_path: Path) -> None:
    fixed = load_bundle("two")
    fixed = replace(fixed, spec=replace(fixed.spec, mirror_axes=()))
    record = medseg.infer(_scan(tmp_path), bundle=["one", fixed], tta=True).record
    assert [member.flips for member in record.bundle.members] == [2, 1]
    assert record.parameters.flips == 3
    with pytest.raises(UsageError, match="two allows no flips"):
        medseg.infer(_scan(tmp_path), bundle=fixed, tta=True)


def test_an_ensemble_bundle_notices_members_that_are_gone_or_changed(home: Path) -> None:
    root = make_ensemble("both", ["one", "two"], home)
    assert all(check.passed for check in verify_bundle("both"))
    (home / "two").rename(home / "away")
    with pytest.raises(BundleError, match="both: its member cannot be loaded: bundle 'two': not found"):
        load_ensemble(root)
    (home / "away").rename(home / "two")
    load_ensemble(root)
    other_weights(home / "two")
    with pytest.raises(BundleError, match=r"both: its member two has other weights .* make the ensemble again"):
        load_ensemble(root)
    assert [check.name for check in verify_bundle("both") if not check.passed] == ["members"]
    make_ensemble("both", ["one", "two"], home, overwrite=True)
    load_ensemble(root)
    config = root / "configs" / "inference.json"
    config.write_text(config.read_text().replace('"weight": 1.0', '"weight": 9.0'))
    with pytest.raises(BundleError, match="damaged or changed"):
        load_ensemble(root)


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([], r"0 members"),
        ([{"bundle": "one", "weight": 1}], r"1 members"),
        ([{"bundle": "../one", "weight": 1}, {"bundle": "two", "weight": 1}], r"'../one' is not a bundle's name"),
        ([{"bundle": "one"}, {"bundle": "two", "weight": 1}], r"KeyError\('weight'\)"),
        ([{"bundle": "one", "weight": 1}] * 2, r"the SHA-256 of one, two are recorded"),
        ("$import os", r"field missing or malformed"),
    ],
)
def test_a_malformed_list_of_members_is_one_clear_error(home: Path, members: object, problem: str) -> None:
    root = make_ensemble("both", ["one", "two"], home)
    config = root / "configs" / "inference.json"
    content = json.loads(config.read_text())
    content[ENSEMBLE]["members"] = members
    config.write_text(json.dumps(content))
    write_manifest(root)
    with pytest.raises(BundleError, match=problem):
        load_ensemble(root)


def test_what_cannot_be_an_ensemble_is_refused_and_leaves_nothing(home: Path) -> None:
    tiny_bundle(home, "bare")
    (home / "bare" / "models" / "model.pt").unlink()
    write_manifest(home / "bare")
    make_ensemble("both", ["one", "two"], home)
    before = sorted(path.name for path in home.iterdir())
    attempts: list[tuple[str, list[str], type[MedsegError], str]] = [
        ("Both!", ["one", "two"], UsageError, "not made of a-z"),
        ("new", ["one"], UsageError, "1 members"),
        ("new", ["one", "new"], UsageError, "is the ensemble itself"),
        ("new", ["one", str(home / "two")], UsageError, "is not a name"),
        ("new", ["one", "both"], BundleError, "both: is an ensemble itself"),
        ("new", ["one", "missing"], BundleError, "bundle 'missing': not found"),
        ("new", ["one", "bare"], BundleError, "bare: has no weights"),
        ("both", ["one", "two"], OutputError, "exists"),
    ]
    for name, members, kind, problem in attempts:
        with pytest.raises(kind, match=problem):
            make_ensemble(name, members, home)
    assert sorted(path.name for path in home.iterdir()) == before
    with pytest.raises(BundleError, match="is an ensemble itself; name its members"):
        load_ensemble(["one", "both"])
    with pytest.raises(BundleError, match="an ensemble, where a bundle with weights"):
        load_bundle("both")


def test_the_command_line_makes_lists_shows_and_runs_an_ensemble(home: Path, tmp_path: Path) -> None:
    made = RUN.invoke(
        app, ["bundles", "ensemble", "both", "--member", "one", "--member", "two", "--weight", "2", "--weight", "1"]
    )
    assert made.exit_code == 0, made.output
    listed = {row["name"]: row for row in json.loads(RUN.invoke(app, ["bundles", "list", "--json"]).stdout)}
    assert listed["both"]["state"] == "ready"
    assert listed["both"]["members"] == ["one", "two"]
    shown = json.loads(RUN.invoke(app, ["bundles", "show", "both", "--json"]).stdout)
    assert [round(member["weight"], 4) for member in shown["members"]] == [0.6667, 0.3333]
    assert RUN.invoke(app, ["bundles", "verify", "both"]).exit_code == 0
    scan, unsure = _scan(tmp_path), tmp_path / "unsure.nii.gz"
    done = RUN.invoke(app, ["infer", str(scan), "--bundle", "both", "--uncertainty", str(unsure), "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["outputs"]["uncertainty"] == "unsure.nii.gz"
    assert record["outputs"]["mutual_information"] == "unsure_mi.nii.gz"
    result = medseg.infer(scan, bundle="both", uncertainty=True)
    for path, expected in ((unsure, result.uncertainty), (tmp_path / "unsure_mi.nii.gz", result.mutual_information)):
        stored = nib.load(path)
        assert stored.get_data_dtype() == np.uint16
        assert (stored.affine == nib.load(scan).affine).all()
        np.testing.assert_allclose(stored.get_fdata(), expected, atol=2**-16 + 1e-6)
        np.testing.assert_allclose(read_volume(path).data[0], expected, atol=2**-16 + 1e-6)
    (home / "two").rename(home / "away")
    rows = {row["name"]: row for row in json.loads(RUN.invoke(app, ["bundles", "list", "--json"]).stdout)}
    assert rows["both"]["state"] == "needs members"


def test_a_single_pass_writes_no_second_map_and_the_label_map_is_the_one_without_uncertainty(
    home: Path, tmp_path: Path
) -> None:
    scan = str(_scan(tmp_path))
    first = RUN.invoke(app, ["infer", scan, "--bundle", "one", "-o", str(tmp_path / "a.nii")])
    second = RUN.invoke(
        app, ["infer", scan, "--bundle", "one", "-o", str(tmp_path / "b.nii"), "--uncertainty", str(tmp_path / "u.nii")]
    )
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()
    assert not (tmp_path / "u_mi.nii").exists()
    assert "score" in second.stdout
    assert "score" not in first.stdout
    assert json.loads((tmp_path / "a.json").read_text())["uncertainty"] is None
    same = RUN.invoke(
        app, ["infer", scan, "--bundle", "one", "-o", str(tmp_path / "c.nii"), "--uncertainty", str(tmp_path / "c.nii")]
    )
    assert isinstance(same.exception, UsageError)
    assert "the name of two outputs, labels and uncertainty" in str(same.exception)
    assert not (tmp_path / "c.nii").exists()


def test_a_batch_averages_scores_and_computes_again_only_when_the_weights_change(home: Path, tmp_path: Path) -> None:
    scans, output = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    scan = _scan(scans)
    settings = Settings(uncertainty=True)

    def run(weights: list[float]) -> tuple[bool, dict[str, float]]:
        summary = run_batch([scans], output, bundle=["one", "two"], weights=weights, settings=settings, overwrite=True)
        (case,) = summary.cases
        assert case.status == "done", case.message
        assert set(case.outputs) == {"labels", "record", "preview", "uncertainty", "mutual_information"}
        return case.earlier, case.quality

    earlier, quality = run([2, 1])
    alone = medseg.infer(scan, bundle=["one", "two"], weights=[2, 1], uncertainty=True)
    assert not earlier
    assert alone.record.uncertainty is not None
    assert quality == {"score": round(alone.record.uncertainty.score, 4)}
    assert (np.asarray(nib.load(output / "scan_seg.nii.gz").dataobj) == alone.label_map).all()
    assert run([4, 2]) == (True, quality)
    assert run([1, 2])[0] is False
    assert "score" in (output / "summary.csv").read_text().splitlines()[0].split(",")


def test_a_calibration_is_read_and_predicts_the_dice_where_it_holds(home: Path, tmp_path: Path) -> None:
    fit = DiceFit(intercept=0.1, slope=0.8, deviation=0.05, cases=20)
    calibration = Calibration(1.5, fit)
    tiny_bundle(home, "sure", calibration=calibration)
    assert load_bundle("sure").spec.calibration == calibration
    result = medseg.infer(_scan(tmp_path), bundle="sure", uncertainty=True)
    sure, plain = result.record.uncertainty, medseg.infer(_scan(tmp_path), bundle="one")
    assert (result.label_map == plain.label_map).all()
    assert result.record.bundle.temperature == 1.5
    assert sure is not None
    assert sure.predicted_dice is not None
    assert sure.predicted_dice.mean == pytest.approx(0.1 + 0.8 * sure.score)
    assert sure.predicted_dice.upper - sure.predicted_dice.lower == pytest.approx(2 * 1.645 * 0.05)
    for other in ({"tta": True}, {"overlap": 0.25}):
        differing = medseg.infer(_scan(tmp_path), bundle="sure", uncertainty=True, **other).record.uncertainty
        assert differing is not None
        assert differing.predicted_dice is None
    for wrong in ({"temperature": 0}, {"temperature": "nan"}, {"predicted_dice": {"intercept": 1}}):
        with pytest.raises((ValueError, KeyError)):
            parse_calibration(wrong)
    for score, expected in ((2.0, (1.0, 1.0, 1.0)), (-2.0, (0.0, 0.0, 0.0))):
        assert fit.predict(score) == expected


@pytest.mark.slow
def test_monai_bundle_run_of_an_ensemble_gives_the_labels_of_medseg_infer(own: Path, tmp_path: Path) -> None:
    root, scan = make_ensemble("both", ["one", "two"], own), _scan(tmp_path)
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += ["--bundle_root", str(root), "--dataset_dir", str(tmp_path), "--output_dir", str(tmp_path / "eval")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.asarray(nib.load(tmp_path / "eval" / "scan_seg.nii.gz").dataobj)
    assert (found == medseg.infer(scan, bundle="both").label_map).all()


def test_members_that_prepare_a_scan_alike_share_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medseg.inference import run

    tiny_bundle(home, "third", roi_size=(64, 32, 32))
    tiny_bundle(home, "fourth", intensity=(NormalizeIntensity(nonzero=True),))
    made: list[object] = []
    monkeypatch.setattr(
        run, "preprocess", lambda volume, spec, real=run.preprocess: made.append(spec) or real(volume, spec)
    )
    medseg.infer(_scan(tmp_path), bundle=["one", "third", "fourth"])
    assert len(made) == 2
