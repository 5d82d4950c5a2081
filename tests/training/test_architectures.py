"""`medseg train --architecture NAME` for every architecture: it learns, and its run folder segments."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medseg
from medseg.bundles.spec import SliceSpec
from medseg.errors import UsageError
from medseg.inference.slice_inferer import SliceInferer
from medseg.networks import names
from medseg.networks.facts import read_facts
from medseg.networks.fit import fit
from medseg.training.augment import crop_transform
from medseg.training.config import Augmentation, TrainingConfig
from medseg.training.data import CachedCase, CropStream
from medseg.training.dataset import read_dataset
from medseg.training.run import derive_spec, train
from tests.builders import blob_dataset, tiny_spec

STILL = {name: 0.0 for name in Augmentation.model_fields if name.endswith("probability")}


@dataclass(frozen=True)
class Tiny:
    """A small network and a few steps, enough to see that it learns."""

    network: dict[str, Any]
    steps: int = 24
    rate: float = 2e-3
    settings: dict[str, Any] = field(default_factory=dict)


TINY = {
    "dformer": Tiny({"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}, rate=4e-3),
    "dynunet": Tiny({"filters": [4, 8, 12]}, rate=4e-3),
    "mdpformer": Tiny({"channels": [8, 12, 16], "fold": True}, rate=1e-2),
    "paratranscnn": Tiny(
        {"dim": 16, "heads": 2, "depth": [1, 1, 1], "cnn_width": 8, "cnn_blocks": [1, 1, 1, 1]},
        settings={"batch_size": 4},
    ),
    "plain_conv_unet": Tiny({"features_per_stage": [8, 12, 16], "strides": [1, 2, 2]}, rate=1e-2),
    "resenc_unet": Tiny({"features_per_stage": [4, 8, 12], "strides": [1, 2, 2], "n_blocks_per_stage": 1}, rate=4e-3),
    "swin_umamba": Tiny(
        {
            "feature_sizes": [8, 8, 16, 32, 64],
            "encoder_dims": [8, 16, 32, 64],
            "hidden_size": 64,
            "encoder_depths": [1, 1, 1, 1],
            "d_state": 4,
        },
        settings={"batch_size": 4},
    ),
    "swin_umamba_d": Tiny(
        {"dims": [16, 32, 64, 128], "encoder_depths": [1, 1, 1, 1], "decoder_depths": [1, 1, 1], "d_state": 4},
        settings={"batch_size": 4},
    ),
    "swin_unetr": Tiny({"feature_size": 12, "window_size": 4, "depths": [1, 1, 1, 1]}),
    "transunet": Tiny(
        {
            "hidden_size": 48,
            "mlp_dim": 96,
            "num_heads": 4,
            "num_layers": 1,
            "resnet_num_layers": [1, 1, 1],
            "resnet_width_factor": 0.5,
            "decoder_channels": [32, 16, 16, 16],
            "head_channels": 32,
            "dropout_rate": 0.0,
        },
        settings={"batch_size": 4, "neighbours": 1},
    ),
}


def _config(architecture: str, **changes: Any) -> TrainingConfig:
    tiny = TINY[architecture]
    settings: dict[str, Any] = {
        "architecture": architecture,
        "network": tiny.network,
        "steps": tiny.steps,
        "batch_size": 1,
        "holdout": 0.0,
        "validate_minutes": 60.0,
        "learning_rate": tiny.rate,
        "warmup_steps": 1,
        "ema_decay": 0.0,
        "foreground_share": 1.0,
        "augmentation": STILL,
    }
    return TrainingConfig(**(settings | tiny.settings | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blob_dataset(tmp_path_factory.mktemp("data") / "balls", cases=2)


def test_every_architecture_is_tried() -> None:
    assert sorted(TINY) == names()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(TINY))
def test_the_loss_falls_and_the_run_folder_segments(
    architecture: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medseg.training import loop

    losses: list[float] = []
    step = loop.Trainer._step
    monkeypatch.setattr(loop.Trainer, "_step", lambda *args: (losses.append(step(*args)), losses[-1])[1])
    train(_config(architecture), data, tmp_path / "run")
    # A dead network stays where it is; the first steps are those before it can have learned anything.
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:2]), losses
    result = medseg.infer(data / "imagesTr" / "case_0.nii.gz", bundle=tmp_path / "run", probabilities=True)
    assert result.label_map.shape == (34, 50, 33)
    assert result.probabilities is not None
    assert float(result.probabilities.std()) > 1e-3


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_a_legal_window_is_found_for_any_size(architecture: str) -> None:
    dims, given = read_facts(architecture).spatial_dims[0], TINY[architecture].network
    for wanted in ((1,) * dims, (33, 17, 5)[:dims], (64, 48, 40)[-dims:]):
        found = fit(architecture, wanted, in_channels=1, out_channels=3, given=given)
        assert all(size >= n for size, n in zip(found.size, wanted, strict=True))
        network = medseg.networks.create(architecture, **found.arguments).eval()
        with torch.inference_mode():
            logits = network(torch.zeros(1, 1, *found.size))
        logits = logits if isinstance(logits, torch.Tensor) else logits[0]
        assert logits.shape == (1, 3, *found.size)


def test_slices_are_cut_along_the_thickest_voxels_or_where_the_user_says(data: Path) -> None:
    dataset = read_dataset(data)

    def spec(**changes: Any) -> tuple[SliceSpec | None, tuple[int, int, int]]:
        found = derive_spec(_config("paratranscnn", **changes), dataset, dataset.cases)
        return found.slices, found.roi_size

    assert spec() == (SliceSpec(0), (1, 64, 48))  # 34 x 50 x 33 voxels of 1 mm
    assert spec(spacing=(1.0, 1.0, 4.0)) == (SliceSpec(2), (48, 64, 1))
    assert spec(slice_axis=1, neighbours=1, resize="smooth") == (SliceSpec(1, "smooth", 1), (48, 1, 48))
    assert spec(roi_size=(32, 32, 1)) == (SliceSpec(2), (32, 32, 1))
    with pytest.raises(UsageError, match="not 1 along"):
        spec(slice_axis=0, roi_size=(32, 32, 1))
    with pytest.raises(UsageError, match="height is 33"):
        spec(roi_size=(1, 33, 32))
    with pytest.raises(UsageError, match="takes no slices"):
        derive_spec(_config("dformer", neighbours=1), dataset, dataset.cases)
    with pytest.raises(UsageError, match="5 channels"):
        spec(neighbours=2)
    with pytest.raises(UsageError, match="medseg networks list"):
        derive_spec(_config("dformer").model_copy(update={"architecture": "unet"}), dataset, dataset.cases)


@pytest.mark.parametrize(("axis", "neighbours"), [(0, 0), (1, 1), (2, 1)])
def test_every_augmentation_works_on_slices_and_keeps_them_apart(axis: int, neighbours: int) -> None:
    always = dict.fromkeys(STILL, 1.0)
    shape = [20, 30, 40]
    shape[axis] = 9
    # Each slice has a value of its own: a turn out of the plane would mix them.
    values = torch.arange(9.0).reshape([9 if index == axis else 1 for index in range(3)])
    image = values.expand(shape)[None].clone()
    label = torch.zeros(shape, dtype=torch.uint8)
    label.select(axis, 4).fill_(1)
    roi = tuple(1 if index == axis else 32 for index in range(3))
    spec = tiny_spec(roi_size=roi, slices=SliceSpec(axis, neighbours=neighbours), padding="replicate")
    for augmentation in (always, {**STILL, "affine_probability": 1.0}):
        config = _config("paratranscnn", network={}, augmentation=augmentation, mirror_axes=(0, 1, 2))
        stream = CropStream([CachedCase("a", image, label)], spec, crop_transform(config, spec), seed=0)
        for number in range(6):
            crop = stream[number]
            assert crop["image"].shape == (2 * neighbours + 1, 32, 32)
            assert bool(torch.isfinite(crop["image"]).all())
    moved = crop["image"]
    # Where it is not the padding that a turn brings in, a slice has one value.
    assert all(float((channel - channel[16, 16]).abs().max()) < 1e-4 for channel in moved)
    assert bool((crop["label"] == 1).any()) == bool(moved[neighbours, 16, 16] == 4)


@pytest.mark.parametrize(("resize", "step"), [("none", 1), ("published", 1), ("none", 2)])
def test_training_and_inference_give_the_network_the_same_slices(resize: Any, step: int) -> None:
    image = torch.rand(1, 6, 20, 30)
    label = torch.randint(0, 3, (6, 20, 30)).to(torch.uint8)
    spec = tiny_spec(roi_size=(1, 32, 32), slices=SliceSpec(0, resize, 1, step), padding_value=-3.0)
    config = _config("paratranscnn", network={}, foreground_share=0.5)
    stream = CropStream([CachedCase("a", image, label)], spec, crop_transform(config, spec), seed=0)
    seen: list[torch.Tensor] = []

    def network(slices: torch.Tensor) -> torch.Tensor:
        seen.extend(slices)
        return slices[:, :1]

    SliceInferer.of(spec)(image[None], network)
    for number in range(12):
        crop = stream[number]
        assert crop["image"].shape == (3, 32, 32)
        assert crop["label"].shape == (1, 32, 32)
        nearest = min(float((crop["image"] - one).abs().max()) for one in seen)
        assert nearest < 1e-5
