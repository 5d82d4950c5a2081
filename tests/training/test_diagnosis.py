"""Training with patients.csv: regions, a run that goes on as if never stopped, a folder that is a bundle."""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medseg
from medseg.bundles.load import load_bundle
from medseg.bundles.spec import BundleSpec
from medseg.checkpoints.files import read
from medseg.errors import InputError, Interrupted, OutputError, UsageError
from medseg.inference.diagnosis import PatientData, centre_of, diagnose, roi_at
from medseg.inference.preprocess import preprocess
from medseg.io.read import read_volume
from medseg.networks.mdpformer import Diagnosis, MDPFormer
from medseg.phantom.dataset import write_dataset
from medseg.phantom.pancreas import Options
from medseg.training.config import TrainingConfig
from medseg.training.dataset import Dataset, read_dataset
from medseg.training.diagnosis import PatientCase, derive_spec, sample
from medseg.training.loop import Progress
from medseg.training.patients import Patient
from medseg.training.run import train

_CPU = torch.device("cpu")
TINY: dict[str, Any] = {"channels": [4, 6, 8], "fold": True, "hidden_size": 16, "num_heads": 2, "free_tokens": 1}


def config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "architecture": "mdpformer",
        "network": TINY,
        "roi_size": (32, 24, 16),
        "spacing": (6.0, 6.0, 6.0),
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 2e-3,
        "warmup_steps": 1,
        "holdout": 0.25,
        "ema_decay": 0.5,
    }
    return TrainingConfig(**(settings | changes))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms") / "set"
    write_dataset(root, 9, 0, Options(lookalikes=False))
    return root


def test_a_stopped_run_goes_on_as_if_it_had_not_been(phantoms: Path, tmp_path: Path) -> None:
    whole = train(config(), phantoms, tmp_path / "whole")

    def stop(progress: Progress, _share: float) -> None:
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config(), phantoms, tmp_path / "parts", report=stop)
    # The run knows what it is; what the command line says by default does not count.
    parts = train(TrainingConfig(architecture="swin_unetr", steps=1), phantoms, tmp_path / "parts", resume=True)
    assert (whole.step, parts.step) == (4, 4)
    assert parts.loss == whole.loss
    first, second = (read(tmp_path / name / "models" / "model.pt") for name in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)

    with pytest.raises(OutputError, match="holds a run already"):
        train(config(), phantoms, tmp_path / "whole")
    with pytest.raises(InputError, match="nothing to resume"):
        train(config(), phantoms, tmp_path / "none", resume=True)


