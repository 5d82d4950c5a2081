"""`medseg bundles calibrate` as a whole: what it writes, what it leaves, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import medseg
from medseg.bundles.ensemble import load_ensemble, make_ensemble
from medseg.bundles.integrity import check_manifest
from medseg.bundles.load import Bundle, load_bundle
from medseg.bundles.spec import Region
from medseg.cli.main import app
from medseg.errors import BundleError, InputError, OutputError, UsageError
from medseg.training import calibrate as module
from medseg.training.calibrate import Labelled, calibrate, check_writable, write_calibration
from medseg.training.dataset import read_dataset
from tests.builders import blob_dataset, conv_network, save_scan, tiny_bundle

RUN = CliRunner()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in three parts; networks are quick ones."""
    monkeypatch.setattr(Bundle, "network", conv_network)
    root = blob_dataset(tmp_path / "data", cases=6)
    names = [f"case_{number}" for number in range(6)]
    (root / "split.json").write_text(json.dumps({"a": names[:2], "b": names[2:4], "c": names[4:]}))
    return root


def test_the_command_calibrates_a_copy_whose_labels_stay_and_whose_probabilities_fit_better(
    data: Path, tmp_path: Path
) -> None:
    bundle = tiny_bundle(tmp_path)
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    split = data / "split.json"
    split.write_text(json.dumps({"fit": ["case_0", "case_1", "case_2"], "other": ["case_3"]}))
    command = ["bundles", "calibrate", str(bundle), "--data", str(data), "--split", str(split), "--part", "fit"]
    command += ["--report-part", "other", "-o", str(tmp_path / "out"), "--json"]
    done = RUN.invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {path: path.read_bytes() for path in before} == before
    for part, cases in (("fitted", 3), ("reported", 1)):
        assert found[part]["cases"] == cases
        assert found[part]["nll_after"] < found[part]["nll_before"]
        assert found[part]["ece_after"] < found[part]["ece_before"]
    copy = Path(found["bundle"])
    assert check_manifest(copy)
    calibration = load_bundle(copy).spec.calibration
    assert calibration.temperature == found["calibration"]["temperature"] > 1
    assert calibration.dice is not None
    assert calibration.dice.cases == 3
    scan = data / "imagesTr" / "case_3.nii.gz"
    old = medseg.infer(scan, bundle=bundle, force=True, probabilities=True)
    new = medseg.infer(scan, bundle=copy, force=True, probabilities=True, uncertainty=True)
    assert (old.label_map == new.label_map).all()
    assert old.probabilities is not None
    softened = old.probabilities ** (1 / calibration.temperature)
    np.testing.assert_allclose(new.probabilities, softened / softened.sum(0), atol=1e-4)
    assert new.record.uncertainty is not None
    assert new.record.uncertainty.predicted_dice is not None
    assert isinstance(RUN.invoke(app, command).exception, OutputError)  # the copy exists now


def test_folds_of_a_cross_validation_each_predict_the_cases_they_held_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, first, second = (tiny_bundle(tmp_path, name) for name in ("all", "first", "second"))
    seen: list[tuple[str, str]] = []

    def watched(scan: Path, **options: object) -> object:
        model = options["bundle"]
        seen.append((model.name, Path(scan).name))  # type: ignore[attr-defined]
        return medseg.infer(scan, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "infer", watched)
    command = ["bundles", "calibrate", str(bundle), "--data", str(data), "--split", str(data / "split.json")]
    done = RUN.invoke(app, [*command, "--fold", f"{first}=a", "--fold", f"{second}=b", "--quiet"])
    assert (done.exit_code, done.stdout) == (0, ""), done.output
    assert set(seen) == {
        (name, f"case_{n}.nii.gz") for name, numbers in (("first", (0, 1)), ("second", (2, 3))) for n in numbers
    }
    fitted = load_bundle(bundle).spec.calibration
    assert fitted.dice is not None
    assert fitted.dice.cases == 4
    assert check_manifest(bundle)
    assert load_bundle(first).spec.calibration.dice is None

    # With a part of its own cases too, the temperature is that of the part and the line that of the folds.
    dataset, model = read_dataset(data), load_ensemble(bundle)
    held = ((first, ["case_0", "case_1"]), (second, ["case_2", "case_3"]))
    folds = [Labelled(load_ensemble(path), dataset.part(names)) for path, names in held]
    own = [Labelled(model, dataset.part(["case_3", "case_4", "case_5"]))]
    alone, both = (calibrate(model, own, line=line) for line in ((), folds))
    assert both.calibration.temperature == alone.calibration.temperature
    assert both.calibration.dice == fitted.dice
    assert (both.fitted.cases, both.fitted.ece_after) == (3, alone.fitted.ece_after)
    assert both.fitted.dice_error != alone.fitted.dice_error


