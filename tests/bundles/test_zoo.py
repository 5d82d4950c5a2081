"""Bundles as MONAI's model zoo lays them out, against their own pipelines run by MONAI's ConfigParser."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser  # noqa: TID251  the other side of the comparison
from monai.data import decollate_batch, list_data_collate
from monai.networks import nets

import medseg
from medseg.bundles.load import load_bundle
from medseg.bundles.spec import KeepLargest, read_spec
from medseg.errors import BundleError
from medseg.inference.label_steps import apply_label_steps
from tests.builders import blob_scan, save_scan

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:monai"),
    pytest.mark.filterwarnings("ignore:Orientation axcodes:FutureWarning"),
]

OBLIQUE_CT = np.array([[-1.1, 0, 0, 30], [0, -0.9, 0, 20], [0, 0, 2.4, -50], [0, 0, 0, 1.0]])
SPLEEN = {0: "background", 1: "spleen"}
TUMOUR = {0: "Tumor core", 1: "Whole tumor", 2: "Enhancing tumor"}


def _compose(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": "Compose", "transforms": list(steps)}


def _around(network: dict[str, Any], before: Any, inferer: dict[str, Any], after: Any) -> dict[str, Any]:
    """The sections of an inference configuration, with what the zoo has around those that matter."""
    return {
        "imports": ["$import glob", "$import numpy", "$import os"],
        "bundle_root": ".",
        "image_key": "image",
        "output_dir": "$@bundle_root + '/eval'",
        "output_dtype": "$numpy.float32",
        "load_pretrain": True,
        "dataset_dir": "/workspace/data",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/imagesTs/*.nii.gz')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "preprocessing": before,
        "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 4},
        "inferer": inferer,
        "postprocessing": after,
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        "evaluator": {"_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader"},
        "initialize": [
            "$monai.utils.set_determinism(seed=123)",
            "$@checkpointloader(@evaluator) if @load_pretrain else None",
        ],
        "run": ["$@evaluator.run()"],
    }


def _ct() -> dict[str, Any]:
    """One channel, softmax: a smaller sibling of the zoo's bundle for the spleen."""
    key = "@image_key"
    return _around(
        {"_target_": "SegResNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "init_filters": 8,
         "blocks_down": [1, 1, 1], "blocks_up": [1, 1], "dropout_prob": 0.2},
        _compose(
            {"_target_": "LoadImaged", "keys": key},
            {"_target_": "EnsureChannelFirstd", "keys": key},
            {"_target_": "Orientationd", "keys": key, "axcodes": "RAS"},
            {"_target_": "Spacingd", "keys": key, "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"},
            {"_target_": "ScaleIntensityRanged", "keys": key, "a_min": -57, "a_max": 164, "b_min": 0, "b_max": 1,
             "clip": True},
            {"_target_": "EnsureTyped", "keys": key, "device": "@device"},
        ),
        {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 32], "sw_batch_size": 4, "overlap": 0.5},
        _compose(
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": key,
             "nearest_interp": False, "to_tensor": True},
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_dtype": "@output_dtype"},
        ),
    )  # fmt: skip


