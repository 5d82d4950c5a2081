"""The network on the CPU by other back ends: same labels, one conversion, and never without clearance."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import medseg
from medseg.bundles.clearance import Agreement, Clearance, Method, version_family, write_clearances
from medseg.bundles.load import Bundle, ResidentBundle, load_bundle
from medseg.cli.main import app
from medseg.errors import BundleError, DeviceError, OutputError, UsageError
from medseg.inference.backends import convert, host, sessions
from medseg.inference.backends.cache import Entry, cache_folder
from medseg.inference.backends.convert import NotConvertibleError, check_convertible
from medseg.networks.registry import create
from tests.builders import SAMPLES, blob_dataset, blob_scan, save_scan, tiny_bundle

pytest.importorskip("onnxruntime", reason="needs medseg[fast]")
pytest.importorskip("openvino", reason="needs medseg[fast]")

SMALL = {
    "network": "dynunet",
    "network_args": {"in_channels": 1, "out_channels": 3, "filters": [4, 8, 8]},
    "roi_size": (32, 32, 32),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder in which `bundle` was converted."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("MEDSEG_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def bundle(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("bundles"), **SMALL))


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scan(tmp_path_factory.mktemp("scan") / "scan.nii", blob_scan((40, 48, 36)))


@pytest.fixture(scope="module")
def eager(bundle: Bundle, scan: Path) -> np.ndarray:
    labels = medseg.infer(scan, bundle=bundle, backend="eager").label_map
    assert len(np.unique(labels)) == 3
    return labels


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDSEG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def eager_to_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every conversion counts as worth its time."""
    monkeypatch.setattr(host, "_CONVERSION", (0.0, 0.0))
    monkeypatch.setattr(host, "_OPENING", (0.0, 0.0))
    monkeypatch.setattr(host.Probe, "pays", lambda _self, _windows: True)


def used(result: medseg.inference.run.Result) -> tuple[str, str, str]:
    (record,) = result.record.backends
    return record.name, record.precision, record.accuracy


@pytest.mark.parametrize(
    ("backend", "precision", "accuracy", "changed"),
    [
        ("onnxruntime", "fp32", "exact", 0.0),
        ("openvino", "fp32", "fast", 0.001),
        ("openvino", "bf16", "reduced", 0.03),
        ("eager", "bf16", "reduced", 0.03),
    ],
)
def test_labels_agree_with_eager_and_the_record_names_what_was_used(
    bundle: Bundle, scan: Path, eager: np.ndarray, backend: str, precision: str, accuracy: str, changed: float
) -> None:
    result = medseg.infer(scan, bundle=bundle, backend=backend, precision=precision)
    assert used(result) == (backend, precision, accuracy)
    assert float((result.label_map != eager).mean()) <= changed
    assert result.record.warnings == ()


@pytest.mark.slow
@pytest.mark.usefixtures("empty_home")
def test_the_shipped_bundle_gives_the_same_labels_by_onnxruntime() -> None:
    scan = SAMPLES / "hippocampus_003.nii.gz"
    plain = medseg.infer(scan, backend="eager")
    assert plain.label_map.any()
    np.testing.assert_array_equal(medseg.infer(scan, backend="onnxruntime").label_map, plain.label_map)


