"""`medseg train --soft-labels`: probabilities of other networks as targets beside the label maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from medseg.bundles.load import Bundle
from medseg.bundles.spec import SliceSpec
from medseg.cli.batch import batch as batch_command
from medseg.cli.train import train as train_command
from medseg.errors import InputError
from medseg.training.augment import crop_transform
from medseg.training.config import Augmentation, Loss, TrainingConfig
from medseg.training.data import CachedCase, CropStream, SoftLabels, cache_case
from medseg.training.dataset import read_dataset
from medseg.training.losses import IGNORE, SegmentationLoss
from tests.builders import blob_dataset, conv_network, tiny_bundle, tiny_spec

app = typer.Typer()
app.command("batch")(batch_command)
app.command("train")(train_command)

STILL = {name: 0.0 for name in Augmentation.model_fields if name.endswith("probability")}


def _config(**changes: Any) -> TrainingConfig:
    settings = {"architecture": "swin_unetr", "steps": 1, "augmentation": STILL, "soft_labels": "there"}
    return TrainingConfig(**(settings | changes))


def test_the_loss_is_lowest_at_the_target_and_sees_only_what_was_annotated() -> None:
    torch.manual_seed(0)
    target = torch.randn(2, 3, 6, 6, 6).softmax(dim=1)
    hidden = torch.rand(2, 1, 6, 6, 6) < 0.3
    target = target.masked_fill(hidden, 0)
    for settings in (Loss(), Loss(include_background=True, batch=True)):
        loss = SegmentationLoss(settings, tiny_spec())
        logits = target.clamp(min=1e-6).log().requires_grad_()
        best = loss(logits, target)
        best.backward()
        assert logits.grad is not None
        assert float(logits.grad.abs().max()) < 1e-5
        best, logits = best.detach(), logits.detach()
        for step in (0.3, -0.3):
            assert float(loss(logits + step * torch.randn_like(logits), target)) > float(best)
        changed = torch.where(hidden, torch.randn_like(logits), logits)
        assert float(loss(changed, target)) == pytest.approx(float(best), abs=1e-6)
    # A coarser output is compared with the mean of the voxels that it stands for.
    mean = target.reshape(2, 3, 3, 2, 3, 2, 3, 2).mean(dim=(3, 5, 7))
    wanted = (2 * float(loss(logits, target)) + float(loss(mean.log(), mean))) / 3
    assert float(loss([logits, mean.log()], target)) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("sliced", [False, True])
def test_a_crop_holds_the_probabilities_of_its_own_voxels(sliced: bool) -> None:
    torch.manual_seed(0)
    soft = torch.randn(3, 20, 30, 12).softmax(dim=0)
    label = soft.argmax(dim=0).to(torch.uint8)
    label[:, :, 0] = IGNORE
    # The image is the probability itself, so that it tells which voxels of the crop are which.
    case = CachedCase("a", soft[1:2].clone(), label, soft[1:].masked_fill(label == IGNORE, 0).half())
    changes = {"roi_size": (1, 32, 16), "slices": SliceSpec(0, "none", 1)} if sliced else {"roi_size": (16, 32, 16)}
    spec = tiny_spec(padding_value=-1.0, **changes)
    stream = CropStream([case], spec, crop_transform(_config(), spec), seed=0)
    for number in range(6):
        crop = stream[number]
        image, found = crop["image"][1 if sliced else 0], crop["label"]
        assert found.dtype == torch.float32
        assert found.shape == (3, 32, 16) if sliced else (3, 16, 32, 16)
        padding, ignored = image == -1, found.sum(dim=0) == 0
        assert torch.equal(found[:, padding], torch.tensor([1.0, 0, 0])[:, None].expand(3, int(padding.sum())))
        assert bool(ignored.any())
        assert float((found.sum(dim=0) - 1).masked_fill(ignored, 0).abs().max()) < 1e-6
        assert float((found[1] - image).masked_fill(ignored | padding, 0).abs().max()) < 1e-3


def _write(path: Path, maps: np.ndarray, affine: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(maps.transpose(1, 2, 3, 0), affine), path)


def test_label_map_and_maps_are_mixed_on_the_scan_and_come_to_the_model_s_grid_together(tmp_path: Path) -> None:
    case = read_dataset(blob_dataset(tmp_path / "data", cases=1)).cases[0]
    reference = nib.load(case.label)
    drawn = np.asarray(reference.dataobj)
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.ones(3), drawn.shape).transpose(3, 0, 1, 2).astype(np.float32)
    soft = SoftLabels(tmp_path, 0.25)
    _write(soft.of(case), maps, reference.affine)
    same = cache_case(case, tiny_spec(), soft=soft)
    assert same.soft is not None
    wanted = 0.25 * maps[1:] + 0.75 * np.stack([drawn == 1, drawn == 2])
    assert float((same.soft.float() - torch.from_numpy(wanted)).abs().max()) < 1e-3
    finer = cache_case(case, tiny_spec(spacing=(0.5, 0.5, 0.5)), soft=soft)
    assert finer.soft is not None
    assert finer.soft.shape[1:] == finer.label.shape
    assert float((finer.soft[:, ::2, ::2, ::2].float() - torch.from_numpy(wanted)).abs().max()) < 1e-3

    _write(soft.of(case), 2 * maps, reference.affine)
    with pytest.raises(InputError, match="do not sum to 1"):
        cache_case(case, tiny_spec(), soft=soft)
    moved = reference.affine.copy()
    moved[0, 3] += 3
    _write(soft.of(case), maps, moved)
    with pytest.raises(InputError, match="another grid"):
        cache_case(case, tiny_spec(), soft=soft)


def test_what_a_batch_wrote_is_learned_from_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, bundle = blob_dataset(tmp_path / "data", cases=3), tiny_bundle(tmp_path)
    monkeypatch.setattr(Bundle, "network", conv_network)
    given = ["batch", str(data / "imagesTr"), "-o", str(tmp_path / "maps"), "--bundle", str(bundle), "--probabilities"]
    assert CliRunner().invoke(app, given).exit_code == 0
    network = json.dumps({"feature_size": 12, "window_size": 4, "depths": [1, 1, 1, 1]})
    train = ["train", "--data", str(data), "--steps", "1", "--batch-size", "1", "--network", network, "-q"]
    train += ["--soft-labels", str(tmp_path / "maps")]
    assert CliRunner().invoke(app, [*train, "-o", str(tmp_path / "run")]).exit_code == 0
    (tmp_path / "maps" / "case_1_seg_probabilities.nii.gz").unlink()
    missing = CliRunner().invoke(app, [*train, "-o", str(tmp_path / "other")])
    assert isinstance(missing.exception, InputError)
    assert "case_1_seg_probabilities.nii.gz" in str(missing.exception)
    assert not (tmp_path / "other" / "configs").exists()
