"""MetaImage and NRRD: the same scan as in ITK, and nothing damaged gets through."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from medseg.errors import InputError
from medseg.io.read import read_labels, read_volume

NAMES = ["s.mha", "s.mhd", "s.nrrd", "s.nhdr"]


def image(dtype: str = "i2", shape: tuple[int, ...] = (20, 30, 40), *, vector: bool = False) -> SimpleITK.Image:
    data = np.random.default_rng(0).integers(0, 50, shape).astype(dtype)
    made = SimpleITK.GetImageFromArray(data, isVector=vector)
    made.SetSpacing((0.5, 1.25, 3, 1)[: made.GetDimension()])
    made.SetOrigin((10, -20, 30, 0)[: made.GetDimension()])
    return made


def saved(path: Path, scan: SimpleITK.Image, *, packed: bool = False) -> Path:
    SimpleITK.WriteImage(scan, path, useCompression=packed)
    return path


def edited(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8"])
def test_voxels_and_places_are_those_of_itk(tmp_path: Path, name: str, packed: bool, dtype: str) -> None:
    scan = image(dtype)
    scan.SetDirection((0, 0, 1, 1, 0, 0, 0, -1, 0))
    volume = read_volume(saved(tmp_path / name, scan, packed=packed), channels=1)
    expected = SimpleITK.GetArrayFromImage(scan).transpose(2, 1, 0)
    np.testing.assert_array_equal(volume.data[0], expected)
    assert volume.data.flags.c_contiguous
    for index in ((0, 0, 0), (39, 0, 0), (0, 29, 0), (0, 0, 19)):
        lps = scan.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((volume.affine @ (*index, 1))[:3], (-lps[0], -lps[1], lps[2]), atol=1e-9)
    np.testing.assert_array_equal(read_labels(tmp_path / name)[0], expected)
    files = [tmp_path / name, *(path for path in tmp_path.iterdir() if path.name != name)]
    assert volume.source.sha256 == hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.mark.parametrize("name", ["s.mha", "s.nrrd"])
def test_vectors_and_a_fourth_axis_are_channels(tmp_path: Path, name: str) -> None:
    vectors = image("f4", (5, 6, 7, 3), vector=True)
    volume = read_volume(saved(tmp_path / name, vectors), channels=3)
    np.testing.assert_array_equal(volume.data, SimpleITK.GetArrayFromImage(vectors).transpose(3, 2, 1, 0))
    series = image("f4", (3, 5, 6, 7))
    path = saved(tmp_path / name, series)
    np.testing.assert_array_equal(
        read_volume(path, channels=1, volume_index=1).data[0],
        SimpleITK.GetArrayFromImage(series)[1].transpose(2, 1, 0),
    )
    with pytest.raises(InputError, match=r"--volume N, 0 to 2"):
        read_volume(path, channels=1)


@pytest.mark.parametrize(("space", "signs"), [("RAS", (1, 1, 1)), ("left-anterior-superior", (-1, 1, 1))])
def test_nrrd_spaces_become_ras(tmp_path: Path, space: str, signs: tuple[int, int, int]) -> None:
    path = edited(saved(tmp_path / "s.nrrd", image()), b"left-posterior-superior", space.encode())
    volume = read_volume(path)
    np.testing.assert_allclose(np.diag(volume.affine)[:3], np.multiply(signs, (0.5, 1.25, 3)))
    np.testing.assert_allclose(volume.affine[:3, 3], np.multiply(signs, (10, -20, 30)))


@pytest.mark.parametrize("name", ["S x.MHA", "S [1] %d.NRRD", "größe.mha", "no_suffix"])
def test_odd_names_read(tmp_path: Path, name: str) -> None:
    kind = ".nrrd" if name.endswith("NRRD") else ".mha"
    path = saved(tmp_path / f"s{kind}", image()).rename(tmp_path / name)
    assert read_volume(path).shape == (40, 30, 20)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_missing_and_damaged_bytes_are_input_errors(
    tmp_path: Path, name: str, packed: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / name, image(), packed=packed)
    data = next((other for other in tmp_path.iterdir() if other.name != name), path)
    whole = data.read_bytes()
    data.write_bytes(whole[:-4000])
    with pytest.raises(InputError, match=r"ends? early|holds 0\.044 of 0\.048 MB"):
        read_volume(path)
    if packed:
        for place in (-3000, -3):
            damaged = bytearray(whole)
            damaged[place] ^= 0xFF
            data.write_bytes(damaged)
            with pytest.raises(InputError, match="damaged"):
                read_volume(path)
    assert capfd.readouterr() == ("", "")


def test_a_data_file_elsewhere_or_absent_is_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "s.raw").write_bytes(bytes(48000))
    for name, key in (("s.mhd", b"ElementDataFile = "), ("s.nhdr", b"data file: ")):
        path = saved(folder / name, image())
        header = path.read_bytes()
        for elsewhere in (b"../s.raw", str(tmp_path / "s.raw").encode(), b"sub/s.raw", b"..\\s.raw"):
            path.write_bytes(header.replace(key + b"s.raw", key + elsewhere))
            with pytest.raises(InputError, match="another folder"):
                read_volume(path)
        path.write_bytes(header.replace(key + b"s.raw", key + b"t.raw"))
        with pytest.raises(InputError, match=r"t\.raw: no such file"):
            read_volume(path)
        path.write_bytes(header.replace(key + b"s.raw", key + b"LIST"))
        with pytest.raises(InputError, match="list of files"):
            read_volume(path)


@pytest.mark.parametrize(
    ("name", "old", "new", "word"),
    [
        ("s.mha", b"ElementSpacing", b"ElementSpaxing", "voxel size is unknown"),
        ("s.mha", b"0.5 1.25 3", b"0.5 1.25 0", "singular|not valid|implausible"),
        ("s.mha", b"0.5 1.25 3", b"500 1250 3", "implausible"),
        ("s.mha", b"40 30 20", b"40 30 999", "holds"),
        ("s.mha", b"40 30 20", b"4294967296 4294967296 4294967296", "holds|read as|not valid"),
        ("s.mha", b"40 30 20", b"40 -30 20", "whole numbers expected"),
        ("s.mha", b"ElementDataFile", b"ElementDatafool", "without ElementDataFile"),
        ("s.nrrd", b"space directions", b"space dyrections", "voxel size is unknown"),
        ("s.nrrd", b"(0,0,3)", b"(0,1.25,0)", "singular|not valid"),
        ("s.nrrd", b"encoding: raw", b'encoding: raw\nspace units: "um" "um" "um"', "space units um"),
        ("s.nrrd", b"40 30 20", b"40 30 99999999999999999", "holds|read as|not valid"),
        ("s.nrrd", b"type: short", b"type: block", "not valid"),
    ],
)
def test_a_bad_header_is_one_clear_input_error(tmp_path: Path, name: str, old: bytes, new: bytes, word: str) -> None:
    path = edited(saved(tmp_path / name, image()), old, new)
    with pytest.raises(InputError, match=word) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)


def test_planes_and_complex_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two dimensions"):
        read_volume(saved(tmp_path / "s.mha", image(shape=(30, 40))))
    pair = SimpleITK.Cast(image("f4"), SimpleITK.sitkFloat32)
    with pytest.raises(InputError, match="complex"):
        read_volume(saved(tmp_path / "c.nrrd", SimpleITK.RealAndImaginaryToComplex(pair, pair)))


def test_nan_is_replaced_here_too(tmp_path: Path) -> None:
    scan = image("f4")
    scan[1, 2, 3] = float("nan")
    volume = read_volume(saved(tmp_path / "s.mha", scan))
    assert volume.data[0, 1, 2, 3] == volume.data.min()
    assert volume.source.warnings[0].startswith("1 voxels")
