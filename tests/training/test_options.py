"""Options of a run beyond its network: a start from weights, a held encoder, voxels to be ignored, any kind of data."""

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

import medseg
from medseg.bundles.pack import pack_bundle
from medseg.bundles.spec import SliceSpec
from medseg.checkpoints.files import read
from medseg.checkpoints.load import load_pretrained
from medseg.cli.train import train as train_command
from medseg.errors import BundleError, InputError, UsageError
from medseg.evaluation.compare import evaluate
from medseg.io.read import read_labels
from medseg.networks import names
from medseg.networks.fit import fit
from medseg.networks.registry import create, network_class
from medseg.training.augment import foreground_indices
from medseg.training.config import Loss, TrainingConfig
from medseg.training.data import cache_cases
from medseg.training.dataset import read_dataset
from medseg.training.job import Start
from medseg.training.losses import IGNORE, SegmentationLoss
from medseg.training.run import train
from tests.builders import blob_dataset, save_scan, tiny_spec
from tests.training.test_architectures import TINY

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(train_command)

SMALL: dict[str, Any] = {
    "architecture": "dynunet",
    "network": {"filters": [4, 8, 12]},
    "roi_size": (16, 16, 16),
    "batch_size": 2,
    "steps": 2,
    "holdout": 0.0,
    "ema_decay": 0.0,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
}


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**(SMALL | changes))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(read(run / "models" / "model.pt"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blob_dataset(tmp_path_factory.mktemp("data") / "balls", cases=2)


@pytest.mark.parametrize("name", names())
def test_every_architecture_says_which_tensors_are_its_encoder_s(name: str) -> None:
    from importlib import import_module

    from medseg.networks.facts import read_facts

    dims = read_facts(name).spatial_dims[0]
    given = TINY[name].network if name in TINY else {}
    found = fit(name, (64,) * dims, in_channels=1, out_channels=3, given=given)
    keys = create(name, **found.arguments).state_dict().keys()
    prefixes = import_module(network_class(name).__module__).ENCODER
    inside = [key for key in keys if key.startswith(prefixes)]
    assert 0 < len(inside) < len(keys)
    assert all(any(key.startswith(prefix) for key in keys) for prefix in prefixes)
    assert not any(word in key for key in inside for word in ("head.classify", "seg_layers", "out_layers", "decoder"))


@pytest.mark.parametrize("architecture", ["dynunet", "paratranscnn"])
def test_a_held_encoder_keeps_the_weights_it_was_given_then_learns_also_after_a_stop(
    architecture: str, data: Path, tmp_path: Path
) -> None:
    from importlib import import_module

    changes: dict[str, Any] = {"architecture": architecture, "network": TINY[architecture].network}
    if architecture == "paratranscnn":  # its encoder has batch norms, whose statistics are held too
        changes |= {"roi_size": (1, 32, 32)}
    encoder = import_module(network_class(architecture).__module__).ENCODER
    train(config(**changes, steps=1), data, tmp_path / "first")
    first = weights(tmp_path / "first")
    start = str(tmp_path / "first" / "models" / "model.pt")
    seen: list[Start] = []
    held = config(**changes, weights=start, freeze_encoder=2, steps=2)
    train(held, data, tmp_path / "held", started=seen.append)
    assert (seen[0].frozen, seen[0].steps) == (sum(key.startswith(encoder) for key in first), 2)
    after = weights(tmp_path / "held")
    for key, value in first.items():
        if key.startswith(encoder):
            assert torch.equal(after[key], value), key
    assert any(not torch.equal(after[key], value) for key, value in first.items() if not key.startswith(encoder))
    names_file = (tmp_path / "held" / "weights.txt").read_text()
    assert f"frozen: {seen[0].frozen} tensors for the first 2 steps" in names_file
    assert all(f"  {key}\n" in names_file for key in first)
    # The run goes on for two more steps, in which the encoder learns.
    path = tmp_path / "held" / "configs" / "train.json"
    described = json.loads(path.read_text())
    described["training"]["steps"] = 4
    path.write_text(json.dumps(described))
    train(held, data, tmp_path / "held", resume=True)
    later = weights(tmp_path / "held")
    assert all(not torch.equal(later[key], first[key]) for key in first if key.startswith(encoder) and "weight" in key)


def test_a_run_starts_from_a_bundle_by_name_and_the_command_says_what_was_taken(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(), data, tmp_path / "run")
    pack_bundle(tmp_path / "run", "balls", tmp_path / "mine")
    monkeypatch.setenv("MEDSEG_BUNDLES", str(tmp_path / "mine"))
    options = ["--architecture", "dynunet", "--network", '{"filters": [4, 8, 12]}', "--roi", "16x16x16", "--steps", "1"]
    two = blob_dataset(tmp_path / "two", cases=2, labels=2)
    command = ["--data", str(two), "-o", str(tmp_path / "next"), *options]
    done = CliRunner().invoke(app, [*command, "--weights", "balls", "--freeze-encoder", "1"])
    assert done.exit_code == 0, done.output
    shown = " ".join(done.output.split())
    assert "start: balls taken 41 adapted 0" in shown
    assert "left 4 output_block.conv.conv.weight, output_block.conv.conv.bias, deep_supervision_heads.0" in shown
    assert "the encoder, for the first 1 steps" in shown
    given, taken = weights(tmp_path / "mine" / "balls"), weights(tmp_path / "next")
    assert torch.equal(taken["input_block.conv1.conv.weight"], given["input_block.conv1.conv.weight"].float())
    with pytest.raises(BundleError, match="no such file, and no bundle"):
        train(config(weights="nobody"), data, tmp_path / "none")
    with pytest.raises(BundleError, match="ships without weights"):
        train(config(weights="transunet_synapse"), data, tmp_path / "none")
    alone = CliRunner().invoke(app, [*command, "--freeze-encoder", "3"])
    assert isinstance(alone.exception, UsageError)
    assert not (tmp_path / "none").exists()


def test_weights_for_fewer_neighbours_compute_the_same_until_the_further_slices_are_learned() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"spatial_dims": 2, "filters": [4, 8, 12], "out_channels": 3}
    few, many = (create("dynunet", **settings, in_channels=channels).eval() for channels in (6, 10))
    slices = torch.randn(1, 10, 32, 32)  # five slices of two channels each
    report = load_pretrained(many, few.state_dict(), slice_stack=10)
    assert report.adapted == ("input_block.conv1.conv.weight: zeros for slices further off",)
    with torch.no_grad():
        torch.testing.assert_close(many(slices), few(slices[:, 2:8]))
    with pytest.raises(BundleError, match=r"input_block\.conv1"):
        load_pretrained(many, few.state_dict())
    with pytest.raises(BundleError, match=r"input_block\.conv1"):
        load_pretrained(few, many.state_dict(), slice_stack=6)  # fewer slices than they were learned with


def test_ignored_voxels_change_neither_the_loss_nor_its_gradient() -> None:
    torch.manual_seed(0)
    spec = tiny_spec()
    label = torch.randint(0, 3, (2, 1, 6, 6, 6))
    hidden = torch.rand(label.shape) < 0.3
    for settings in (Loss(), Loss(include_background=True, squared=True, batch=True)):
        loss = SegmentationLoss(settings, spec)
        logits = torch.randn(2, 3, 6, 6, 6, requires_grad=True)
        changed = torch.where(hidden, torch.randn_like(logits), logits.detach()).requires_grad_()
        one = loss(logits, label.masked_fill(hidden, IGNORE))
        other = loss(changed, ((label + 1) % 3).where(hidden, label).masked_fill(hidden, IGNORE))
        assert one.item() == pytest.approx(other.item(), abs=1e-6)
        one.backward()
        assert logits.grad is not None
        assert float(logits.grad.masked_select(hidden.expand_as(logits)).abs().max()) == 0.0
        assert float(logits.grad.abs().max()) > 0.0
    nothing = loss(logits, torch.full_like(label, IGNORE))
    assert bool(torch.isfinite(nothing))


def test_the_loss_is_dice_and_cross_entropy_also_over_coarser_outputs_and_overlapping_regions() -> None:
    from monai.losses import DiceCELoss, DiceLoss

    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 8, 8, 8), torch.randint(0, 3, (2, 1, 8, 8, 8))
    known = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    own = SegmentationLoss(Loss(), tiny_spec())
    assert float(own(logits, label)) == pytest.approx(float(known(logits, label)), abs=1e-6)
    half = torch.randn(2, 3, 4, 4, 4)
    coarse = label[:, :, 1::2, 1::2, 1::2]
    wanted = (2 * float(known(logits, label)) + float(known(half, coarse))) / 3
    assert float(own([logits, half], label)) == pytest.approx(wanted, abs=1e-6)
    first = SegmentationLoss(Loss(output_weights=(4, 0), factor=0.5), tiny_spec())
    assert float(first([logits, half], label)) == pytest.approx(0.5 * float(known(logits, label)), abs=1e-6)
    slices = SegmentationLoss(Loss(), tiny_spec(slices=SliceSpec(0), roi_size=(1, 8, 8)))
    assert slices.dice.batch
    from medseg.bundles.locate import shipped_bundles
    from medseg.bundles.spec import read_spec

    tumor = torch.tensor([0, 1, 2, 4])[torch.randint(0, 4, (2, 1, 8, 8, 8))]
    regions = SegmentationLoss(Loss(), read_spec(shipped_bundles() / "swin_unetr_brats21"))
    core, whole, enhancing = (torch.isin(tumor, torch.tensor(part)) for part in ([1, 4], [1, 2, 4], [4]))
    target = torch.cat([core, whole, enhancing], dim=1).float()
    assert float(regions(logits, tumor)) == pytest.approx(float(DiceLoss(sigmoid=True)(logits, target)), abs=1e-6)