def test_the_run_folder_is_a_bundle_that_names_classes_and_phases(phantoms: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(config(), phantoms, root)
    with (root / "metrics.csv").open() as stream:
        row = list(csv.DictReader(stream))[-1]
    assert 0 <= float(row["accuracy"]) <= 1
    assert {"balanced_accuracy", "accuracy_without_metadata", "dice_pancreas", "dice_lesion"} <= set(row)
    bundle = load_bundle(root)
    assert bundle.spec.labels == {0: "background", 1: "pancreas", 2: "lesion"}
    described = bundle.metadata["diagnosis"]
    assert list(described["classes"])[:2] == ["normal", "PDAC"]
    assert described["phases"] == ["CT NC", "CT A", "CT V"]
    assert sum(described["training_patients"].values()) == bundle.metadata["medseg"]["training_cases"] == 7
    assert "not for clinical use" in bundle.metadata["data_source"]

    image = phantoms / "imagesTr" / "pancreas_00003.nii.gz"
    segmented = medseg.infer(image, bundle=root)
    volume = read_volume(image, channels=3)
    assert segmented.label_map.shape == volume.shape
    network = bundle.network()
    assert isinstance(network, MDPFormer)
    found = diagnose(preprocess(volume, bundle.spec).image, network, bundle.spec, PatientData(31.0, 1), _CPU)
    assert found.probabilities.shape == found.without_metadata.shape == (9,)
    assert found.probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_a_run_that_never_began_leaves_its_folder_free(phantoms: Path, tmp_path: Path) -> None:
    root, run = tmp_path / "set", tmp_path / "run"
    shutil.copytree(phantoms, root)
    (root / "labelsTr" / "pancreas_00004.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match="pancreas_00004"):
        train(config(holdout=0.0, steps=1), root, run)
    (root / "patients.csv").write_text("case,age,sex,class\n")
    with pytest.raises(InputError, match="9 cases have no row"):
        train(config(), root, run)
    with pytest.raises(UsageError, match="--devices"):
        train(config(), phantoms, run, devices=2, device="cpu")
    assert not run.exists()


def test_the_s_path_alone_is_trained_where_nobody_is_to_be_diagnosed(phantoms: Path, tmp_path: Path) -> None:
    alone = {**TINY, "patient_classes": 0}
    train(config(network=alone, steps=1, holdout=0.0, spacing=(9.0, 9.0, 9.0)), phantoms, tmp_path / "first")
    spec = load_bundle(tmp_path / "first").spec
    assert len(spec.labels) == 10
    train(config(steps=1, weights=str(tmp_path / "first" / "models" / "model.pt")), phantoms, tmp_path / "second")
    assert load_bundle(tmp_path / "second").spec.network_args["patient_classes"] == 9


def test_settings_of_other_trainings_and_wrong_arguments_are_refused(phantoms: Path) -> None:
    dataset = read_dataset(phantoms)
    for change, problem in (
        ({"mirror_axes": (0,)}, "--mirror"),
        ({"soft_labels": "maps"}, "--soft-labels"),
        ({"optimizer": "sgd"}, "--optimizer"),
        ({"workers": 2}, "--workers"),
        ({"intensity": "zscore"}, "--intensity"),
        ({"network": {"hidden_size": 20}}, "multiple of 8"),
        ({"network": {"patient_classes": 4}}, "patient_classes is not 9"),
    ):
        with pytest.raises(UsageError, match=problem):
            derive_spec(config(**change), dataset, 9)
    spec = derive_spec(TrainingConfig(architecture="mdpformer", steps=1), dataset, 9)
    assert (spec.roi_size, spec.spacing) == ((64, 48, 32), (3.0, 3.0, 3.0))
    assert sum(p.numel() for p in MDPFormer(**spec.network_args).parameters()) == 1_422_554


def _patients(count: int) -> tuple[list[PatientCase], BundleSpec]:
    dataset = Dataset(Path(), "one", ("NC", "A", "V"), {0: "background", 1: "pancreas"}, ())
    spec = derive_spec(config(), dataset, 9)
    cases = []
    for number in range(count):
        image = torch.full((3, 40, 30, 20), float(number + 1), dtype=torch.float16)
        label = torch.zeros((40, 30, 20), dtype=torch.uint8)
        label[20, 15, 10] = 1
        cases.append(PatientCase(str(number), image, label, (20, 15, 10), Patient(number, 50.0 + number, number % 2)))
    return cases, spec


def test_regions_come_once_an_epoch_the_same_in_every_run_and_moved_a_little() -> None:
    cases, spec = _patients(5)
    drawn = [sample(cases, spec, 7, number) for number in range(20)]
    for epoch in range(4):
        assert sorted(int(one["target"]) for one in drawn[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    again = sample(cases, spec, 7, 13)
    assert all(torch.equal(again[key].nan_to_num(), drawn[13][key].nan_to_num()) for key in again)
    places = {tuple(int(axis) for axis in one["label"][0].nonzero()[0]) for one in drawn}
    assert len(places) > 10
    middle = np.array(spec.roi_size) // 2
    assert max(abs(np.array(place) - middle).max() for place in places) == 3
    for one in drawn:
        assert one["image"].shape == (3, *spec.roi_size)
        value = float(one["image"][0, 16, 12, 8])
        assert abs(value - (int(one["target"]) + 1)) <= 0.08 * (int(one["target"]) + 1) + 0.08
        assert float(one["age"]) == 50.0 + int(one["target"]) or math.isnan(float(one["age"]))


def test_a_region_beyond_the_scan_is_filled() -> None:
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    region = roi_at(image, (0, 1, 3), (4, 3, 4), -9)
    assert region.shape == (1, 4, 3, 4)
    assert torch.equal(region[0, 2:, :, :3], image[0, :, :, 1:])
    assert (region[0, :2] == -9).all()
    assert (region[0, :, :, 3] == -9).all()
    assert (roi_at(image, (50, 1, 1), (4, 3, 4), -9) == -9).all()


def test_the_centre_is_that_of_the_largest_part() -> None:
    mask = np.zeros((20, 20, 20), dtype=bool)
    mask[2:7, 4:9, 10:15] = True
    mask[18, 18, 18] = True
    assert centre_of(mask) == (4, 6, 12)
    assert centre_of(np.zeros((3, 3, 3), dtype=bool)) is None


class _Fixed(MDPFormer):
    """Says what it is told to: a segmentation and a class."""

    def __init__(self, lesion: slice, named: int) -> None:
        super().__init__(patient_classes=9, **TINY)
        self.lesion, self.named = lesion, named
        self.s_path.forward = self._segment  # type: ignore[method-assign]

    def _segment(self, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = torch.zeros(len(image), 3, *image.shape[2:])
        logits[:, 0] = 1
        logits[:, 2, self.lesion] = 2
        return logits, []

    def forward(self, image: torch.Tensor, *_told: Any) -> Any:
        classes = torch.zeros(len(image), 9)
        classes[:, self.named] = 3
        return Diagnosis(image, classes, image)


@pytest.mark.parametrize(
    ("lesion", "named", "flags"),
    [
        (slice(4, 8), 2, ()),
        (slice(4, 8), 0, ("disagreement",)),  # a lesion is drawn, and the patient called healthy
        (slice(0, 0), 2, ("organ_not_found", "disagreement")),  # the other way round
        (slice(0, 0), 0, ("organ_not_found",)),
    ],
)
def test_segmentation_and_class_that_disagree_are_flagged(lesion: slice, named: int, flags: tuple[str, ...]) -> None:
    _, spec = _patients(0)
    network = _Fixed(lesion, named).eval()
    found = diagnose(torch.zeros(3, *spec.roi_size), network, spec, PatientData(), _CPU)
    assert found.flags == flags
    assert int(found.probabilities.argmax()) == named


def test_a_patient_without_phases_is_refused_and_an_absent_one_has_no_effect() -> None:
    _, spec = _patients(0)
    torch.manual_seed(0)
    network = MDPFormer(**spec.network_args).eval()
    image = torch.randn(3, *spec.roi_size)
    told = PatientData(60.0, 0, (False, True, True))
    other = image.clone()
    other[0] = math.nan
    one, two = (diagnose(scan, network, spec, told, _CPU) for scan in (image, other))
    np.testing.assert_array_equal(one.probabilities, two.probabilities)
    np.testing.assert_array_equal(one.labels, two.labels)
    for phases in ((False, False, False), (True, True)):
        with pytest.raises(ValueError, match="at least one"):
            diagnose(image, network, spec, PatientData(phases=phases), _CPU)
