"""The bundles of published networks: complete but for their weights, and ready for the authors' checkpoints."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import medseg
from medseg.bundles.load import Bundle, load_bundle
from medseg.bundles.locate import shipped_bundles
from medseg.bundles.verify import verify_bundle
from medseg.bundles.weights import import_weights
from medseg.checkpoints import load_published
from medseg.errors import BundleError
from medseg.networks import create, names, target_of
from medseg.networks.facts import read_facts
from tests.builders import SHARED
from tests.golden.cases import Case, find_cases

CT = SHARED / "data" / "ct" / "example_ct_sm.nii.gz"

# Each bundle, and the golden case whose state dict has the published keys and shapes.
PAPER = {
    "dformer_synapse": "synapse_64x128x128",
    "paratranscnn_synapse": "default_224",
    "swin_umamba_abdomenmri": "abdomen_mri",
    "swin_umamba_d_abdomenmri": "abdomen_mri",
    "swin_unetr_brats21": None,
    "swin_unetr_btcv": "current_btcv_f48",
    "transunet_synapse": "r50_vit_b16_224",
}


def _bundle(name: str) -> Bundle:
    return load_bundle(shipped_bundles() / name)


def test_every_architecture_has_a_paper_bundle() -> None:
    # Baselines of many sizes, and a paper that leaves the network open.
    without = {"dynunet", "mdpformer", "plain_conv_unet", "resenc_unet"}
    assert {_bundle(name).spec.network for name in PAPER} == set(names()) - without


@pytest.mark.parametrize("name", sorted(PAPER))
def test_a_paper_bundle_is_complete_but_for_its_weights(name: str) -> None:
    bundle = _bundle(name)
    assert [check for check in verify_bundle(bundle.root) if not check.passed] == []
    assert bundle.weights is None
    with pytest.raises(BundleError, match=rf"has no weights; the authors .*https://.*medseg weights import {name} "):
        bundle.network()
    config = json.loads((bundle.root / "configs" / "inference.json").read_text())
    assert config["network_def"]["_target_"] == target_of(bundle.spec.network)
    readme = (bundle.root / "docs" / "README.md").read_text()
    assert "ships without weights" in readme
    assert read_facts(bundle.spec.network).paper in readme
    assert len(bundle.spec.labels) == 1 + sum(f"| {value} | {text} |" in readme for value, text in _organs(bundle))


def _organs(bundle: Bundle) -> list[tuple[int, str]]:
    return [(value, text) for value, text in bundle.spec.labels.items() if value]


@pytest.mark.parametrize("name", sorted(name for name in PAPER if PAPER[name]))
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_the_published_keys_and_shapes_fit_the_bundles_configuration(name: str) -> None:
    spec = _bundle(name).spec
    found = [case for case in find_cases(spec.network) if case.path.stem == PAPER[name]]
    if not found:
        pytest.skip(f"the golden case {spec.network}/{PAPER[name]} is not there")
    state = _empty_state(found[0])
    # Building a network of this size on the meta device costs nothing; Swin UNETR's constructor computes and cannot.
    place: Any = contextlib.nullcontext() if spec.network == "swin_unetr" else torch.device("meta")
    with place:
        network = load_published(spec.network, spec.network_args, state)
    assert sum(p.numel() for p in network.parameters()) == found[0].description()["parameters"]
    state.pop(next(key for key in state if key.endswith("bias")))
    with place, pytest.raises(BundleError, match="missing: 1"):
        load_published(spec.network, spec.network_args, state)


def _empty_state(case: Case) -> dict[str, torch.Tensor]:
    """The case's keys and shapes, each tensor one zero that is repeated."""
    entries = [entry for entry in case.description()["state"] if entry[2] != "keep"]
    return {key: torch.zeros(()).expand(shape) for key, shape, _ in entries}


def test_the_recipes_settings_are_valid_and_for_their_own_bundle() -> None:
    from medseg.training.config import TrainingConfig

    for name in PAPER:
        train = json.loads((shipped_bundles() / name / "configs" / "train.json").read_text())
        assert train["published_recipe"]
        config, spec = TrainingConfig(**train["training"]), _bundle(name).spec
        assert (config.architecture, config.bundle) == (spec.network, name)
        assert (config.roi_size, config.spacing, config.intensity, config.slice_axis) == (None, None, None, None)
        assert config.network.keys() <= spec.network_args.keys()


def test_brain_tumor_regions_are_painted_as_published() -> None:
    spec = _bundle("swin_unetr_brats21").spec
    assert [(region.name, region.channel, region.label) for region in spec.regions] == [
        ("WT", 1, 2),
        ("TC", 0, 1),
        ("ET", 2, 4),
    ]
    assert spec.channels == ("FLAIR", "T1ce", "T1", "T2")


@pytest.mark.slow
@pytest.mark.skipif(not CT.is_file(), reason=f"{CT} is not there")
def test_an_imported_checkpoint_of_swin_unetr_segments_a_real_scan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create("swin_unetr", in_channels=1, out_channels=14, feature_size=12, merging="legacy")
    state = {"module." + key: value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 4999}, tmp_path / "swin_unetr.tiny_5000ep_f12_lr2e-4_pretrained.pt")
    root = import_weights(
        "swin_unetr_btcv",
        tmp_path / "swin_unetr.tiny_5000ep_f12_lr2e-4_pretrained.pt",
        network={"feature_size": 12},
        folder=tmp_path / "mine",
    )
    scan = nib.load(CT).slicer[20:84, 20:84]  # a window costs three seconds
    nib.save(scan, tmp_path / "part.nii.gz")
    result = medseg.infer(tmp_path / "part.nii.gz", bundle=root, overlap=0.0)
    _check_on_scan(result, scan)
    assert result.record.bundle.network == "swin_unetr"


@pytest.mark.slow
@pytest.mark.skipif(not CT.is_file(), reason=f"{CT} is not there")
def test_an_imported_checkpoint_of_transunet_segments_a_real_scan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = _bundle("transunet_synapse").spec
    network = create(spec.network, **spec.network_args)
    checkpoint = tmp_path / "epoch_149.pth"
    torch.save({"module." + key: value for key, value in network.state_dict().items()}, checkpoint)
    root = import_weights("transunet_synapse", checkpoint, folder=tmp_path / "mine")
    checkpoint.unlink()
    scan = nib.load(CT).slicer[:, :, :4]  # a slice costs a second
    nib.save(scan, tmp_path / "slab.nii.gz")
    result = medseg.infer(tmp_path / "slab.nii.gz", bundle=root)
    _check_on_scan(result, scan)
    assert result.record.windows == 4


def _check_on_scan(result: medseg.inference.run.Result, scan: Any) -> None:
    assert result.label_map.shape == scan.shape
    np.testing.assert_allclose(result.affine, scan.affine, atol=1e-4)
    assert set(np.unique(result.label_map)) <= set(result.labels)
    assert len(np.unique(result.label_map)) > 1
