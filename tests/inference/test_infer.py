"""`medseg.infer` as a whole: geometry, suitability, flips, record."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import medseg
from medseg.errors import BundleError, InputError, MemoryBudgetError, UsageError
from medseg.inference import run
from medseg.inference.record import Record
from tests.builders import blob_scan, save_scan, tiny_bundle

ORIENTATIONS = [
    (axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((False, True), repeat=3)
]


def _turned(data: np.ndarray, affine: np.ndarray, axes: tuple[int, ...], flips: tuple[bool, ...]) -> tuple:
    """The same scan stored with other array axes."""
    turned, step = data.transpose(axes), np.zeros((4, 4))
    step[3, 3] = 1
    for axis, (source, flip) in enumerate(zip(axes, flips, strict=True)):
        step[source, axis] = -1 if flip else 1
        step[source, 3] = data.shape[source] - 1 if flip else 0
        if flip:
            turned = np.flip(turned, axis)
    return np.ascontiguousarray(turned), affine @ step


def _same_order(labels: np.ndarray, axes: tuple[int, ...], flips: tuple[bool, ...]) -> np.ndarray:
    """Undo `_turned`."""
    for axis, flip in enumerate(flips):
        if flip:
            labels = np.flip(labels, axis)
    return labels.transpose(np.argsort(axes))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> medseg.bundles.load.Bundle:
    return medseg.load_bundle(tiny_bundle(tmp_path_factory.mktemp("bundles")))


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.1, 0.9, 1.2)], ids=["own grid", "resampled"])
def test_all_48_axis_orders_give_the_same_permutation_of_the_same_voxels(
    bundle: medseg.bundles.load.Bundle, tmp_path: Path, spacing: tuple[float, float, float]
) -> None:
    """Exact, also where the scan is resampled: the axes are turned first, so the same numbers are interpolated."""
    data, affine = blob_scan((32, 40, 30)), np.diag([*spacing, 1.0])
    affine[:3, 3] = [12.5, -40.25, 7.0]
    reference = medseg.infer(save_scan(tmp_path / "ras.nii", data, affine), bundle=bundle).label_map
    assert len(np.unique(reference)) > 1
    for axes, flips in ORIENTATIONS:
        turned, turned_affine = _turned(data, affine, axes, flips)
        path = save_scan(tmp_path / "turned.nii", turned, turned_affine)
        result = medseg.infer(path, bundle=bundle)
        saved = nib.load(result.save(tmp_path / "out.nii.gz", overwrite=True))
        assert saved.shape == turned.shape
        assert (saved.affine == nib.load(path).affine).all()
        assert (_same_order(np.asarray(saved.dataobj), axes, flips) == reference).all(), (axes, flips)


def test_an_oblique_scan_keeps_its_affine_and_the_voxels_of_the_straight_one(
    bundle: medseg.bundles.load.Bundle, tmp_path: Path
) -> None:
    data, angle = blob_scan((32, 40, 30)), np.deg2rad(20)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    straight = medseg.infer(save_scan(tmp_path / "straight.nii", data), bundle=bundle)
    oblique = medseg.infer(save_scan(tmp_path / "oblique.nii", data, affine), bundle=bundle)
    saved = nib.load(oblique.save(tmp_path / "out.nii"))
    assert (saved.affine == nib.load(tmp_path / "oblique.nii").affine).all()
    assert (oblique.label_map == straight.label_map).mean() > 0.999


def test_the_same_scan_in_any_type_gives_the_same_labels(bundle: medseg.bundles.load.Bundle, tmp_path: Path) -> None:
    data = np.round(blob_scan((32, 40, 30)))
    reference = medseg.infer(save_scan(tmp_path / "f4.nii", data.astype("f4")), bundle=bundle).label_map
    for dtype in ("u1", "i2", "u2", "f8", ">i4"):
        clipped = np.clip(data, 0, 255) if dtype == "u1" else data
        path = save_scan(tmp_path / "other.nii.gz", clipped.astype(dtype))
        expected = (
            reference
            if (clipped == data).all()
            else medseg.infer(save_scan(tmp_path / "c.nii", clipped), bundle=bundle).label_map
        )
        assert (medseg.infer(path, bundle=bundle).label_map == expected).all(), dtype


def test_a_scan_unlike_the_training_data_is_refused_and_goes_on_with_force(
    bundle: medseg.bundles.load.Bundle, tmp_path: Path
) -> None:
    path = save_scan(tmp_path / "ct.nii", blob_scan((72, 52, 24)) - 1200, np.diag([1.0, 1.0, 1.6, 1.0]))
    with pytest.raises(
        BundleError,
        match=r"view 72 x 52 x 38.4 mm instead of 30-45 x .*voxel size 1 x 1 x 1.6 mm.*look like CT.*--force",
    ):
        medseg.infer(path, bundle=bundle)
    result = medseg.infer(path, bundle=bundle, force=True)
    assert any("field of view" in warning for warning in result.record.warnings)
    assert result.record.parameters.forced


def test_flips_average_and_a_bundle_without_axes_refuses_them(
    bundle: medseg.bundles.load.Bundle, tmp_path: Path
) -> None:
    data = blob_scan((32, 40, 30))
    plain = medseg.infer(save_scan(tmp_path / "a.nii", data), bundle=bundle, probabilities=True)
    flipped = medseg.infer(tmp_path / "a.nii", bundle=bundle, tta=True, probabilities=True)
    mirrored = medseg.infer(save_scan(tmp_path / "b.nii", data[::-1].copy()), bundle=bundle, probabilities=True)
    assert plain.probabilities is not None
    assert flipped.probabilities is not None
    assert mirrored.probabilities is not None
    expected = (plain.probabilities + mirrored.probabilities[:, ::-1]) / 2
    np.testing.assert_allclose(flipped.probabilities, expected, atol=1e-5)
    assert flipped.record.parameters.flips == 2
    assert flipped.record.windows == 2 * plain.record.windows
    fixed = medseg.load_bundle(tiny_bundle(tmp_path, "fixed", mirror_axes=()))
    with pytest.raises(UsageError, match="allows no flips"):
        medseg.infer(tmp_path / "a.nii", bundle=fixed, tta=True)


def test_the_record_says_how_the_result_came_about(bundle: medseg.bundles.load.Bundle, tmp_path: Path) -> None:
    stages: list[str] = []
    path = save_scan(tmp_path / "scan.nii.gz", blob_scan((32, 70, 30)), np.diag([1.0, 0.8, 1.0, 1.0]))
    result = medseg.infer(path, bundle=bundle, overlap=0.25, progress=lambda stage, _done, _all: stages.append(stage))
    record = result.record
    assert record.input.files == ("scan.nii.gz",)
    assert str(tmp_path) not in record.model_dump_json()
    assert record.bundle.weights_sha256 == bundle.sha256
    assert record.parameters.overlap == 0.25
    assert set(record.seconds) == {"bundle", "read", "preprocess", "network", "restore", "measure"}
    assert list(dict.fromkeys(stages)) == list(record.seconds)
    assert sum(label.voxels for label in record.labels) == int((result.label_map > 0).sum())
    assert record.labels[0].volume_ml == pytest.approx(record.labels[0].voxels * 0.8e-3)
    assert Record.model_validate_json(record.model_dump_json()) == record


def test_the_documented_schema_is_that_of_the_record() -> None:
    documented = json.loads((Path(__file__).parents[2] / "docs" / "record.schema.json").read_text())
    assert documented == Record.model_json_schema()


def test_channels_overlap_and_memory_are_refused_at_the_door(
    bundle: medseg.bundles.load.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_scan(tmp_path / "two.nii", np.stack([blob_scan((32, 40, 30))] * 2, axis=-1))
    with pytest.raises(InputError, match=r"\(32, 40, 30, 2\).*--volume"):
        medseg.infer(path, bundle=bundle)
    assert medseg.infer(path, bundle=bundle, volume_index=1).label_map.shape == (32, 40, 30)
    with pytest.raises(UsageError, match="overlap"):
        medseg.infer(path, bundle=bundle, overlap=1.0)
    with pytest.raises(UsageError, match="not a device"):
        medseg.infer(path, bundle=bundle, device="gpu")
    monkeypatch.setattr(run, "available_memory", lambda: 1000)
    with pytest.raises(MemoryBudgetError, match="GiB are free"):
        medseg.infer(path, bundle=bundle, volume_index=0)


def test_a_network_that_gives_nan_is_an_error_and_no_result(
    bundle: medseg.bundles.load.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_scan(tmp_path / "scan.nii", blob_scan((32, 40, 30)))
    monkeypatch.setattr(
        "medseg.inference.segment.logit_planes",
        lambda image, *_, **__: iter(torch.full((image.shape[1], 3, *image.shape[2:]), torch.nan)),
    )
    with pytest.raises(BundleError, match="produced NaN"):
        medseg.infer(path, bundle=bundle)
