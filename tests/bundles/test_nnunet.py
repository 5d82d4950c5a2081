"""Models of nnU-Net v2 as bundles: the labels of nnU-Net's own predictor, and what is refused.

The models and nnU-Net's labels in ``tests/golden/nnunet`` were made by ``tests/golden/make_nnunet.py``.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import medseg
from medseg.bundles.import_nnunet import import_nnunet
from medseg.bundles.load import load_bundle
from medseg.bundles.spec import config_of, parse_spec, read_json
from medseg.bundles.verify import verify_bundle
from medseg.cli.bundles import app
from medseg.errors import BundleError, MedsegError, OutputError, UsageError
from tests.builders import HIPPOCAMPUS, tiny_bundle
from tests.golden.make_nnunet import CT, HERE, MODELS, predict, scan_of


def dice(found: np.ndarray, wanted: np.ndarray) -> dict[int, float]:
    """Dice of each label but the background that occurs in either."""
    values = sorted({*np.unique(found).tolist(), *np.unique(wanted).tolist()} - {0})
    return {v: 2 * ((found == v) & (wanted == v)).sum() / ((found == v).sum() + (wanted == v).sum()) for v in values}


def written_scan(name: str, folder: Path) -> Path:
    """The scan of a model as a file."""
    if name == "thick_ct" and not CT.is_dir():
        pytest.skip(f"the shared CT is not at {CT}")
    nib.save(scan_of(name)[0], folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_labels_are_those_of_nnunets_predictor(name: str, tmp_path: Path) -> None:
    model, scan = MODELS[name], written_scan(MODELS[name].scan, tmp_path)
    wanted = np.load(HERE / name / "labels.npz")
    runs = [("mirrored", model.folds, model.mirror is not None)]
    if name == "slices":  # quick
        runs.append(("plain", model.folds[:1], False))
    for kind, folds, tta in runs:
        made = import_nnunet(HERE / name, tmp_path, name=f"{name}_{kind}", folds=folds)
        found = medseg.infer(scan, bundle=made.root, tta=tta)
        agreed = dice(found.label_map, wanted[kind])
        assert set(agreed) == {1, 2}, kind
        assert min(agreed.values()) >= 0.999, (kind, agreed)
        assert found.label_map.shape == nib.load(scan).shape


def test_labels_are_those_of_nnunets_predictor_on_another_scan(tmp_path: Path) -> None:
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    cases = sorted((HIPPOCAMPUS / "imagesTr").glob("*.nii.gz")) if HIPPOCAMPUS.is_dir() else []
    if not cases:
        pytest.skip(f"the shared hippocampus data are not at {HIPPOCAMPUS}")
    made = import_nnunet(HERE / "fullres", tmp_path, name="fullres")
    wanted = predict(HERE / "fullres", cases[7], mirroring=True, folds=made.folds)
    agreed = dice(medseg.infer(cases[7], bundle=made.root, tta=True).label_map, wanted)
    assert set(agreed) == {1, 2}
    assert min(agreed.values()) >= 0.999, agreed


def test_a_bundle_of_nnunet_is_complete_and_says_what_it_is(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["import-nnunet", str(HERE / "regions"), "-o", str(tmp_path), "--name", "parts"])
    assert run.exit_code == 0, run.output
    assert f"{tmp_path / 'parts'}: folds 0; try: medseg infer SCAN --tta --bundle {tmp_path / 'parts'}" in run.output
    assert [check for check in verify_bundle(tmp_path / "parts") if not check.passed] == []
    bundle = load_bundle(tmp_path / "parts")
    spec = bundle.spec
    assert (spec.network, spec.activation, spec.mirror_axes) == ("resenc_unet", "sigmoid", (2,))
    assert spec.labels == {0: "background", 1: "bright", 2: "brightest"}
    assert [(region.name, region.label) for region in spec.regions] == [("bright", 1), ("brightest", 2)]
    assert spec.nnunet is not None
    assert spec.nnunet.axes == (2, 1, 0)
    assert spec.nnunet.normalization[0].inside
    config = read_json(bundle.root / "configs" / "inference.json")
    assert parse_spec(bundle.metadata, {**config, **config_of(spec)}, tmp_path) == spec
    trained = read_json(bundle.root / "configs" / "train.json")["nnunet"]
    assert (trained["trainer"], trained["configuration"]) == ("nnUNetTrainer", "3d_lowres")
    shown = CliRunner().invoke(app, ["show", str(bundle.root), "--json"])
    assert json.loads(shown.output)["nnunet"]["spacing"] == [1.3, 1.3, 1.3]


def test_outside_the_box_of_nonzero_voxels_background_is_certain(tmp_path: Path) -> None:
    scan = written_scan("framed", tmp_path)
    made = import_nnunet(HERE / "regions", tmp_path)
    found = medseg.infer(scan, bundle=made.root, tta=True, probabilities=True, uncertainty=True)
    assert found.probabilities is not None
    assert found.uncertainty is not None
    zero = nib.load(scan).get_fdata() == 0
    outside = (
        zero.all(axis=(0, 1))[None, None] | zero.all(axis=(0, 2))[None, :, None] | zero.all(axis=(1, 2))[:, None, None]
    )
    assert outside.any()
    assert not found.probabilities[:, outside].any()
    assert not found.uncertainty[outside].any()
    labels = np.where(found.probabilities[1] > 0.5, 2, np.where(found.probabilities[0] > 0.5, 1, 0))
    assert np.array_equal(labels, found.label_map)
    assert medseg.infer(scan, bundle=made.root, tta=True).label_map.tolist() == found.label_map.tolist()


def test_probabilities_add_up_and_decide_the_labels(tmp_path: Path) -> None:
    scan = written_scan("hippocampus", tmp_path)
    made = import_nnunet(HERE / "slices", tmp_path)
    found = medseg.infer(scan, bundle=made.root, probabilities=True)
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities.sum(axis=0), 1, atol=1e-5)
    assert np.array_equal(found.probabilities.argmax(axis=0), found.label_map)


def test_several_folds_are_the_mean_of_their_logits(tmp_path: Path) -> None:
    networks = {
        name: load_bundle(import_nnunet(HERE / "fullres", tmp_path, name=name, folds=folds).root).network()
        for name, folds in (("both", ()), ("first", ("0",)), ("second", ("1",)))
    }
    window = torch.randn(1, 1, 24, 32, 20)
    with torch.inference_mode():
        mean = (networks["first"](window) + networks["second"](window)) / 2
        torch.testing.assert_close(networks["both"](window), mean)
    assert load_bundle(tmp_path / "both").spec.folds == 2


def test_beside_another_bundle_it_gives_probabilities(tmp_path: Path) -> None:
    scan = written_scan("hippocampus", tmp_path)
    made = import_nnunet(HERE / "slices", tmp_path)
    other = tiny_bundle(tmp_path, "other", labels={0: "background", 1: "bright", 2: "brightest"})
    found = [medseg.infer(scan, bundle=root, probabilities=True).probabilities for root in (made.root, other)]
    both = medseg.infer(scan, bundle=[made.root, other], probabilities=True).probabilities
    assert both is not None
    # The way back is linear in logits for the model alone, and in probabilities beside others.
    assert np.abs(both - (found[0] + found[1]) / 2).mean() < 0.01
    assert min(np.abs(both - one).mean() for one in found) > 0.05


def _plans(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def applied(folder: Path) -> None:
        plans = json.loads((folder / "plans.json").read_text())
        change(plans["configurations"]["3d_fullres"])
        (folder / "plans.json").write_text(json.dumps(plans))

    return applied


def _dataset(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def applied(folder: Path) -> None:
        dataset = json.loads((folder / "dataset.json").read_text())
        change(dataset)
        (folder / "dataset.json").write_text(json.dumps(dataset))

    return applied


def _checkpoint(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def applied(folder: Path) -> None:
        path = folder / "fold_0" / "checkpoint_final.pth"
        content = torch.load(path, weights_only=False)  # noqa: TID251, the project's own file
        change(content)
        torch.save(content, path)

    return applied


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1/0",)


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda folder: (folder / "plans.json").unlink(), "no model folder of nnU-Net v2: it has no plans.json"),
        (lambda folder: (folder / "dataset.json").unlink(), "it has no dataset.json"),
        (lambda folder: shutil.rmtree(folder / "fold_0"), "no fold with checkpoint_final.pth"),
        (
            _plans(lambda c: c.update(normalization_schemes=["MyNorm"])),
            "the normalization is 'MyNorm'; medseg knows ZSc",
        ),
        (
            _plans(lambda c: c.update(previous_stage="3d_lowres")),
            "second stage of a cascade, which takes the labels of",
        ),
        (
            _plans(lambda c: c["architecture"].update(network_class_name="my_package.MyNet")),
            "the network is my_package.MyNet; medseg knows PlainConvUNet",
        ),
        (_plans(lambda c: c["architecture"]["arch_kwargs"].update(nonlin="torch.nn.GELU")), "the network uses GELU"),
        (_plans(lambda c: c.update(resampling_fn_data="resample_torch")), "resampling_fn_data is 'resample_torch'"),
        (_plans(lambda c: c.update(preprocessor_name="Mine")), "preprocessor_name is 'Mine'"),
        (_plans(lambda c: c["resampling_fn_data_kwargs"].update(order=2)), "resampling of order 2"),
        (_plans(lambda c: c.pop("patch_size")), "'patch_size' is missing"),
        (_plans(lambda c: c["architecture"]["arch_kwargs"].update(features_per_stage=[6, 12, 20])), "does not fit"),
        (_dataset(lambda d: d["labels"].update(brightest=3)), r"labels \[0, 1, 3\]; .* without a gap"),
        (
            _checkpoint(lambda c: c["init_args"].update(configuration="3d_cascade")),
            "holds no configuration '3d_cascade'",
        ),
        (_checkpoint(lambda c: c.pop("init_args")), "no checkpoint of nnU-Net v2"),
        (_checkpoint(lambda c: c.update(logging=_Hostile())), "could run code"),
    ],
)
def test_what_medseg_does_not_run_is_refused_in_one_line(
    break_it: Callable[[Path], None], problem: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(HERE / "thin", folder)
    break_it(folder)
    with pytest.raises(BundleError, match=problem) as refused:
        import_nnunet(folder, tmp_path / "bundles", name="thin")
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "bundles").glob("*")) if (tmp_path / "bundles").exists() else True


@pytest.mark.parametrize(
    ("given", "error", "problem"),
    [
        ({"folds": ("3",)}, BundleError, r"no fold_3/checkpoint_final.pth; there are folds 0"),
        ({"name": "My Model"}, UsageError, "not made of a-z, 0-9 and _"),
        ({"checkpoint": "../x.pth"}, UsageError, "is no file name"),
    ],
)
def test_a_wrong_request_is_named(
    given: dict[str, Any], error: type[MedsegError], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=problem):
        import_nnunet(HERE / "thin", tmp_path, **given)


def test_the_folder_above_the_models_is_refused_with_their_names(tmp_path: Path) -> None:
    shutil.copytree(HERE / "thin", tmp_path / "data" / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    with pytest.raises(BundleError, match=r"give one of its folders: nnUNetTrainer__nnUNetPlans__3d_fullres"):
        import_nnunet(tmp_path / "data", tmp_path)


def test_a_bundle_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    first = import_nnunet(HERE / "thin", tmp_path)
    assert first.root.name == "dataset999_golden_3d_fullres"
    with pytest.raises(OutputError, match="exists; use --overwrite"):
        import_nnunet(HERE / "thin", tmp_path)
    assert import_nnunet(HERE / "thin", tmp_path, overwrite=True).root == first.root
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.root.name]


def test_a_trainer_of_one_s_own_is_imported_with_a_note(tmp_path: Path) -> None:
    shutil.copytree(HERE / "thin", tmp_path / "model")
    _checkpoint(lambda c: c.update(trainer_name="MyTrainer"))(tmp_path / "model")
    made = import_nnunet(tmp_path / "model", tmp_path, name="mine")
    assert made.note == "trained by MyTrainer, which may have changed the network: compare a scan with nnUNetv2_predict"
    assert "Trained by MyTrainer" in (made.root / "docs" / "README.md").read_text()


def test_plans_of_older_versions_name_the_same_network(tmp_path: Path) -> None:
    shutil.copytree(HERE / "thin", tmp_path / "model")

    def older(configuration: dict[str, Any]) -> None:
        stated = configuration.pop("architecture")["arch_kwargs"]
        configuration.update(
            UNet_class_name="PlainConvUNet",
            UNet_base_num_features=6,
            unet_max_num_features=18,
            n_conv_per_stage_encoder=stated["n_conv_per_stage"],
            n_conv_per_stage_decoder=stated["n_conv_per_stage_decoder"],
            conv_kernel_sizes=stated["kernel_sizes"],
            pool_op_kernel_sizes=stated["strides"],
        )

    new = load_bundle(import_nnunet(HERE / "thin", tmp_path, name="new").root)
    _plans(older)(tmp_path / "model")
    old = load_bundle(import_nnunet(tmp_path / "model", tmp_path, name="old").root)
    assert old.spec.network == new.spec.network
    assert {k: list(v) if isinstance(v, list) else v for k, v in old.spec.network_args.items()} == new.spec.network_args
    assert pickle.dumps(old.spec.nnunet) == pickle.dumps(new.spec.nnunet)
