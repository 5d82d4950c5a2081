"""Speed: one subject, several pipelines, figures that belong together."""

from __future__ import annotations

import io
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from medseg.benchmark import speed as speed_module
from medseg.benchmark.agreement import agreement
from medseg.benchmark.meter import Meter, NetworkClock
from medseg.benchmark.quant import quant_bundle
from medseg.benchmark.run import Answer, Request, main
from medseg.benchmark.scan import phantom_ct, save_phantom_ct
from medseg.benchmark.speed import benchmark_speed
from medseg.benchmark.subject import Subject, random_bundle
from medseg.bundles.load import load_bundle
from medseg.cli.benchmark import app
from medseg.errors import InputError, MedsegError, UsageError
from tests.builders import SAMPLES, blob_scan, save_scan, tiny_bundle

# MONAI's LoadImaged says so wherever pydicom is there and nvImageCodec is not.
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")
CPU = torch.device("cpu")


def test_monai_gives_medsegs_labels_with_the_same_bundle_and_both_count_the_same_windows(tmp_path: Path) -> None:
    from medseg.benchmark.medseg_pipeline import run_medseg
    from medseg.benchmark.monai_pipeline import run_monai

    own = load_bundle(tiny_bundle(tmp_path))
    turned = save_scan(tmp_path / "turned.nii.gz", blob_scan((30, 45, 28)), np.diag([-1.1, 1.2, 0.9, 1.0]))
    save_phantom_ct(tmp_path / "ct.nii.gz", (60, 64, 40), (1.2, 1.2, 2.0))
    for bundle, scan in (
        (own, SAMPLES / "hippocampus_003.nii.gz"),
        (own, turned),
        (quant_bundle(5, (32, 32, 32)), tmp_path / "ct.nii.gz"),
    ):
        found, seen = [], []
        for name in ("medseg", "monai"):
            meter, clock, output = Meter(), NetworkClock(), tmp_path / "out.nii.gz"
            measured = (bundle, [scan], output, CPU, meter, clock)
            if name == "medseg":
                windows, used = run_medseg(*measured, backend="eager", precision="auto")
                assert (used.name, used.precision) == ("eager", "fp32")
            else:
                windows = run_monai(*measured)
            seen.append((windows, clock.windows))
            assert {"read", "preprocess", "network", "restore", "write"} <= set(meter.cpu_s)
            assert 0 < clock.cpu_s <= sum(meter.cpu_s.values())
            found.append(nib.load(output))
        assert seen[0] == seen[1]
        np.testing.assert_allclose(found[0].affine, found[1].affine)
        labels = [np.asarray(image.dataobj) for image in found]
        assert len(np.unique(labels[0])) > 2
        assert agreement(*labels).changed <= 1e-4


@pytest.mark.slow
def test_report_holds_every_pipelines_runs_ratios_and_agreement_and_names_one_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(speed_module.PACKAGES, "nnunet", "no_such_package")
    save_phantom_ct(tmp_path / "ct.nii.gz", (60, 64, 40), (1.2, 1.2, 2.0))
    said: list[str] = []
    subject = Subject(quant_classes=5, quant_roi_size=(32, 32, 32))
    report = benchmark_speed(
        subject, [tmp_path / "ct.nii.gz"], against=("monai", "nnunet"), repeat=1, progress=said.append
    )
    assert said == ["medseg: warm-up", "monai: warm-up", "medseg: round 1 of 1", "monai: round 1 of 1"]
    found = json.loads(report.to_json())
    assert {"schema", "medseg", "torch", "device", "cpu", "threads", "bundle", "image", "backend", "precision"} <= set(
        found
    )
    assert found["schema"] == 1
    assert found["image"]["shape"] == [60, 64, 40]
    assert sum(found["labels"]["counts"]) == 60 * 64 * 40
    assert found["windows"] == found["windows_evaluated"] + found["windows_reused"]
    monai, nnunet = found["baselines"]
    assert nnunet["error"] == "no_such_package is not installed"
    assert set(monai["ratio"]) == {"wall", "cpu", "overhead", "peak_rss", "peak_gpu"}
    assert monai["ratio"]["peak_gpu"] is monai["median"]["peak_gpu_mib"] is None
    assert monai["agreement"]["changed"] <= 1e-4
    assert monai["agreement"]["classes"] >= 2
    (run,) = found["runs"]
    assert (found["backend"], found["precision"]) == ("eager", "fp32")
    assert run["net_cpu_s"] > 0
    assert found["windows_evaluated"] > 0
    assert run["cpu_s"] == pytest.approx(sum(run["steps"].values()))
    assert run["overhead_cpu_s"] == pytest.approx(run["cpu_s"] - run["net_cpu_s"])
    assert run["peak_rss_mib"] - run["import_rss_mib"] == pytest.approx(run["above_imports_mib"])
    assert monai["ratio"]["cpu"] == pytest.approx(monai["runs"][0]["cpu_s"] / run["cpu_s"])
    assert monai["median"]["wall_s"] == monai["runs"][0]["wall_s"]


