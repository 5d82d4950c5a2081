"""Bundles of 2D networks and of overlapping regions, through the same `medseg.infer` as any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser  # noqa: TID251 - what another program does with the bundle
from monai.inferers import SliceInferer as MonaiSliceInferer
from scipy import ndimage

import medseg
from medseg.bundles.integrity import write_manifest
from medseg.bundles.load import load_bundle
from medseg.bundles.spec import NormalizeIntensity, Region, ScaleIntensityRange, SliceSpec, read_spec
from medseg.bundles.verify import verify_bundle
from medseg.errors import BundleError
from medseg.inference.intensity import apply_intensity
from medseg.inference.preprocess import preprocess
from medseg.inference.slice_inferer import SliceInferer
from tests.builders import blob_scan, save_scan, tiny_bundle, tiny_spec

PARATRANSCNN = {"num_classes": 3, "dim": 16, "heads": 2, "depth": [1, 1, 1], "cnn_width": 8, "cnn_blocks": [1] * 4}
SLICES: dict[str, Any] = {
    "network": "paratranscnn",
    "network_args": PARATRANSCNN,
    "roi_size": (1, 32, 48),
    "slices": SliceSpec(0),
    "spacing": None,
    "sw_batch_size": 8,
}
REGIONS: dict[str, Any] = {
    "activation": "sigmoid",
    "labels": {0: "background", 1: "core", 2: "oedema", 4: "enhancing"},
    "regions": (Region("WT", 1, 2), Region("TC", 0, 1), Region("ET", 2, 4)),
}


def _bundle(folder: Path, name: str = "slices", **changes: Any) -> Path:
    """A slice-wise bundle whose random network gives each class its share."""
    root = tiny_bundle(folder, name, **(SLICES | changes))
    network, path = load_bundle(root).network(), root / "models" / "model.pt"
    slices = torch.from_numpy(blob_scan((48, 48, 4))).movedim(-1, 0)[:, None]
    with torch.inference_mode():
        for step in load_bundle(root).spec.intensity or (NormalizeIntensity(),):
            slices = apply_intensity(slices, step)
        network.head.classify.bias -= network(slices).mean(dim=(0, 2, 3))
    torch.save({"model": network.state_dict()}, path)
    write_manifest(root)
    return root


def _network(root: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The bundle's network on slices (N, C, h, w) of any memory layout."""
    network = load_bundle(root).network()

    def run(slices: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = network(torch.from_numpy(np.ascontiguousarray(slices, dtype=np.float32))).numpy()
        return logits

    return run


def _lively(labels: np.ndarray) -> bool:
    """Whether at least two labels fill some part of the map, so that a wrong place would show."""
    return bool(np.sort(np.bincount(labels.ravel()))[-2] > 0.02 * labels.size)


@pytest.mark.parametrize(
    "changes",
    [SLICES, {**SLICES, "slices": SliceSpec(2, "published", 1), "roi_size": (32, 48, 1)}, REGIONS],
    ids=["slices", "published", "regions"],
)
def test_the_specification_survives_the_way_through_the_bundles_files(changes: dict[str, Any], tmp_path: Path) -> None:
    root = tiny_bundle(tmp_path, **changes)
    assert read_spec(root) == tiny_spec(**changes)
    assert [check for check in verify_bundle(root) if not check.passed] == []


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_windows_over_slices_agree_with_monais_slice_inferer(axis: int) -> None:
    image = torch.rand(1, 2, 20, 45, 33, generator=torch.Generator().manual_seed(0))
    image = image.movedim(2, 2 + axis)
    torch.manual_seed(1)
    network = torch.nn.Conv2d(2, 3, 5, padding=2)
    size = (16, 32)
    roi = (*size[:axis], 1, *size[axis:])
    ours = SliceInferer(axis=axis, roi_size=roi, overlap=0.5, cval=-1.0)
    theirs = MonaiSliceInferer(
        roi_size=size,
        spatial_dim=axis,
        sw_batch_size=4,
        overlap=0.5,
        mode="gaussian",
        padding_mode="constant",
        cval=-1.0,
    )
    with torch.inference_mode():
        torch.testing.assert_close(ours(image, network), theirs(image, network), atol=1e-5, rtol=1e-5)


def test_whole_slices_are_segmented_by_the_published_rule(tmp_path: Path) -> None:
    root = _bundle(
        tmp_path,
        slices=SliceSpec(0, "published"),
        roi_size=(1, 64, 48),
        orientation="SPL",
        intensity=(ScaleIntensityRange(100.0, 300.0),),
    )
    data = blob_scan((41, 52, 9))
    result = medseg.infer(save_scan(tmp_path / "scan.nii", data), bundle=root, force=True)
    network = _network(root)
    expected = np.zeros_like(data, dtype=np.uint8)
    scaled = np.clip((data - 100) / 200, 0, 1)
    for z in range(9):
        plane = scaled[::-1, ::-1, z].T  # rows towards posterior, columns towards left
        zoomed = ndimage.zoom(plane, (64 / 52, 48 / 41), order=3)
        labels = network(zoomed[None, None])[0].argmax(axis=0).astype(np.uint8)
        expected[:, :, z] = ndimage.zoom(labels, (52 / 64, 41 / 48), order=0).T[::-1, ::-1]
    assert _lively(expected)
    assert (result.label_map == expected).mean() > 0.9995  # float32 against the spline's float64
    assert result.record.windows == 9
    assert result.record.parameters.roi_size == (1, 64, 48)


@pytest.mark.parametrize("step", [1, 2])
def test_neighbours_are_channels_in_order_and_the_ends_repeat(tmp_path: Path, step: int) -> None:
    slices = SliceSpec(1, neighbours=1, neighbour_step=step)
    root = _bundle(tmp_path, slices=slices, roi_size=(48, 1, 48), intensity=())
    data = blob_scan((48, 7, 48))
    result = medseg.infer(save_scan(tmp_path / "scan.nii", data), bundle=root, force=True)
    network = _network(root)
    for y in range(7):
        three = np.stack([data[:, max(y - step, 0)], data[:, y], data[:, min(y + step, 6)]])
        assert (network(three[None])[0].argmax(axis=0) == result.label_map[:, y]).mean() > 0.9995


@pytest.mark.parametrize("resize", ["none", "smooth"])
def test_labels_do_not_depend_on_how_the_scan_is_stored(tmp_path: Path, resize: Any) -> None:
    bundle = load_bundle(_bundle(tmp_path, slices=SliceSpec(0, resize), mirror_axes=(1,)))
    data = blob_scan((12, 40, 52))
    reference = medseg.infer(save_scan(tmp_path / "a.nii", data), bundle=bundle, force=True).label_map
    assert _lively(reference)
    image = nib.Nifti1Image(data, np.eye(4))
    for code in ("LPS", "SAL", "PIR"):
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(code))
        )
        nib.save(image.as_reoriented(turn), tmp_path / "b.nii")
        found = medseg.infer(tmp_path / "b.nii", bundle=bundle, force=True).label_map
        back = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt(tuple(code)), nib.orientations.axcodes2ornt("RAS")
        )
        assert (nib.orientations.apply_orientation(found, back) == reference).all()


