"""Outputs: on the scan's grid to the last bit, the same bytes each time, whole or not at all."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from scipy.spatial.transform import Rotation

from medseg import __version__
from medseg.errors import OutputError, UsageError
from medseg.io.geometry import AxisOrder
from medseg.io.read import read_labels, read_volume
from medseg.io.volume import Volume
from medseg.io.write import OutputSet, reserve, write_bytes, write_float, write_labels

SHARED = Path(__file__).parents[3] / "shared" / "data"
GEOMETRY = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (12, -9, 20), degrees=True).as_matrix() * (0.7, 0.9, 2.5)
OBLIQUE[:3, 3] = (-80.123, 35.456, 10.789)


def scan(path: Path, *, image: Any = nib.Nifti1Image, affine: Any = OBLIQUE, data: Any = None, **fields: Any) -> Volume:
    """Save a scan with header fields overwritten as given, and read it."""
    values = np.random.default_rng(3).normal(size=(5, 6, 7)).astype("f4") if data is None else data
    saved = image(values, affine)
    for name, value in fields.items():
        saved.header[name] = value
    nib.save(saved, path)
    return read_volume(path)


def labels_of(volume: Volume) -> np.ndarray[Any, Any]:
    return (volume.data[0] > 0).astype(np.int64) + (volume.data[0] > 1)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_geometry(output: Path, volume: Volume) -> None:
    one, other = nib.load(output), nib.load(volume.source.path)
    np.testing.assert_array_equal(one.affine, other.affine)
    assert one.shape == other.shape[:3]
    for name in GEOMETRY:
        np.testing.assert_array_equal(one.header[name], other.header[name], err_msg=name)
    np.testing.assert_array_equal(one.header["pixdim"][:4], other.header["pixdim"][:4])


@pytest.mark.parametrize("image", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sform_code": 4, "qform_code": 0},
        {"sform_code": 0, "qform_code": 3},
        {"sform_code": 0, "qform_code": 0},
        {"sform_code": 2, "qform_code": 1, "qoffset_x": 7.5, "xyzt_units": 10},
    ],
)
def test_labels_lie_on_the_scans_grid_to_the_last_bit(
    tmp_path: Path, image: Any, suffix: str, fields: dict[str, Any]
) -> None:
    volume = scan(tmp_path / ("s.img" if image is nib.Nifti1Pair else "s.nii.gz"), image=image, **fields)
    labels = labels_of(volume)
    output = write_labels(tmp_path / f"out{suffix}", labels, volume)
    assert_same_geometry(output, volume)
    loaded = nib.load(output)
    assert isinstance(loaded, nib.Nifti2Image) == (image is nib.Nifti2Image)
    np.testing.assert_array_equal(np.asarray(loaded.dataobj), labels)
    np.testing.assert_array_equal(read_labels(output)[0], labels)


@pytest.mark.parametrize(("unit", "factor"), [(1, 0.001), (3, 1000.0)])
def test_labels_of_a_scan_in_other_units_stay_in_those_units(tmp_path: Path, unit: int, factor: float) -> None:
    affine = np.diag([factor, factor, factor, 1.0]) @ OBLIQUE
    volume = scan(tmp_path / "s.nii.gz", affine=affine, xyzt_units=unit)
    np.testing.assert_allclose(volume.affine, OBLIQUE, rtol=1e-5)
    assert_same_geometry(write_labels(tmp_path / "out.nii.gz", labels_of(volume), volume), volume)


def test_all_48_orientations_read_and_write_back(tmp_path: Path) -> None:
    reference = scan(tmp_path / "reference.nii")
    canonical = AxisOrder.to_canonical(reference.affine).apply(reference.data)
    for axes in permutations(range(3)):
        for flips in product((False, True), repeat=3):
            order = AxisOrder(axes, flips)  # type: ignore[arg-type]
            data, affine = order.apply(reference.data[0]), order.affine(reference.affine, reference.shape)
            volume = scan(tmp_path / "turned.nii", affine=affine, data=data)
            to_canonical = AxisOrder.to_canonical(volume.affine)
            np.testing.assert_array_equal(to_canonical.apply(volume.data), canonical)
            labels = to_canonical.invert((canonical[0] > 0).astype(np.uint8))
            output = write_labels(reserve(tmp_path / "out.nii", overwrite=True), labels, volume)
            assert_same_geometry(output, volume)
            np.testing.assert_array_equal(read_labels(output)[0], order.apply(reference.data[0]) > 0)


@pytest.mark.parametrize(("largest", "dtype"), [(0, "u1"), (255, "u1"), (256, "u2"), (65535, "u2"), (65536, "u4")])
def test_the_smallest_unsigned_type_holds_the_labels(tmp_path: Path, largest: int, dtype: str) -> None:
    volume = scan(tmp_path / "s.nii")
    labels = np.zeros(volume.shape, np.int64)
    labels[1, 2, 3] = largest
    with write_labels(tmp_path / "a.nii", labels, volume).open("rb") as file:
        header = nib.Nifti1Header.from_fileobj(file)
    assert header.get_data_dtype() == np.dtype(dtype)
    assert (header["scl_slope"], header["scl_inter"], header["intent_code"]) == (1, 0, 1002)
    named = write_labels(tmp_path / "b.nii", np.zeros(volume.shape, np.uint8), volume, names={largest: "organ"})
    assert nib.load(named).get_data_dtype() == np.dtype(dtype)


def test_nothing_that_names_the_patient_reaches_the_output(tmp_path: Path) -> None:
    marks = {"descrip": b"DOE^JOHN", "db_name": b"DOE^JOHN", "aux_file": b"DOE^JOHN", "intent_name": b"DOE^JOHN"}
    saved = nib.Nifti1Image(np.ones((3, 3, 3), "f4"), OBLIQUE)
    for name, value in marks.items():
        saved.header[name] = value
    saved.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JOHN"))
    nib.save(saved, tmp_path / "s.nii")
    volume = read_volume(tmp_path / "s.nii")
    output = write_labels(tmp_path / "out.nii", np.ones((3, 3, 3), np.uint8), volume)
    assert b"DOE" not in output.read_bytes()
    assert b"DOE" not in volume.source.header.binaryblock
    assert nib.load(output).header["descrip"].item() == f"medseg {__version__}".encode()


def test_the_same_labels_are_the_same_bytes(tmp_path: Path) -> None:
    volume = scan(tmp_path / "s.nii.gz")
    one = write_labels(tmp_path / "one.nii.gz", labels_of(volume), volume).read_bytes()
    other = write_labels(tmp_path / "another_name.nii.gz", labels_of(volume), volume).read_bytes()
    assert one == other
    assert one[3:8] == bytes(5)  # flags (no name) and time


def test_probabilities_are_float32_with_channels_last_in_the_file(tmp_path: Path) -> None:
    volume = scan(tmp_path / "s.nii.gz")
    values = np.random.default_rng(1).random((3, *volume.shape))
    loaded = nib.load(write_float(tmp_path / "p.nii.gz", values, volume))
    assert loaded.get_data_dtype() == np.float32
    np.testing.assert_array_equal(loaded.affine, nib.load(volume.source.path).affine)
    np.testing.assert_array_equal(np.asarray(loaded.dataobj), np.moveaxis(values, 0, 3).astype("f4"))
    np.testing.assert_array_equal(read_volume(tmp_path / "p.nii.gz").data, values.astype("f4"))
    one = nib.load(write_float(tmp_path / "q.nii", values[0], volume))
    assert one.shape == volume.shape


def test_labels_of_an_itk_scan_lie_where_itk_sees_them(tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(np.random.default_rng(0).normal(size=(4, 5, 6)).astype("f4"))
    image.SetSpacing((0.5, 1.25, 3))
    image.SetOrigin((10, -20, 30))
    image.SetDirection(Rotation.from_euler("xyz", (5, 6, 7), degrees=True).as_matrix().ravel())
    SimpleITK.WriteImage(image, tmp_path / "s.mha")
    volume = read_volume(tmp_path / "s.mha")
    output = write_labels(tmp_path / "out.nii.gz", labels_of(volume), volume)
    seen = SimpleITK.ReadImage(output)
    for index in ((0, 0, 0), (5, 0, 0), (0, 4, 3), (5, 4, 3)):
        np.testing.assert_allclose(
            seen.TransformIndexToPhysicalPoint(index), image.TransformIndexToPhysicalPoint(index), atol=1e-4
        )
    assert nib.load(output).header["sform_code"] == 1
    np.testing.assert_allclose(nib.load(output).affine, volume.affine, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        (np.zeros((5, 6, 8), np.uint8), "do not fit"),
        (np.full((5, 6, 7), -1), "negative"),
        (np.zeros((5, 6, 7)), "whole numbers"),
    ],
)
def test_labels_that_are_none_are_a_programming_error(tmp_path: Path, labels: np.ndarray[Any, Any], word: str) -> None:
    volume = scan(tmp_path / "s.nii")
    with pytest.raises(ValueError, match=word):
        write_labels(tmp_path / "out.nii", labels, volume)
    assert listing(tmp_path) == ["s.nii"]


def test_reserve_refuses_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, existing = tmp_path / "scan.nii.gz", tmp_path / "old.nii.gz"
    source.write_bytes(b"scan")
    existing.write_bytes(b"old")
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "link.nii.gz").symlink_to(source)
    (tmp_path / "hard.nii.gz").hardlink_to(source)
    (tmp_path / "dangling.nii.gz").symlink_to("nowhere")
    with pytest.raises(OutputError, match="does not exist"):
        reserve(tmp_path / "absent" / "out.nii")
    assert reserve(tmp_path / "made" / "here" / "out.nii", make_parents=True).path.parent.is_dir()
    with pytest.raises(OutputError, match="absent/new does not exist; create it first"):
        reserve(tmp_path / "absent" / "new" / "out.nii", new_folder=True)
    with pytest.raises(OutputError, match="exists already; use --overwrite"):
        reserve(existing)
    with pytest.raises(OutputError, match="exists already"):
        reserve(tmp_path / "dangling.nii.gz")
    assert reserve(existing, overwrite=True).overwrite
    with pytest.raises(OutputError, match="a folder"):
        reserve(tmp_path / "folder.nii", overwrite=True)
    with pytest.raises(OutputError, match="does not exist"):
        reserve(existing / "out.nii")
    os.mkfifo(tmp_path / "pipe.nii")
    with pytest.raises(OutputError, match="device or pipe"):
        reserve(tmp_path / "pipe.nii", overwrite=True)
    for name in ("scan.nii.gz", "link.nii.gz", "hard.nii.gz", "made/../scan.nii.gz"):
        with pytest.raises(UsageError, match="the output is the input"):
            reserve(tmp_path / name, overwrite=True, inputs=[source])
    with pytest.raises(UsageError, match=r"'\.txt' is not known; use \.nii\.gz or \.nii"):
        reserve(tmp_path / "out.txt", suffixes=(".nii.gz", ".nii"))
    with pytest.raises(OutputError, match="MB free"):
        reserve(tmp_path / "out.nii", expected_bytes=10**18)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="cannot be written to"):
        reserve(tmp_path / "out.nii")


def test_a_new_folder_comes_with_its_outputs_and_not_before(tmp_path: Path) -> None:
    one, two = (reserve(tmp_path / "new" / name, new_folder=True) for name in ("a.json", "b.json"))
    assert listing(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), OutputSet() as outputs:  # noqa: PT012
        outputs.add_bytes(one, b"new")
        raise KeyboardInterrupt
    assert listing(tmp_path) == []
    with OutputSet() as outputs:
        outputs.add_bytes(one, b"1")
        outputs.add_bytes(two, b"2")
    assert listing(tmp_path / "new") == ["a.json", "b.json"]


def test_a_suffix_that_is_no_niftis_is_a_usage_error(tmp_path: Path) -> None:
    volume = scan(tmp_path / "s.nii")
    with pytest.raises(UsageError, match=r"use \.nii\.gz or \.nii"):
        write_labels(tmp_path / "out.mha", labels_of(volume), volume)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EIO])
def test_a_failing_disk_leaves_the_old_output_and_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    volume = scan(tmp_path / "s.nii")
    output = tmp_path / "out.nii.gz"
    output.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError) as caught:
        write_labels(reserve(output, overwrite=True), labels_of(volume), volume)
    monkeypatch.undo()
    assert str(caught.value).startswith(f"{output}: ")
    assert output.read_bytes() == b"old"
    assert listing(tmp_path) == ["out.nii.gz", "s.nii"]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_size_limit_of_the_system_is_an_output_error(tmp_path: Path, suffix: str) -> None:
    data = np.random.default_rng(0).normal(size=(64, 64, 64)).astype("f4")
    scan(tmp_path / "s.nii", data=data)
    output = tmp_path / f"out{suffix}"
    output.write_bytes(b"old")
    code = (
        "import sys; from medseg.errors import OutputError; from medseg.io.read import read_volume\n"
        "from medseg.io.write import reserve, write_float\n"
        "volume = read_volume(sys.argv[1])\n"
        "try: write_float(reserve(sys.argv[2], overwrite=True), volume.data, volume)\n"
        "except OutputError as error: print(error)\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path / "s.nii", output],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert child.stdout == f"{output}: the file would exceed the size limit; choose another folder or raise the limit\n"
    assert child.stderr == ""
    assert output.read_bytes() == b"old"
    assert listing(tmp_path) == sorted([output.name, "s.nii"])


def test_a_set_appears_together(tmp_path: Path) -> None:
    volume = scan(tmp_path / "s.nii")
    with OutputSet() as outputs:
        outputs.add_labels(tmp_path / "a.nii.gz", labels_of(volume), volume)
        outputs.add_float(tmp_path / "p.nii.gz", volume.data, volume)
        outputs.add_bytes(tmp_path / "a.json", json.dumps({"labels": 2}).encode())
        assert not [name for name in listing(tmp_path) if not name.startswith(".") and name != "s.nii"]
    assert listing(tmp_path) == ["a.json", "a.nii.gz", "p.nii.gz", "s.nii"]
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes())[:4] == b"\x5c\x01\0\0"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "b.json").write_bytes(b"old")
    with pytest.raises(error), OutputSet() as outputs:  # noqa: PT012
        outputs.add_bytes(tmp_path / "a.png", b"new")
        outputs.add_bytes(reserve(tmp_path / "b.json", overwrite=True), b"new")
        raise error
    assert listing(tmp_path) == ["b.json"]
    assert (tmp_path / "b.json").read_bytes() == b"old"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("links", [True, False])
def test_a_set_that_fails_at_its_last_rename_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, links: bool
) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    (tmp_path / "c.json").write_bytes(b"old")
    rename = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp.json"):
            raise error
        return rename(self, target)

    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links on this file system")

    monkeypatch.setattr(Path, "replace", fail)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises((OutputError, KeyboardInterrupt)), OutputSet() as outputs:  # noqa: PT012
        for name in ("a.png", "b.csv", "c.json"):
            outputs.add_bytes(reserve(tmp_path / name, overwrite=True), b"new")
    assert listing(tmp_path) == ["a.png", "c.json"]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"old"}


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, living, own = child.pid, os.getppid(), os.getpid()
    for pid in (dead, living, own):
        (tmp_path / f".out.{pid}.tmp.nii.gz").write_bytes(b"half")
    (tmp_path / f".other.{dead}.tmp.nii.gz").write_bytes(b"half")
    reserve(tmp_path / "out.nii.gz")
    assert listing(tmp_path) == sorted([f".out.{living}.tmp.nii.gz", f".other.{dead}.tmp.nii.gz"])


def test_a_temporary_file_in_use_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    with OutputSet() as outputs:
        outputs.add_bytes(tmp_path / "a.json", b"first")
        reserve(tmp_path / "a.json")
        with pytest.raises(OutputError, match="another run"):
            write_bytes(tmp_path / "a.json", b"second")
    assert (tmp_path / "a.json").read_bytes() == b"first"


def test_a_long_name_still_has_room_for_its_temporary_file(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / ("ü" * 120 + ".json"), b"{}")
    assert listing(tmp_path) == [path.name]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
@pytest.mark.parametrize(
    "name",
    ["ct/example_ct_sm.nii.gz", "ct/example_seg_dicom.nii.gz", "brain/chris_t1.nii.gz",
     "hippocampus/imagesTr/hippocampus_003.nii.gz"],
)  # fmt: skip
def test_labels_lie_on_the_grid_of_real_scans(tmp_path: Path, name: str) -> None:
    volume = read_volume(SHARED / name)
    labels = (volume.data[0] > volume.data.mean()).astype(np.uint8)
    output = write_labels(tmp_path / "out.nii.gz", labels, volume)
    assert_same_geometry(output, volume)
    np.testing.assert_array_equal(np.asarray(nib.load(output).dataobj), labels)