def test_a_data_set_with_a_label_to_be_ignored_is_trained_and_evaluated_without_it(tmp_path: Path) -> None:
    root = blob_dataset(tmp_path / "partly", cases=2)
    path = root / "dataset.json"
    described = json.loads(path.read_text())
    described["labels"] |= {"3": "ignore"}
    path.write_text(json.dumps(described))
    label = root / "labelsTr" / "case_0.nii.gz"
    values = np.asarray(nib.load(label).dataobj).copy()
    values[:, :20] = 3
    save_scan(label, values)
    dataset = read_dataset(root)
    assert (dict(dataset.labels), dataset.ignore) == ({0: "background", 1: "ball 1", 2: "ball 2"}, 3)
    spec = tiny_spec(labels=dataset.labels, spacing=(1.5, 1.5, 1.5))
    cached = cache_cases(dataset.cases, spec, ignore=dataset.ignore)[0].label
    assert set(cached.unique().tolist()) == {0, 2, IGNORE} | ({1} if bool((cached == 1).any()) else set())
    assert (cached[:, :12] == IGNORE).all()
    assert not (cached[:, 15:] == IGNORE).any()
    foreground, background = foreground_indices(cached[None].numpy())
    assert not np.intersect1d(np.flatnonzero(cached.numpy() == IGNORE), np.union1d(foreground, background)).size
    train(config(holdout=0.5), root, tmp_path / "run")
    result = medseg.infer(root / "imagesTr" / "case_0.nii.gz", bundle=tmp_path / "run", probabilities=True)
    assert result.probabilities is not None
    assert result.probabilities.shape[0] == 3
    # Whatever was predicted where nothing is annotated does not count.
    (tmp_path / "predicted").mkdir()
    guess = values.copy()
    guess[:, :20] = 1
    save_scan(tmp_path / "predicted" / "case_0.nii.gz", guess)
    scores = evaluate(tmp_path / "predicted", root / "labelsTr", read=read_labels, cases=["case_0"])
    assert {score.name: score.dice for score in scores.cases[0].labels if score.dice is not None} == {
        name: 1.0 for value, name in ((1, "ball 1"), (2, "ball 2")) if (values == value).any()
    }
    described["labels"] = {"0": "background", "1": "ignore", "2": "ball", "3": "cube"}
    path.write_text(json.dumps(described))
    with pytest.raises(InputError, match="not the highest value"):
        read_dataset(root)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("binary", {}),
        ("multi-class, slices", {"network": {"filters": [4, 8, 12], "spatial_dims": 2}, "roi_size": (1, 16, 16)}),
        ("two channels", {}),
        ("several spacings", {"roi_size": None}),
        ("a label that a case lacks", {"holdout": 0.5}),
        ("nothing labelled in a case", {"foreground_share": 1.0}),
        ("several outputs", {"architecture": "dformer", "roi_size": (32, 64, 32), "batch_size": 1}),
    ],
)
def test_data_of_many_kinds_train_and_segment(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    root = blob_dataset(tmp_path / "data", cases=2, labels=2 if kind == "binary" else 3)
    if kind == "two channels":
        described = json.loads((root / "dataset.json").read_text())
        described["modality"] = {"0": "T1", "1": "T2"}
        (root / "dataset.json").write_text(json.dumps(described))
        for path in (root / "imagesTr").iterdir():
            image = np.asarray(nib.load(path).dataobj)
            save_scan(path, np.stack([image, -image], axis=-1))
    if kind == "several spacings":
        for folder in ("imagesTr", "labelsTr"):
            path = root / folder / "case_1.nii.gz"
            save_scan(path, np.asarray(nib.load(path).dataobj)[:, :, ::3], np.diag([1.0, 1.0, 3.0, 1.0]))
    if kind in ("a label that a case lacks", "nothing labelled in a case"):
        path = root / "labelsTr" / "case_1.nii.gz"
        values = np.asarray(nib.load(path).dataobj).copy()
        values[values > (1 if "lacks" in kind else 0)] = 0
        save_scan(path, values)
    if kind == "several outputs":
        changes = {**changes, "network": {**TINY["dformer"].network, "deep_supervision": True}}
    train(config(**changes), root, tmp_path / "run")
    result = medseg.infer(root / "imagesTr" / "case_1.nii.gz", bundle=tmp_path / "run", probabilities=True)
    assert result.label_map.shape == ((34, 50, 11) if kind == "several spacings" else (34, 50, 33))
    assert result.probabilities is not None
    assert result.probabilities.shape[0] == (2 if kind == "binary" else 3)
    assert bool(np.isfinite(result.probabilities).all())


def test_a_data_set_without_any_label_is_refused(tmp_path: Path) -> None:
    root = blob_dataset(tmp_path / "data", cases=1)
    save_scan(root / "labelsTr" / "case_0.nii.gz", np.zeros((34, 50, 33), dtype=np.uint8))
    with pytest.raises(InputError, match="no voxel of the training cases has a label"):
        train(config(), root, tmp_path / "run")


def test_the_average_forgets_the_random_weights_it_began_with(data: Path, tmp_path: Path) -> None:
    train(config(steps=6, ema_decay=0.999), data, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)  # noqa: TID251
    key = "input_block.conv1.conv.weight"
    now, average = state["network"][key], state["average"]["module." + key]
    assert not torch.equal(now, average)
    assert float((now - average).norm()) < 0.1 * float(now.norm())