def test_an_ensemble_gets_a_temperature_beside_those_of_its_members(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSEG_HOME", str(tmp_path))
    for name, spacing in (("one", None), ("two", (1.0, 1.2, 1.0))):
        tiny_bundle(tmp_path / "bundles", name, spacing=spacing)
    root = make_ensemble("both", ["one", "two"], tmp_path / "bundles")
    model = load_ensemble("both")
    cases = read_dataset(data).part(["case_0", "case_1", "case_2"])
    fit = calibrate(model, [Labelled(model, cases)])
    assert fit.fitted.nll_after <= fit.fitted.nll_before
    assert write_calibration(model, fit) == root
    assert check_manifest(root)
    assert load_ensemble("both").calibration == fit.calibration
    result = medseg.infer(cases[0].images[0], bundle="both", force=True, uncertainty=True)
    assert result.record.bundle.temperature == fit.calibration.temperature
    assert {member.temperature for member in result.record.bundle.members} == {1.0}
    assert result.record.uncertainty is not None
    assert result.record.uncertainty.predicted_dice is not None


def test_wrong_use_is_one_clear_error_before_the_work(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle(tmp_path)
    model, dataset = load_ensemble(bundle), read_dataset(data)
    command = ["bundles", "calibrate", str(bundle), "--data", str(data), "--split", str(data / "split.json")]
    for options, problem in (
        (["--part", "d"], "no part 'd'; it has a, b, c"),
        (["--part", "a"], "2 cases; three or more are needed"),
        (["--part", "a", "--margin", "-1"], "not a number of mm"),
        (["--fold", "runs/fold0"], "is not FOLDER=PART"),
    ):
        done = RUN.invoke(app, [*command, *options])
        assert isinstance(done.exception, UsageError), done.output
        assert problem in str(done.exception)
    regions = tiny_bundle(
        tmp_path,
        "regions",
        activation="sigmoid",
        regions=tuple(Region(f"r{n}", n, n + 1) for n in range(3)),
        labels={0: "", 1: "", 2: "", 3: ""},
    )
    with pytest.raises(BundleError, match="has overlapping regions"):
        calibrate(load_ensemble(regions), [Labelled(load_ensemble(regions), dataset.cases)])
    wrong = replace(dataset.cases[0], label=save_scan(tmp_path / "wrong.nii.gz", np.zeros((4, 4, 4), dtype=np.uint8)))
    with pytest.raises(InputError, match="differs from its scan's"):
        calibrate(model, [Labelled(model, (wrong,) * 3)])
    with pytest.raises(UsageError, match="several bundles"):
        check_writable(load_ensemble([bundle, bundle]), output=None, overwrite=False)
    installed = tiny_bundle(tmp_path / "_bundles", "tiny")
    monkeypatch.setattr(module, "shipped_bundles", lambda: tmp_path / "_bundles")
    with pytest.raises(OutputError, match="an installed bundle, which stays as it is; use --output"):
        check_writable(load_ensemble(installed), output=None, overwrite=False)
    assert (
        check_writable(load_ensemble(installed), output=tmp_path / "own", overwrite=False) == tmp_path / "own" / "tiny"
    )