def test_what_the_measured_process_refuses_keeps_its_words_and_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "scan.nii.gz"

    def in_this_process(request: Request) -> Answer:
        monkeypatch.setattr("sys.stdin", io.StringIO(request.model_dump_json()))
        main()
        return Answer.model_validate_json(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(speed_module, "_ask", in_this_process)
    monkeypatch.setattr(torch, "set_num_threads", lambda _threads: None)
    with pytest.raises(InputError) as caught:
        benchmark_speed(Subject(quant_classes=2), [missing], repeat=1)
    assert str(caught.value) == f"{missing}: no such file; check the path"


def test_agreement_of_two_label_maps_counted_by_hand() -> None:
    reference = np.zeros((30, 20, 10), dtype=np.uint8)
    reference[:10], reference[10:20, :5] = 1, 2  # 2000 and 500 voxels
    labels = reference.copy()
    labels[:1], labels[29] = 2, 3
    found = agreement(labels, reference)
    assert found.changed == pytest.approx(400 / 6000)
    assert found.classes == 1  # class 2 is small in the reference, class 3 is not there
    assert found.dice_min == found.dice_mean == pytest.approx(2 * 1800 / (1800 + 2000))
    with pytest.raises(ValueError, match="one shape"):
        agreement(labels, reference[1:])


def test_phantom_and_random_weights_are_the_same_each_time(tmp_path: Path) -> None:
    first, second = phantom_ct((40, 30, 20)), phantom_ct((40, 30, 20))
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.int16
    assert first.min() < -900 < 0 < first.max()
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        arguments = {"feature_size": 12, "depths": [1] * 4}
        root = random_bundle(tmp_path / name / "r", "swin_unetr", arguments, classes=3, roi_size=(64, 32, 32))
        bundle = load_bundle(root)
        digests.add(bundle.sha256)
        assert bundle.network().state_dict()
    assert len(digests) == 1
    with pytest.raises(UsageError, match=r"--roi: swin_unetr does not take 65x32x32; 96x32x32 is near"):
        random_bundle(tmp_path / "r", "swin_unetr", {"feature_size": 12}, classes=3, roi_size=(65, 32, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--image, --size: one of the two is needed"),
        (["--size", "9x9x9", "--image", "scan.nii"], "--image, --size: one of the two is needed"),
        (["--size", "9x9"], "--size: '9x9' is not three positive numbers"),
        (["--size", "9x9x9", "--spacing", "0x1x1"], "--spacing: '0x1x1' is not three positive numbers"),
        (["--size", "9x9x9", "--bundle", "a", "--architecture", "quant"], "--bundle, --architecture: both given"),
        (["--size", "9x9x9", "--classes", "3"], "belong to --architecture"),
        (["--size", "9x9x9", "--against", "nnunetv2"], "--against: 'nnunetv2' is not known"),
        (["--size", "9x9x9", "--overlap", "1"], "--overlap: 1.0 is not in"),
        (["--size", "9x9x9", "--architecture", "unet"], "--architecture: unknown architecture 'unet'"),
        (
            ["--size", "9x9x9", "--architecture", "swin_unetr", "--network", "[1]"],
            "--network: [1] is not a JSON object",
        ),
        (["--size", "9x9x9", "--architecture", "swin_unetr", "--network", '{"size": 3}'], "--network: swin_unetr: "),
        (["--size", "9x9x9", "--architecture", "quant", "--network", '{"size": 3}'], "--network: quant takes no"),
        (["--size", "9x9x9", "--json", "figures.txt"], "figures.txt: suffix '.txt' is not known"),
        (["--size", "9x9x9", "--bundle", "nowhere"], "bundle 'nowhere': not found"),
    ],
)
def test_wrong_use_is_one_line_before_anything_is_measured(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["speed", *options])
    assert isinstance(result.exception, MedsegError)
    assert message in str(result.exception)