def test_flips_and_progress_count_slices(tmp_path: Path) -> None:
    bundle = load_bundle(_bundle(tmp_path, slices=SliceSpec(0, "smooth"), mirror_axes=(0, 2)))
    seen: list[tuple[int, int]] = []
    scan = save_scan(tmp_path / "a.nii", blob_scan((10, 40, 52)))
    result = medseg.infer(
        scan,
        bundle=bundle,
        tta=True,
        force=True,
        progress=lambda stage, done, total: seen.append((done, total)) if stage == "network" else None,
    )
    assert result.record.windows == 40
    assert seen[-2] == (40, 40)
    assert [done for done, total in seen if total == 40] == sorted(done for done, total in seen if total == 40)


def test_overlapping_regions_are_painted_in_the_stated_order(tmp_path: Path) -> None:
    root = tiny_bundle(tmp_path, **REGIONS)
    scan = save_scan(tmp_path / "scan.nii", blob_scan((34, 50, 36)))
    result = medseg.infer(scan, bundle=root, probabilities=True, overlap=0.0)
    assert result.probabilities is not None
    core, whole, enhancing = result.probabilities > 0.5
    expected = np.zeros(core.shape, dtype=np.uint8)
    for mask, value in ((whole, 2), (core, 1), (enhancing, 4)):
        expected[mask] = value
    assert (core & whole).any()
    assert len(np.unique(expected)) >= 3
    assert (result.label_map == expected).all()
    assert [label.value for label in result.record.labels] == [1, 2, 4]
    saved = result.save(tmp_path / "seg.nii.gz")
    assert (np.asarray(nib.load(saved).dataobj) == expected).all()


