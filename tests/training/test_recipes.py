"""`medseg train --bundle NAME`: the recipes of the paper bundles start, and what the command line says wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from medseg.bundles.load import load_bundle
from medseg.bundles.locate import shipped_bundles
from medseg.bundles.spec import BundleSpec, read_spec
from medseg.cli.train import train
from medseg.errors import BundleError, InputError, MedsegError, UsageError
from medseg.training.config import TrainingConfig
from medseg.training.run import load_run
from tests.builders import blob_dataset, save_scan
from tests.training.test_architectures import TINY

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(train)

PAPER = {
    "dformer_synapse": ("32x64x64", {}),
    "paratranscnn_synapse": ("1x32x32", {}),
    "swin_umamba_abdomenmri": ("1x64x64", {}),
    "swin_umamba_d_abdomenmri": ("1x64x64", {}),
    "swin_unetr_brats21": ("32x32x64", {}),
    "swin_unetr_btcv": ("32x32x64", {}),
    "transunet_synapse": (
        "1x64x64",
        {"img_size": 64, "grid": [4, 4], "skip_channels": [256, 128, 32, 16]},
    ),
}


def small_data(root: Path, spec: BundleSpec) -> Path:
    """One case with all labels of a bundle, its channels in their order."""
    random, shape = np.random.default_rng(0), (24, 26, 10)
    labels = np.zeros(shape, dtype=np.uint8)
    for number, value in enumerate(spec.labels):
        labels[:, number : number + 2, 2:8] = value
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    images = [f"imagesTr/a_{index:04d}.nii.gz" for index in range(spec.in_channels)]
    for image in images:
        save_scan(root / image, (random.normal(0, 40, shape) + 10.0 * labels).astype(np.float32), affine)
    save_scan(root / "labelsTr" / "a.nii.gz", labels, affine)
    described = {
        "modality": {str(index): name for index, name in enumerate(spec.channels)},
        "labels": {str(value): name for value, name in spec.labels.items()},
        "training": [{"image": images, "label": "labelsTr/a.nii.gz"}],
    }
    (root / "dataset.json").write_text(json.dumps(described))
    return root


def run(*arguments: object) -> str:
    """What the command prints; its failure is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, MedsegError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_recipe_of_every_paper_starts_on_data_of_its_kind(name: str, tmp_path: Path) -> None:
    root = shipped_bundles() / name
    spec, recipe = read_spec(root), json.loads((root / "configs" / "train.json").read_text())["training"]
    roi, own = PAPER[name]
    tiny: dict[str, Any] = TINY[spec.network].network | own
    data = small_data(tmp_path / "data", spec)
    options = ["--steps", 1, "--batch-size", 1, "--roi", roi, "--network", json.dumps(tiny), "--augment", "{}"]
    run("--bundle", name, "--data", data, "-o", tmp_path / "run", *options)
    config, made = load_run(tmp_path / "run")
    # The command line wins, the recipe holds for the rest, and the bundle decides how the network sees a scan.
    assert (config.steps, config.batch_size, config.bundle) == (1, 1, name)
    settings = json.loads(config.model_dump_json())
    meant = json.loads(TrainingConfig(**recipe).model_dump_json())  # with what was added since it was written
    for key in recipe.keys() - {"steps", "batch_size", "network", "bundle"}:
        assert settings[key] == meant[key], key
    assert made.network_args.items() >= {**spec.network_args, **recipe["network"], **tiny}.items()
    assert made.roi_size == tuple(int(size) for size in roi.split("x"))
    for key in ("orientation", "spacing", "intensity", "labels", "channels", "slices", "regions", "padding_value"):
        assert getattr(made, key) == getattr(spec, key), key
    load_bundle(tmp_path / "run").network()


def test_options_on_the_command_line_win_over_the_recipe_and_its_length(tmp_path: Path) -> None:
    spec = read_spec(shipped_bundles() / "swin_unetr_btcv")
    data = small_data(tmp_path / "data", spec)
    options = ["--roi", "32x32x64", "--network", json.dumps(TINY["swin_unetr"].network), "--batch-size", 1]
    options += ["--max-time", "0.1s", "--learning-rate", "0.003", "--spacing", "4x4x4", "--intensity", "range:-100,100"]
    options += ["--augment", '{"flip_probability": 0.25}', "--mirror", "0"]
    run("--bundle", "swin_unetr_btcv", "--data", data, "-o", tmp_path / "run", *options)
    config, made = load_run(tmp_path / "run")
    assert (config.steps, config.max_minutes) == (None, pytest.approx(0.1 / 60))
    assert (config.learning_rate, config.mirror_axes, config.weight_decay) == (0.003, (0,), 1e-5)
    assert (config.augmentation.flip_probability, config.augmentation.rot90_probability) == (0.25, 0.2)
    assert made.spacing == (4.0, 4.0, 4.0)
    assert [type(step).__name__ for step in made.intensity] == ["ScaleIntensityRange"]
    assert made.mirror_axes == spec.mirror_axes  # flips in training do not allow them in inference


def test_data_that_a_bundle_was_not_made_for_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    spec = read_spec(shipped_bundles() / "swin_unetr_brats21")
    balls, brains = blob_dataset(tmp_path / "balls", cases=1), small_data(tmp_path / "brains", spec)
    given = ("-o", tmp_path / "run", "--steps", 1)
    with pytest.raises(InputError, match=r"not the labels of swin_unetr_btcv \(0 background, 1 spleen"):
        run("--bundle", "swin_unetr_btcv", "--data", balls, *given)
    described = json.loads((brains / "dataset.json").read_text())
    described["modality"] = {"0": "T1", "1": "T1ce", "2": "FLAIR", "3": "T2"}
    (brains / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="put them in order"):
        run("--bundle", "swin_unetr_brats21", "--data", brains, *given)
    with pytest.raises(InputError, match="without gaps"):
        run("--data", brains, *given)
    with pytest.raises(UsageError, match="leave it out"):
        run("--bundle", "swin_unetr_brats21", "--architecture", "dformer", "--data", brains, *given)
    with pytest.raises(UsageError, match="decides about slices"):
        run("--bundle", "transunet_synapse", "--neighbours", 1, "--data", brains, *given)
    with pytest.raises(BundleError, match="not found"):
        run("--bundle", "nobody", "--data", brains, *given)
    assert not (tmp_path / "run").exists()
