"""`medseg train`: data, schedule, restart, and the run folder as a bundle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medseg
from medseg.bundles.pack import pack_bundle
from medseg.bundles.spec import ScaleIntensityRange, SliceSpec
from medseg.bundles.verify import verify_bundle
from medseg.checkpoints.files import read
from medseg.errors import InputError, OutputError, UsageError
from medseg.inference.sliding_window import pad_to_window
from medseg.training.augment import crop_transform
from medseg.training.config import Augmentation, TrainingConfig
from medseg.training.data import CachedCase, CropStream, cache_cases
from medseg.training.dataset import read_dataset
from medseg.training.fingerprint import derive_intensity, derive_roi, derive_spacing, fingerprint
from medseg.training.loop import Progress, learning_rate
from medseg.training.run import divide, train
from tests.builders import blob_dataset, save_scan, tiny_spec

TINY = {"feature_size": 12, "window_size": 4, "depths": [1, 1, 1, 1]}


def _config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "architecture": "swin_unetr",
        "network": TINY,
        "steps": 6,
        "batch_size": 1,
        "holdout": 0.25,
        "validate_minutes": 60.0,
        "learning_rate": 2e-3,
        "warmup_steps": 1,
    }
    return TrainingConfig(**(settings | changes))


def _state(path: Path) -> dict[str, torch.Tensor]:
    return dict(read(path))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blob_dataset(tmp_path_factory.mktemp("data") / "balls")


@pytest.mark.slow
def test_a_run_learns_and_its_folder_is_a_bundle_that_can_be_packed(data: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    run = tmp_path / "run"
    config = _config(steps=30, ema_decay=0.8, mirror_axes=(0,))
    train(config, data, run, report=lambda progress, _share: losses.append(progress.loss))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert (run / "metrics.csv").read_text().startswith("step,minutes,learning_rate,loss,mean_dice,dice_ball 1")
    assert len(list((run / "tensorboard").iterdir())) > 0
    scan = data / "imagesTr" / "case_0.nii.gz"
    before = medseg.infer(scan, bundle=run)
    packed = pack_bundle(run, "balls", tmp_path / "packed")
    assert all(check.passed for check in verify_bundle(packed))
    after = medseg.infer(scan, bundle=packed)
    assert after.record.bundle.name == "balls"
    assert (after.label_map == before.label_map).mean() > 0.999  # float16 weights
    assert (packed / "models" / "model.pt").stat().st_size < 0.6 * (run / "models" / "model.pt").stat().st_size
    with pytest.raises(OutputError, match="exists"):
        pack_bundle(run, "balls", tmp_path / "packed")
    with pytest.raises(UsageError, match="a-z"):
        pack_bundle(run, "Two Balls", tmp_path)


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_with_the_weights_of_an_undisturbed_one(data: Path, tmp_path: Path) -> None:
    train(_config(), data, tmp_path / "whole")

    class Stop(Exception):  # noqa: N818 - stands for a killed process
        pass

    def stop(progress: Progress, _share: float) -> None:
        if progress.step == 4:
            raise Stop

    saved = _config()
    with pytest.raises(Stop):
        _train_saving_each_step(saved, data, tmp_path / "killed", stop)
    end = train(saved, data, tmp_path / "killed", resume=True)
    assert end.step == 6
    whole, killed = (_state(tmp_path / name / "models" / "model.pt") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for key, value in whole.items():
        torch.testing.assert_close(killed[key], value, atol=1e-6, rtol=1e-5, msg=key)


def test_a_run_starts_from_the_weights_of_another_with_another_head(data: Path, tmp_path: Path) -> None:
    train(_config(steps=1), data, tmp_path / "first")
    weights = tmp_path / "first" / "models" / "model.pt"
    two = blob_dataset(tmp_path / "two", cases=2, labels=2)
    train(_config(steps=1, learning_rate=1e-9, weights=str(weights)), two, tmp_path / "second")
    first, second = _state(weights), _state(tmp_path / "second" / "models" / "model.pt")
    key = "swinViT.patch_embed.proj.weight"
    torch.testing.assert_close(second[key], first[key], atol=1e-6, rtol=0)
    packed = pack_bundle(tmp_path / "second", "second", tmp_path / "packed")
    assert json.loads((packed / "configs" / "train.json").read_text())["training"]["weights"] == "model.pt"
    assert first["out.conv.conv.weight"].shape[0] == 3
    assert second["out.conv.conv.weight"].shape[0] == 2


def _train_saving_each_step(config: TrainingConfig, data: Path, output: Path, report: Any) -> None:
    from medseg.training import loop

    interval, loop._SAVE_SECONDS = loop._SAVE_SECONDS, 0.0
    try:
        train(config, data, output, report=report)
    finally:
        loop._SAVE_SECONDS = interval


@pytest.mark.slow
def test_sigterm_saves_the_run_and_exits_with_143(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medseg", "train", "--data", str(data), "-o", str(tmp_path / "run")]
    command += ["--network", json.dumps(TINY), "--steps", "100000", "--batch-size", "1", "--quiet"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(600):
            if list((tmp_path / "run").glob("tensorboard/*")):
                break
            time.sleep(0.1)
        time.sleep(4)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert stderr.startswith("error: stopped by SIGTERM")
    assert stderr.count("\n") == 1
    assert (tmp_path / "run" / "last.pt").exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_padding_is_the_same_in_training_and_inference(data: Path) -> None:
    spec = tiny_spec(padding_value=-3.25, roi_size=(64, 64, 32))
    case = CachedCase("a", torch.rand(1, 34, 50, 33), torch.ones(34, 50, 33, dtype=torch.uint8))
    still = {name: 0.0 for name in Augmentation.model_fields if name.endswith("probability")}
    config = _config(augmentation=still)
    crop = CropStream([case], spec, crop_transform(config, spec), seed=0)[0]["image"]
    padded, _ = pad_to_window(case.image, spec.roi_size, spec.padding, spec.padding_value)
    assert crop.shape == (1, 64, 64, 32)
    assert torch.equal(crop[:, :15], padded[:, :15, :, :32])
    assert (crop[:, :15] == -3.25).all()


def test_crops_depend_on_their_number_alone_and_visit_every_case_each_epoch(data: Path) -> None:
    spec, dataset = tiny_spec(), read_dataset(data)
    cached = cache_cases(dataset.cases, spec)
    first, second = (CropStream(cached, spec, crop_transform(_config(), spec), seed=3) for _ in range(2))
    forward = [first[number]["image"] for number in range(8)]
    for number in reversed(range(8)):
        assert torch.equal(second[number]["image"], forward[number])
    assert len({float(crop.sum()) for crop in forward}) == 8
    other = CropStream(cached, spec, crop_transform(_config(), spec), seed=4)
    assert not torch.equal(other[0]["image"], forward[0])


@pytest.mark.parametrize("sliced", [False, True])
def test_a_warp_moves_image_and_label_together_by_about_as_much_as_it_says(sliced: bool) -> None:
    places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in (48, 48, 48)), indexing="ij"))
    # The image is the place itself, so that it tells where each voxel of the crop was taken from.
    case = CachedCase("a", places, (places.sum(dim=0) % 2).to(torch.uint8))
    still = {name: 0.0 for name in Augmentation.model_fields if name.endswith("probability")}
    still |= {"rotation": 0.0, "scale": 0.0, "translation": 0.0, "elastic_probability": 1.0, "elastic_voxels": 1.5}
    slices = {"roi_size": (1, 32, 32), "slices": SliceSpec(0)} if sliced else {}
    spec = tiny_spec(**{"roi_size": (32, 32, 32), "channels": ("x", "y", "z")} | slices)
    stream = CropStream([case], spec, crop_transform(_config(augmentation=still), spec), seed=0)
    moved = []
    for number in range(4):
        crop = stream[number]
        there = crop["image"][..., 8:-8, 8:-8]
        taken = crop["label"][0, ..., 8:-8, 8:-8]
        near = (there.round().sum(dim=0) % 2) == taken  # the nearest voxel's label, but for ties
        assert near.float().mean() > 0.99
        if sliced:
            assert there[0].unique().numel() == 1  # within its plane
            there, still_there = there[1:], places[1:, 0, :16, :16]
        else:
            there, still_there = there[:, 8:-8], places[:, :16, :16, :16]
        steps = (there - still_there).flatten(1)
        moved.append(float((steps - steps.mean(dim=1, keepdim=True)).std()))
    assert 0.7 < np.mean(moved) < 2.3
    assert torch.equal(stream[0]["image"], stream[0]["image"])


def test_the_schedule_warms_up_and_falls_to_zero_by_steps_or_by_the_clock() -> None:
    config = _config(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, Progress(step=step)) for step in range(101)]
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(rates[10], rel=0.05)
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    clock = _config(steps=None, max_minutes=10.0, warmup_steps=0, learning_rate=1.0, schedule="polynomial")
    assert learning_rate(clock, Progress(step=5, seconds=300)) == pytest.approx(0.5**0.9)
    with pytest.raises(ValueError, match="steps or max_minutes"):
        _config(steps=None)


def test_the_fingerprint_decides_spacing_window_and_intensity(tmp_path: Path) -> None:
    root = blob_dataset(tmp_path / "data", cases=3)
    dataset = read_dataset(root)
    found = fingerprint(dataset, dataset.cases)
    assert derive_spacing(found) == (1.0, 1.0, 1.0)
    assert derive_roi(found, (1.0, 1.0, 1.0)) == (32, 64, 32)
    steps, padding = derive_intensity(found, "MR")
    assert type(steps[0]).__name__ == "NormalizeIntensity"
    assert -6 < padding < -1
    (ct,), ct_padding = derive_intensity(found, "CT")
    low, high = np.percentile(found.foreground, [0.5, 99.5])
    assert (ct.a_min, ct.a_max) == pytest.approx((low, high), abs=0.1)
    assert ct_padding == 0.0
    assert derive_intensity(found, "MR", "range:-175,250") == ((ScaleIntensityRange(-175, 250),), 0.0)
    (percentiles,), _ = derive_intensity(found, "CT", "percentiles:1,99")
    assert (percentiles.lower, percentiles.upper) == (1, 99)
    for wrong in ("zscores", "range:5", "range:5,1", "percentiles:1,101", "range:a,b"):
        with pytest.raises(ValueError, match=wrong):
            derive_intensity(found, "MR", wrong)


def test_msd_and_nnunet_layouts_hold_the_same_cases(data: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    for case in read_dataset(data).cases:
        (raw / "imagesTr" / f"{case.name}_0000.nii.gz").symlink_to(case.images[0])
        (raw / "imagesTr" / f"{case.name}_0001.nii.gz").symlink_to(case.images[0])
        (raw / "labelsTr" / f"{case.name}.nii.gz").symlink_to(case.label)
    described = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "ball": 1},
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(described))
    dataset = read_dataset(raw)
    assert [case.name for case in dataset.cases] == [case.name for case in read_dataset(data).cases]
    assert len(dataset.cases[0].images) == 2
    assert dataset.labels == {0: "background", 1: "ball"}
    assert dataset.modality == "MR"
    with pytest.raises(InputError, match=r"label values \[2\] are not in dataset.json"):
        cache_cases(dataset.cases, tiny_spec(labels={0: "background", 1: "ball"}, channels=("T1", "T2")))


def test_unusable_data_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset\.json: no such file"):
        read_dataset(tmp_path)
    split = tmp_path / "split.json"
    split.write_text('{"train": ["case_0", "case_9"]}')
    with pytest.raises(InputError, match="case_9"):
        train(_config(), data, tmp_path / "run", split=split)
    with pytest.raises(UsageError, match="feature_size"):
        train(_config(network={"feature_size": 13}), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="nothing to resume"):
        train(_config(), data, tmp_path / "none", resume=True)
    broken = blob_dataset(tmp_path / "broken", cases=2)
    save_scan(broken / "labelsTr" / "case_1.nii.gz", np.zeros((5, 5, 5), dtype=np.uint8))
    with pytest.raises(InputError, match="grid"):
        cache_cases(read_dataset(broken).cases, tiny_spec())


def test_cases_held_out_are_never_learned_from(data: Path) -> None:
    cases = list(read_dataset(data).cases)
    learn, held_out = divide(cases, 0.25, seed=1)
    assert len(held_out) == 1
    assert sorted(case.name for case in learn + held_out) == [case.name for case in cases]
    assert divide(cases, 0.25, seed=1) == (learn, held_out)


def test_a_scan_is_cached_exactly_as_inference_sees_it(data: Path) -> None:
    from medseg.inference.preprocess import preprocess
    from medseg.io.read import read_volume

    case = read_dataset(data).cases[0]
    cached = cache_cases([case], tiny_spec())[0]
    assert torch.equal(cached.image, preprocess(read_volume(case.images[0]), tiny_spec()).image)