def test_a_cached_start_needs_neither_the_exporter_nor_the_torch_module(
    bundle: Bundle, scan: Path, eager: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    medseg.infer(scan, bundle=bundle, backend="onnxruntime")
    monkeypatch.setattr(Bundle, "network", lambda _self: pytest.fail("the plain network was built"))
    monkeypatch.setattr(host, "export", lambda *_args: pytest.fail("the network was converted again"))
    result = medseg.infer(scan, bundle=bundle, backend="onnxruntime", tta=True)
    assert used(result) == ("onnxruntime", "fp32", "exact")
    np.testing.assert_array_equal(medseg.infer(scan, bundle=bundle, backend="onnxruntime").label_map, eager)


@pytest.mark.parametrize("damage", ["byte", "short", "facts", "lost"])
def test_a_damaged_entry_is_made_again(bundle: Bundle, scan: Path, eager: np.ndarray, damage: str) -> None:
    medseg.infer(scan, bundle=bundle, backend="onnxruntime")
    folder = Entry(bundle).folder
    model, facts = folder / "model.onnx", folder / "entry.json"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "byte":
        model.write_bytes(content)
    elif damage == "short":
        model.write_bytes(content[:-1])
    elif damage == "facts":
        facts.write_text("{")
    else:
        model.unlink()
    result = medseg.infer(scan, bundle=bundle, backend="onnxruntime")
    np.testing.assert_array_equal(result.label_map, eager)
    assert Entry(bundle).model == model


def test_the_cache_is_its_owners_and_what_others_can_write_is_not_used(bundle: Bundle, scan: Path) -> None:
    medseg.infer(scan, bundle=bundle, backend="onnxruntime")
    folder = Entry(bundle).folder
    assert folder.is_relative_to(cache_folder())
    for path in (cache_folder(), folder.parent, folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    folder.chmod(0o770)
    assert Entry(bundle).model is None
    folder.chmod(0o700)
    assert Entry(bundle).model is not None


def test_an_entry_belongs_to_weights_window_arguments_and_code(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Entry(bundle).folder
    other = load_bundle(tiny_bundle(tmp_path, **(SMALL | {"roi_size": (32, 32, 40)})))
    assert Entry(other).folder.parent == here.parent  # the same weights
    assert Entry(other).folder != here
    monkeypatch.setattr("medseg.inference.backends.cache._code_of_networks", lambda: "changed")
    assert Entry(bundle).folder != here
    changed = load_bundle(tiny_bundle(tmp_path, "other", **(SMALL | {"labels": dict(bundle.spec.labels)})))
    (changed.root / "models" / "model.pt").write_bytes(b"other weights")
    assert Entry(changed).folder.parent != here.parent


@pytest.mark.usefixtures("empty_home")
def test_a_scan_of_few_windows_is_not_converted_for(
    bundle: Bundle, scan: Path, eager: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "export", lambda *_args: pytest.fail("the network was converted"))
    result = medseg.infer(scan, bundle=bundle)
    assert used(result) == ("eager", "fp32", "exact")
    np.testing.assert_array_equal(result.label_map, eager)
    assert not cache_folder().exists()


@pytest.mark.usefixtures("empty_home", "eager_to_convert")
def test_a_scan_of_many_windows_is_converted_for_and_has_all_windows_from_one_back_end(
    bundle: Bundle, scan: Path, eager: np.ndarray
) -> None:
    result = medseg.infer(scan, bundle=bundle)
    assert used(result) == ("onnxruntime", "fp32", "exact")
    np.testing.assert_array_equal(result.label_map, eager)
    assert Entry(bundle).model is not None


def test_a_bundle_in_memory_keeps_its_converted_network(
    bundle: Bundle, scan: Path, eager: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = ResidentBundle.of(bundle)
    medseg.infer(scan, bundle=resident, backend="onnxruntime")
    monkeypatch.setattr(host, "open_session", lambda *_args: pytest.fail("opened again"))
    np.testing.assert_array_equal(medseg.infer(scan, bundle=resident, backend="onnxruntime").label_map, eager)


@pytest.mark.usefixtures("eager_to_convert")
def test_a_failed_conversion_leaves_nothing_warns_once_and_is_not_tried_again(
    bundle: Bundle, scan: Path, eager: np.ndarray, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def broken(_network: object, _shape: object, path: Path) -> None:
        tried.append(path)
        path.write_bytes(b"half a model")
        raise RuntimeError("no symbolic for aten::new\nand a long explanation")

    monkeypatch.setattr(host, "export", broken)
    first, second = (medseg.infer(scan, bundle=bundle) for _ in range(2))
    assert first.record.warnings == ("onnxruntime fp32 cannot be used (RuntimeError); PyTorch was used",)
    assert second.record.warnings == ()
    assert len(tried) == 1
    np.testing.assert_array_equal(first.label_map, eager)
    assert used(first) == used(second) == ("eager", "fp32", "exact")
    (left,) = (path for path in empty_home.rglob("*") if path.is_file())
    assert left.name.endswith(".failed.json")
    with pytest.raises(BundleError, match=r"onnxruntime fp32 cannot be used .RuntimeError.; use --backend eager"):
        medseg.infer(scan, bundle=bundle, backend="onnxruntime")


@pytest.mark.usefixtures("empty_home", "eager_to_convert")
@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_converted_network_that_computes_something_else_is_not_used(
    bundle: Bundle, scan: Path, eager: np.ndarray, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    def shifted(method: Method, path: Path, threads: int) -> sessions.Session:
        session = sessions.open_session(method, path, threads)

        def run(batch: Tensor) -> Tensor:
            logits = session(batch)
            logits[..., 3, 3] += wrong * logits.std()
            return logits

        return run

    monkeypatch.setattr(host, "open_session", shifted)
    result = medseg.infer(scan, bundle=bundle)
    np.testing.assert_array_equal(result.label_map, eager)
    (warning,) = result.record.warnings
    assert "does not reproduce the network" in warning
    assert used(result) == ("eager", "fp32", "exact")
    with pytest.raises(BundleError, match="does not reproduce the network"):
        medseg.infer(scan, bundle=bundle, backend="onnxruntime")


def test_networks_with_a_selective_scan_stay_with_pytorch(
    bundle: Bundle, scan: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        mamba = create("swin_umamba_d", in_channels=1, out_channels=2)
    with pytest.raises(NotConvertibleError):
        check_convertible(mamba)
    monkeypatch.setattr(convert, "_NOT_CONVERTED", ("medseg.networks.dynunet",))
    monkeypatch.setattr(host, "_CONVERSION", (0.0, 0.0))
    result = medseg.infer(scan, bundle=bundle)
    assert used(result) == ("eager", "fp32", "exact")
    assert result.record.warnings == ()
    with pytest.raises(BundleError, match=r"selective scan runs in PyTorch only.*use --backend eager"):
        medseg.infer(scan, bundle=bundle, backend="openvino")
    assert not list(empty_home.rglob("*.onnx"))


def _clearance(bundle: Bundle, precision: str) -> Clearance:
    family = version_family(sessions.version("openvino"))
    return Clearance("openvino", precision, family, bundle.sha256, 3, {"Anterior": Agreement(1.0, 1.0)}, 2.0, 0.01)


@pytest.mark.usefixtures("eager_to_convert")
@pytest.mark.parametrize(
    ("cleared", "precision", "expected"),
    [
        ((), "auto", ("onnxruntime", "fp32", "exact")),
        (("fp32",), "auto", ("openvino", "fp32", "fast")),
        (("fp32", "bf16"), "auto", ("openvino", "bf16", "reduced")),
        (("fp32", "bf16"), "fp32", ("openvino", "fp32", "fast")),
        (("bf16",), "fp32", ("onnxruntime", "fp32", "exact")),
        ((), "bf16", ("openvino", "bf16", "reduced")),
    ],
)
def test_auto_takes_the_fastest_class_that_the_bundle_is_cleared_for(
    bundle: Bundle,
    scan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cleared: tuple[str, ...],
    precision: str,
    expected: tuple[str, str, str],
) -> None:
    monkeypatch.setattr(host, "native_bf16", lambda: True)
    root = write_clearances(bundle, [_clearance(bundle, one) for one in cleared], tmp_path)
    result = medseg.infer(scan, bundle=root, precision=precision)
    assert used(result) == expected
    assert result.record.warnings == ()


@pytest.mark.usefixtures("eager_to_convert")
def test_a_clearance_of_other_weights_does_not_count_and_the_record_says_so(
    bundle: Bundle, scan: Path, tmp_path: Path
) -> None:
    root = write_clearances(bundle, [replace(_clearance(bundle, "fp32"), weights_sha256="0" * 64)], tmp_path)
    result = medseg.infer(scan, bundle=root)
    assert used(result) == ("onnxruntime", "fp32", "exact")
    assert any("other weights" in warning for warning in result.record.warnings)


def test_validate_clears_a_bundle_by_its_labels(bundle: Bundle, tmp_path: Path) -> None:
    data = blob_dataset(tmp_path / "data", cases=2)
    command = ["bundles", "validate", str(bundle.root), "--data", str(data), "--backend", "openvino"]
    before = (bundle.root / "manifest.json").read_bytes()
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert "openvino" in done.stdout
    assert "2 cases" in done.stdout
    assert (bundle.root / "manifest.json").read_bytes() == before
    found = load_bundle(tmp_path / "out" / bundle.name).metadata["medseg"]["validated_backends"]
    assert {(one["backend"], one["cases"], one["weights_sha256"]) for one in found} == {("openvino", 2, bundle.sha256)}
    for one in found:
        assert all(0.5 < dice["lowest"] <= dice["mean"] <= 1 for dice in one["dice"].values())
        assert 0 < one["max_logit_difference"] < 1
    with pytest.raises(OutputError, match="exists; use --overwrite"):
        CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")], catch_exceptions=False)


def test_what_means_nothing_is_refused_before_the_scan_is_read(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / "none.nii"
    with pytest.raises(UsageError, match="onnxruntime has no bf16"):
        medseg.infer(nowhere, bundle=bundle, backend="onnxruntime", precision="bf16")
    with pytest.raises(UsageError, match="'tensorrt' is not known"):
        medseg.infer(nowhere, bundle=bundle, backend="tensorrt")
    with pytest.raises(UsageError, match="computes on the CPU, not on cuda"):
        host.check_choice("openvino", "auto", device="cuda")
    monkeypatch.setattr(sessions.importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    with pytest.raises(DeviceError, match=r"openvino needs openvino, not installed; pip install .medseg\[fast\]"):
        medseg.infer(nowhere, bundle=bundle, backend="openvino")


def test_openvino_reports_no_use_and_leaves_nothing_in_the_users_folder(tmp_path: Path) -> None:
    code = "from medseg.inference.backends import sessions; print(sessions.native_bf16())"
    home = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True, check=True)
    assert run.stdout in {"True\n", "False\n"}
    assert not (tmp_path / "intel").exists()