def test_monai_instantiates_the_same_inferer(tmp_path: Path) -> None:
    root = _bundle(tmp_path, slices=SliceSpec(0, neighbours=1), roi_size=(1, 32, 32))
    config = json.loads((root / "configs" / "inference.json").read_text())
    parser = ConfigParser({"inferer": config["inferer"]})
    inferer = parser.get_parsed_content("inferer")
    bundle = load_bundle(root)
    network, spec = bundle.network(), bundle.spec
    volume = medseg.read_volume(save_scan(tmp_path / "a.nii", blob_scan((6, 40, 36))))
    image = preprocess(volume, spec).image[None]
    with torch.inference_mode():
        assert torch.equal(inferer(image, network), SliceInferer.of(spec)(image, network))
    assert spec.intensity == (NormalizeIntensity(),)


BROKEN: list[tuple[str, str, Callable[[dict[str, Any]], Any], str]] = [
    ("axis", "inference.json", lambda c: c["inferer"].update(axis=3), "axis 3"),
    ("no axis", "inference.json", lambda c: c["inferer"].pop("axis"), "malformed"),
    ("thick", "inference.json", lambda c: c["inferer"].update(roi_size=[2, 32, 48]), "not 1 along axis 0"),
    ("resize", "inference.json", lambda c: c["inferer"].update(resize="wild"), "resize is 'wild'"),
    ("neighbours", "inference.json", lambda c: c["inferer"].update(neighbours=-1), "neighbours -1"),
    ("step", "inference.json", lambda c: c["inferer"].update(neighbour_step=0), "neighbour_step 0"),
    ("classes", "inference.json", lambda c: c["network_def"].update(num_classes=4), "num_classes 4"),
    ("target", "inference.json", lambda c: c["inferer"].update(_target_="medseg.inference.Other"), "medseg knows"),
    (
        "sigmoid",
        "inference.json",
        lambda c: c["postprocessing"]["transforms"].insert(0, {"_target_": "Activationsd", "sigmoid": True}),
        "sigmoid needs regions",
    ),
    ("regions", "metadata.json", lambda c: c["medseg"].update(regions=[{"channel": 0, "label": 1}]), "malformed"),
    (
        "unnamed",
        "metadata.json",
        lambda c: c["medseg"].update(labels={"0": "b"}, regions=[{"channel": i, "label": 1} for i in range(3)]),
        "regions",
    ),
]


@pytest.mark.parametrize(("file", "change", "word"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_contradictions_are_refused(
    file: str, change: Callable[[dict[str, Any]], Any], word: str, tmp_path: Path
) -> None:
    root = _bundle(tmp_path)
    path = root / "configs" / file
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    write_manifest(root)
    with pytest.raises(BundleError, match=word):
        load_bundle(root)


@pytest.mark.parametrize("resize", ["none", "smooth"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_network_looks_as_often_as_was_counted(axis: int, resize: Any) -> None:
    inferer = SliceInferer(axis=axis, roi_size=(*(16,) * axis, 1, *(16,) * (2 - axis)), resize=resize)
    calls: list[int] = []

    def network(slices: torch.Tensor) -> torch.Tensor:
        calls.append(len(slices))
        return slices

    inferer(torch.rand(1, 1, 20, 16, 24), network)
    assert sum(calls) == inferer.window_count((20, 16, 24))
