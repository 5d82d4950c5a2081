"""`medseg train --devices N`: several processes train one network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.checkpoints.files import read
from medseg.errors import DeviceError, InputError, UsageError
from medseg.training.config import TrainingConfig
from medseg.training.data import _Share
from medseg.training.job import Listeners
from medseg.training.launch import check_devices, train_on_devices
from medseg.training.rank import Rank
from medseg.training.run import train
from tests.builders import blob_dataset, save_scan

SMALL: dict[str, Any] = {
    "architecture": "dynunet",
    "network": {"filters": [4, 8, 12], "deep_supervision": False},
    "roi_size": (16, 16, 16),
    "batch_size": 4,
    "steps": 4,
    "holdout": 0.25,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "validate_minutes": 60.0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blob_dataset(tmp_path_factory.mktemp("data") / "balls")


def test_ranks_share_the_numbers_of_each_batch() -> None:
    parts = [iter(_Share(3, 4, Rank(number, 2))) for number in range(2)]
    assert [[next(part) for _ in range(4)] for part in parts] == [[12, 13, 16, 17], [14, 15, 18, 19]]
    alone = iter(_Share(3, 4, Rank()))
    assert [next(alone) for _ in range(5)] == [12, 13, 14, 15, 16]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_a_resumed_run_may_have_another_number(
    data: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(**SMALL)
    alone = train(config, data, tmp_path / "alone", device="cpu")
    seen: list[int] = []
    together = train(
        config,
        data,
        tmp_path / "together",
        device="cpu",
        devices=2,
        report=lambda progress, _share: seen.append(progress.step),
    )
    assert seen == [1, 2, 3, 4]
    assert together.loss == pytest.approx(alone.loss, abs=1e-5)
    assert together.dice == pytest.approx(alone.dice, abs=1e-3)
    first, second = (dict(read(tmp_path / name / "models" / "model.pt")) for name in ("alone", "together"))
    for key, value in first.items():  # four steps of 1e-2 move a weight by far more than this tolerance
        torch.testing.assert_close(second[key], value, atol=2e-4, rtol=1e-3, msg=key)
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == [
        "configs",
        "last.pt",
        "metrics.csv",
        "models",
        "tensorboard",
    ]
    assert (tmp_path / "together" / "metrics.csv").read_text().count("\n") == 2
    # Both have done all steps; a longer schedule, written into the run, is gone on with by one process alone.
    path = tmp_path / "together" / "configs" / "train.json"
    described = json.loads(path.read_text())
    described["training"]["steps"] = 5
    path.write_text(json.dumps(described))
    assert train(config, data, tmp_path / "together", device="cpu", resume=True).step == 5


@pytest.mark.slow
def test_what_one_rank_refuses_is_the_error_of_the_run_and_its_folder_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = blob_dataset(tmp_path / "broken", cases=3)
    label = np.zeros((34, 50, 33), dtype=np.uint8)
    label[5, 5, 5] = 7
    save_scan(broken / "labelsTr" / "case_1.nii.gz", label)
    monkeypatch.setattr("medseg.training.run.train_cases", lambda job, *_: train_on_devices(job, 1, "cpu", Listeners()))
    with pytest.raises(InputError, match=r"label values \[7\]"):
        train(TrainingConfig(**SMALL), broken, tmp_path / "run", device="cpu")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_sigterm_to_the_run_saves_it_and_leaves_no_process_behind(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "medseg", "train", "--data", str(data), "-o", str(run), "--devices", "2"]
    command += ["--architecture", "dynunet", "--network", json.dumps(SMALL["network"]), "--roi", "16x16x16"]
    command += ["--steps", "1000000", "--device", "cpu", "--threads", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step" in line:
                break
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 143, rest
    assert rest.strip().splitlines()[-1].startswith("error: stopped by SIGTERM"), rest
    assert time.monotonic() - begin < 60
    for _ in range(100):  # Python's own tracker of semaphores ends a moment later
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process was left behind")
    state = torch.load(run / "last.pt", weights_only=True)  # noqa: TID251
    assert state["progress"]["step"] >= 1


def test_devices_that_cannot_share_the_work_are_refused_before_anything_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="4 crops cannot be divided by 3"):
        train(TrainingConfig(**SMALL), data, tmp_path / "run", device="cpu", devices=3)
    with pytest.raises(UsageError, match="cuda:1"):
        check_devices(2, "cuda:1", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="2 asked for, 1 CUDA"):
        check_devices(2, "auto", 4)
    assert check_devices(2, "cpu", 4) == "cpu"
    assert not (tmp_path / "run").exists()