def _mri() -> dict[str, Any]:
    """Four channels, three overlapping regions: a smaller sibling of the zoo's bundle for brain tumours."""
    return _around(
        {"_target_": "SegResNet", "blocks_down": [1, 1], "blocks_up": [1], "init_filters": 8, "in_channels": 4,
         "out_channels": 3, "dropout_prob": 0.2},
        _compose(
            {"_target_": "LoadImaged", "keys": "image", "image_only": False},
            {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
        ),
        {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 24], "sw_batch_size": 1, "overlap": 0.5},
        _compose(
            {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
            {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
             "meta_keys": "pred_meta_dict", "nearest_interp": False, "to_tensor": True},
            {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
            {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: torch.where(x[[2]] > 0, 4, "
             "torch.where(x[[0]] > 0, 1, torch.where(x[[1]] > 0, 2, 0)))"},
            {"_target_": "SaveImaged", "keys": "pred", "meta_keys": "pred_meta_dict", "output_dir": "@output_dir",
             "output_postfix": "seg", "output_dtype": "uint8", "resample": False, "squeeze_end_dims": True},
        ),
    )  # fmt: skip


def _bundle(root: Path, config: dict[str, Any], outputs: dict[int, str], *, channels: Sequence[str], modality: str,
            suffix: str = ".json", weights: bool = True) -> Path:  # fmt: skip
    """A bundle's folder as the zoo has it: no manifest, the older schema, weights of a fixed seed."""
    tensor = {"type": "image", "dtype": "float32", "value_range": [0, 1], "is_patch_data": True}
    metadata = {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json",
        "version": "0.3.1",
        "changelog": {"0.3.1": "a test"},
        "monai_version": "1.4.0",
        "pytorch_version": "2.4.0",
        "numpy_version": "1.24.4",
        "optional_packages_version": {"nibabel": "5.2.1", "pytorch-ignite": "0.4.11"},
        "name": "Test",
        "task": "Test segmentation",
        "description": "Random weights",
        "authors": "nobody",
        "copyright": "nobody",
        "network_data_format": {
            "inputs": {"image": tensor | {"format": "magnitude", "modality": modality, "num_channels": len(channels),
                                          "spatial_shape": ["8*n"] * 3,
                                          "channel_def": {str(i): name for i, name in enumerate(channels)}}},
            "outputs": {"pred": tensor | {"format": "segmentation", "num_channels": len(outputs),
                                          "spatial_shape": ["8*n"] * 3,
                                          "channel_def": {str(i): name for i, name in outputs.items()}}},
        },
    }  # fmt: skip
    for folder in ("configs", "docs", "models"):
        (root / folder).mkdir(parents=True)
    (root / "configs" / "metadata.json").write_text(json.dumps(metadata, indent=4))
    text = json.dumps(config, indent=4) if suffix == ".json" else yaml.safe_dump(config, sort_keys=False)
    (root / "configs" / f"inference{suffix}").write_text(text)
    (root / "docs" / "README.md").write_text("Random weights, for tests.\n")
    (root / "LICENSE").write_text("Apache-2.0\n")
    arguments = {name: value for name, value in config["network_def"].items() if name not in ("_target_", "img_size")}
    if weights:
        torch.manual_seed(3)
        network = getattr(nets, config["network_def"]["_target_"].rpartition(".")[2])(**arguments).eval()
        blob = torch.from_numpy(blob_scan((32, 32, 32)))[None, None]
        if arguments.get("spatial_dims") == 2:
            blob = blob[..., 16]
        with torch.no_grad():  # labels differ from place to place: no channel is always above the others
            logits = network(
                ((blob - blob.min()) / (blob.max() - blob.min())).expand(1, len(channels), *blob.shape[2:])
            )
            bias = [one for one in network.parameters() if one.shape == (len(outputs),)][-1]
            bias -= logits.flatten(2).median(dim=2).values[0]
        torch.save(network.state_dict(), root / "models" / "model.pt")
    return root


def _monai(root: Path, scan: Path | list[Path]) -> np.ndarray:
    """The label map that the bundle's own pipeline gives, (X, Y, Z)."""
    parser = ConfigParser()
    parser.read_config(next((root / "configs").glob("inference.*")))
    parser["bundle_root"] = str(root)
    steps = parser["postprocessing"]["transforms"]
    parser["postprocessing"]["transforms"] = [step for step in steps if step["_target_"] != "SaveImaged"]
    before, after, inferer, network = (
        parser.get_parsed_content(part) for part in ("preprocessing", "postprocessing", "inferer", "network")
    )
    network.load_state_dict(torch.load(root / "models" / "model.pt", weights_only=True))  # noqa: TID251
    batch = list_data_collate([before({"image": scan})])
    with torch.no_grad():
        batch["pred"] = inferer(batch["image"], network.eval())
    found = after(decollate_batch(batch)[0])["pred"]
    return np.asarray(found)[0]


def _ct_scan(path: Path) -> Path:
    return save_scan(path, (blob_scan((40, 46, 30)) - 200) * 1.2 + 40, OBLIQUE_CT)


def _mri_scans(folder: Path) -> list[Path]:
    found = []
    for channel in range(4):
        data = blob_scan((36, 40, 28), seed=channel)
        data[:4] = 0
        found.append(save_scan(folder / f"mri_{channel}.nii.gz", data, np.diag([1.0, -1.0, 1.2, 1.0])))
    return found


def _agree(ours: np.ndarray, theirs: np.ndarray, share: float) -> None:
    assert ours.shape == theirs.shape
    counts = np.unique(theirs, return_counts=True)[1]
    assert len(counts) > 1
    assert counts.min() > 100  # a network that says one thing everywhere would prove nothing
    differing = int((ours != theirs).sum())
    assert differing <= share * theirs.size, f"{differing} of {theirs.size} voxels differ"


def test_a_ct_bundle_of_the_zoo_gives_the_labels_of_its_own_pipeline(tmp_path: Path) -> None:
    root = _bundle(tmp_path / "spleenCt", _ct(), SPLEEN, channels=["image"], modality="CT")
    scan = _ct_scan(tmp_path / "ct.nii.gz")
    result = medseg.infer(scan, bundle=root)
    _agree(result.label_map, _monai(root, scan), 1e-4)  # interpolation in another order: rounding at label borders
    assert result.labels == SPLEEN
    assert np.array_equal(result.affine, nib.load(scan).affine)
    assert (result.record.bundle.name, result.record.bundle.network) == ("spleenCt", "monai.SegResNet")


def test_an_mri_bundle_of_the_zoo_paints_its_regions_as_its_own_pipeline_does(tmp_path: Path) -> None:
    root = _bundle(tmp_path / "brats", _mri(), TUMOUR, channels=["T1c", "T1", "T2", "FLAIR"], modality="MR")
    scans = _mri_scans(tmp_path)
    result = medseg.infer(scans, bundle=root, probabilities=True)
    _agree(result.label_map, _monai(root, [str(scan) for scan in scans]), 1e-4)
    assert result.labels == {
        0: "background",
        1: "Tumor core outside Enhancing tumor",
        2: "Whole tumor outside Tumor core, Enhancing tumor",
        4: "Enhancing tumor",
    }
    assert result.probabilities is not None
    assert result.probabilities.shape == (3, 36, 40, 28)


def test_labels_that_come_back_by_the_nearest_voxel_and_dynunet_in_yaml(tmp_path: Path) -> None:
    config = _ct()
    config["shown"] = {"highres": True, "overlap": 0.25}
    config["pixdim"] = "$[1.4, 1.4, 1.4] if @shown#highres else [3.0, 3.0, 3.0]"
    config["network_def"] = {
        "_target_": "DynUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [8, 16, 16], "deep_supervision": False,
    }  # fmt: skip
    before, after = config["preprocessing"]["transforms"], config["postprocessing"]["transforms"]
    before[3]["pixdim"] = "@pixdim"
    before[4:5] = [
        {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True},
        {"_target_": "ScaleIntensityd", "keys": "image", "minv": -1.0, "maxv": 1.0},
    ]
    after[1], after[2] = after[2], after[1] | {"nearest_interp": True}
    config["inferer"] |= {"overlap": "@shown#overlap", "padding_mode": "replicate", "mode": "gaussian"}
    config["inferer"]["device"] = "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')"
    names = {0: "background", 1: "liver", 2: "tumour"}
    root = _bundle(tmp_path / "yaml", config, names, channels=["image"], modality="CT", suffix=".yaml")
    scan = _ct_scan(tmp_path / "ct.nii.gz")
    result = medseg.infer(scan, bundle=root)
    assert read_spec(root).way_back == "nearest"
    _agree(result.label_map, _monai(root, scan), 1e-3)  # voxels that lie in the middle of two


@pytest.mark.parametrize(
    ("place", "change", "named"),
    [
        (("network_def", "_target_"), "scripts.unest.UNesT", "scripts.unest.UNesT"),
        (("network_def", "init_filters"), "$__import__('os').getpid()", "__import__"),
        (("preprocessing", "transforms", 4), {"_target_": "scripts.crop.CentreCropd", "keys": "image"}, "CentreCropd"),
        (("preprocessing", "transforms", 4), {"_target_": "Lambdad", "keys": "image", "func": "$abs"}, "Lambdad"),
        (("preprocessing", "transforms", 3, "diagonal"), True, "diagonal"),
        (("preprocessing", "transforms", 3, "pixdim"), "$[float(open('/etc/hostname').read())] * 3", "open"),
        (("preprocessing", "transforms", 3, "pixdim"), "%other.json#pixdim", "%other.json"),
        (("inferer", "_target_"), "os.system", "os.system"),
        (("postprocessing", "transforms", 2, "argmax"), False, "argmax"),
        (("postprocessing",), "@network", "to"),
    ],
)
def test_what_only_code_can_do_is_refused_by_name(
    tmp_path: Path, place: tuple[Any, ...], change: Any, named: str
) -> None:
    config = copy.deepcopy(_ct())
    node: Any = config
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = change
    root = _bundle(tmp_path / "changed", config, SPLEEN, channels=["image"], modality="CT", weights=False)
    with pytest.raises(BundleError, match="--trust") as caught:
        read_spec(root)
    assert named in str(caught.value)


def test_the_weights_are_those_that_the_configuration_has_loaded(tmp_path: Path) -> None:
    config = _ct()
    config["name"] = "$'model.pt' if @fine else 'model_lowres.pt'"
    config["fine"] = True
    config["checkpointloader"]["load_path"] = "$@bundle_root + '/models/' + @name"
    root = _bundle(tmp_path / "two", config, SPLEEN, channels=["image"], modality="CT")
    assert load_bundle(root).weights == root / "models" / "model.pt"
    path = root / "configs" / "inference.json"
    path.write_text(path.read_text().replace('"fine": true', '"fine": false'))
    with pytest.raises(BundleError, match=r"model_lowres\.pt.* not in the bundle"):
        load_bundle(root)
    (root / "models" / "model.pt").rename(root / "models" / "model_lowres.pt")
    (root / "models" / "model.pt").write_bytes(b"others")
    assert load_bundle(root).weights == root / "models" / "model_lowres.pt"


def test_yaml_cannot_repeat_itself(tmp_path: Path) -> None:
    root = _bundle(tmp_path / "yaml", _ct(), SPLEEN, channels=["image"], modality="CT", suffix=".yaml", weights=False)
    path = root / "configs" / "inference.yaml"
    for added, word in (("a: &a [1, 2]\nb: [*a, *a]\n", "alias"), ("device: cpu\n", "twice")):
        path.write_text(yaml.safe_dump(_ct()) + added)
        with pytest.raises(BundleError, match=word):
            read_spec(root)


def test_overlapping_channels_are_painted_from_whole_to_part_or_as_the_user_says(tmp_path: Path) -> None:
    config = _mri()
    del config["postprocessing"]["transforms"][3]
    names = {0: "TC", 1: "WT", 2: "ET"}
    root = _bundle(tmp_path / "plain", config, names, channels=["a", "b", "c", "d"], modality="MRI", weights=False)
    spec = read_spec(root)
    assert [(region.channel, region.label) for region in spec.regions] == [(1, 2), (0, 1), (2, 3)]
    assert any("overlapping" in note for note in spec.notes)
    path = root / "configs" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["medseg"] = {
        "regions": [{"channel": 1, "label": 1}, {"channel": 0, "label": 5}, {"channel": 2, "label": 3}],
        "labels": {"0": "background", "1": "oedema", "3": "enhancing", "5": "necrosis"},
    }
    path.write_text(json.dumps(metadata))
    spec = read_spec(root)
    assert [region.label for region in spec.regions] == [1, 5, 3]
    assert spec.labels == {0: "background", 1: "oedema", 3: "enhancing", 5: "necrosis"}


def test_references_that_never_end_are_refused_at_once(tmp_path: Path) -> None:
    config = _ct()
    config |= {f"a{n}": f"$@a{n + 1} + @a{n + 1}" for n in range(30)} | {"a30": 1.0, "loop": "@loop"}
    for value in ("@a0", "@loop"):
        config["inferer"]["overlap"] = value
        root = _bundle(tmp_path / value[1:], config, SPLEEN, channels=["image"], modality="CT", weights=False)
        with pytest.raises(BundleError, match="inferer::overlap"):
            read_spec(root)


def test_the_largest_piece_of_each_label_is_kept() -> None:
    labels = np.zeros((1, 3, 10), dtype=np.uint8)
    labels[0, 1, [0, 1, 2, 3, 5]], labels[0, 1, [6, 7, 9]] = 1, 2
    kept = apply_label_steps(labels.copy(), [KeepLargest()])
    assert kept[0, 1].tolist() == [1, 1, 1, 1, 0, 0, 2, 2, 0, 0]
    together = apply_label_steps(labels.copy(), [KeepLargest((1, 2), independent=False)])
    assert together[0, 1].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


_NETWORK = """
from monai.networks.nets import SegResNet
class OwnNet(SegResNet):
    pass
"""
_CROP = """
from monai.transforms import CenterSpatialCropd
class OwnCropd(CenterSpatialCropd):
    pass
"""


@pytest.mark.slow
def test_own_code_runs_only_when_trusted_and_the_record_says_so(tmp_path: Path) -> None:
    root = _bundle(tmp_path / "own", _ct(), SPLEEN, channels=["image"], modality="CT")
    scan = _ct_scan(tmp_path / "ct.nii.gz")
    plain = medseg.infer(scan, bundle=root, trust=True)
    assert plain.record.bundle.own_code == ""  # trusted, and nothing needed it
    (root / "scripts").mkdir()
    (root / "scripts" / "__init__.py").write_text("")
    (root / "scripts" / "net.py").write_text(_NETWORK)
    path = root / "configs" / "inference.json"
    path.write_text(path.read_text().replace('"SegResNet"', '"scripts.net.OwnNet"'))
    with pytest.raises(BundleError, match=r"scripts\.net\.OwnNet.*--trust"):
        load_bundle(root)
    command = ["infer", scan, "--bundle", root, "-o", tmp_path / "seg.nii.gz", "--trust"]
    done = subprocess.run(
        [sys.executable, "-m", "medseg", *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: --trust")
    assert np.array_equal(np.asarray(nib.load(tmp_path / "seg.nii.gz").dataobj), plain.label_map)
    record = json.loads((tmp_path / "seg.json").read_text())
    assert "scripts.net.OwnNet" in record["bundle"]["own_code"]


def test_a_trusted_pipeline_of_its_own_ends_on_the_scans_grid(tmp_path: Path) -> None:
    config = _ct()
    before = config["preprocessing"]["transforms"]
    before.insert(5, {"_target_": "scripts.crop.OwnCropd", "keys": "@image_key", "roi_size": [32, 28, 32]})
    root = _bundle(tmp_path / "pipeline", config, SPLEEN, channels=["image"], modality="CT")
    (root / "scripts").mkdir()
    (root / "scripts" / "crop.py").write_text(_CROP)
    scan = _ct_scan(tmp_path / "ct.nii.gz")
    result = medseg.infer(scan, bundle=root, trust=True)
    without = copy.deepcopy(config)
    without["preprocessing"]["transforms"][5]["_target_"] = "CenterSpatialCropd"
    (root / "configs" / "inference.json").write_text(json.dumps(without))
    _agree(result.label_map, _monai(root, scan), 0)
    assert result.labels == SPLEEN
    assert "OwnCropd" in result.record.bundle.own_code
    assert "scripts" not in sys.modules


def test_torchscript_is_code(tmp_path: Path) -> None:
    root = _bundle(tmp_path / "script", _ct(), SPLEEN, channels=["image"], modality="CT")
    scan = _ct_scan(tmp_path / "ct.nii.gz")
    expected = medseg.infer(scan, bundle=root).label_map
    network = load_bundle(root).network()
    with warnings.catch_warnings(action="ignore"):  # torch calls its own format old
        torch.jit.trace(network, torch.zeros(1, 1, 32, 32, 32)).save(root / "models" / "model.ts")
    (root / "models" / "model.pt").unlink()
    with pytest.raises(BundleError, match=r"model\.ts is code; .*--trust"):
        medseg.infer(scan, bundle=root)
    result = medseg.infer(scan, bundle=root, trust=True)
    assert np.array_equal(result.label_map, expected)
    assert "TorchScript" in result.record.bundle.own_code


def test_a_2d_network_goes_over_the_slices_as_its_own_pipeline_does(tmp_path: Path) -> None:
    config = _ct()
    config["network_def"] = {
        "_target_": "monai.networks.nets.UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 4,
        "channels": [8, 16, 16], "strides": [2, 2], "num_res_units": 2,
    }  # fmt: skip
    config["preprocessing"]["transforms"][2:5] = [{"_target_": "ScaleIntensityd", "keys": "image"}]
    config["inferer"] = {"_target_": "SliceInferer", "roi_size": [32, 32], "spatial_dim": 2}
    names = {0: "background", 1: "left ventricle", 2: "myocardium", 3: "right ventricle"}
    root = _bundle(tmp_path / "short_axis", config, names, channels=["image"], modality="MR")
    scan = save_scan(tmp_path / "mr.nii.gz", blob_scan((50, 45, 9)), np.diag([1.2, 1.2, 8.0, 1.0]))
    _agree(medseg.infer(scan, bundle=root).label_map, _monai(root, scan), 1e-4)


def test_a_crop_to_the_foreground_gives_the_windows_and_labels_of_the_bundles_own_pipeline(tmp_path: Path) -> None:
    config = _ct()
    before = config["preprocessing"]["transforms"]
    before[5:5] = [
        {"_target_": "CropForegroundd", "keys": "@image_key", "source_key": "@image_key", "margin": 2,
         "allow_smaller": True, "select_fn": "$lambda x: x > 0"},
        {"_target_": "NormalizeIntensityd", "keys": "@image_key"},
        {"_target_": "SpatialPadd", "keys": "@image_key", "spatial_size": [32, 32, 32]},
    ]  # fmt: skip
    root = _bundle(tmp_path / "cropped", config, SPLEEN, channels=["image"], modality="CT")
    data = np.full((60, 70, 50), -1000, dtype=np.float32)
    data[12:52, 9:55, 11:41] = (blob_scan((40, 46, 30)) - 200) * 1.2 + 40
    scan = save_scan(tmp_path / "ct.nii.gz", data, OBLIQUE_CT)
    result = medseg.infer(scan, bundle=root)
    theirs = _monai(root, scan)
    _agree(result.label_map[14:50, 11:53, 13:39], theirs[14:50, 11:53, 13:39], 1e-4)
    # At the edge of the box MONAI interpolates with nothing, medseg with background; further out is nothing.
    for labels in (result.label_map.copy(), theirs):
        labels[6:58, 3:61, 7:45] = 0
        assert not labels.any()
    result = medseg.infer(scan, bundle=root, probabilities=True)
    assert result.probabilities is not None
    assert result.probabilities[0, 0, 0, 0] == 1
