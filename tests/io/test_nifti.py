"""NIfTI in every form that the standard allows, and every way in which a file can be bad."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from medseg.errors import InputError, UsageError
from medseg.io.read import read_labels, read_volume

SHARED = Path(__file__).parents[3] / "shared" / "data"
AFFINE = np.array([[-1.5, 0, 0, 40], [0, 1.5, 0, -30], [0, 0, 3, 20], [0, 0, 0, 1]], dtype=float)
CODES = {"i1": 256, "u1": 2, "i2": 4, "u2": 512, "i4": 8, "u4": 768, "i8": 1024, "u8": 1280, "f4": 16, "f8": 64}


def voxels(dtype: str = "i2", shape: tuple[int, ...] = (7, 6, 5)) -> np.ndarray[Any, Any]:
    low = 0 if dtype.startswith("u") else -100
    return np.random.default_rng(7).integers(low, 100, shape).astype(dtype)


def nifti(
    data: np.ndarray[Any, Any] | None = None,
    *,
    version: int = 1,
    order: str = "<",
    pair: bool = False,
    gap: int = 0,
    **fields: Any,
) -> tuple[bytes, bytes]:
    """Header (up to vox_offset) and voxels of a NIfTI file, header fields overwritten as given."""
    data = voxels() if data is None else data
    header = (Nifti1Header if version == 1 else Nifti2Header)(endianness=order)
    header.set_data_shape(data.shape)
    header["datatype"], header["bitpix"] = CODES[data.dtype.str[1:]], 8 * data.dtype.itemsize
    header.set_sform(AFFINE, code=1)
    header["pixdim"][1:4] = (1.5, 1.5, 3)
    header["xyzt_units"], header["scl_slope"], header["scl_inter"] = 2, 1, 0
    size = header.single_vox_offset
    header["magic"] = header.pair_magic if pair else header.single_magic
    header["vox_offset"] = 0 if pair else size + gap
    for name, value in fields.items():
        header[name] = value
    head = header.binaryblock + (b"" if pair else bytes(4 + gap))
    return head, data.astype(data.dtype.newbyteorder(order)).tobytes(order="F")


def write(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def patched(offset: int, layout: str, *values: float) -> bytes:
    """A good file with some header bytes replaced."""
    head, data = nifti()
    buffer = bytearray(head)
    struct.pack_into(layout, buffer, offset, *values)
    return bytes(buffer) + data


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
def test_each_real_type_in_both_byte_orders_and_versions_is_the_same_scan(
    tmp_path: Path, dtype: str, order: str, version: int
) -> None:
    data = voxels(dtype)
    head, body = nifti(data, version=version, order=order)
    for path in (
        write(tmp_path / "a.nii", head, body),
        write(tmp_path / "b.nii.gz", gzip.compress(head + body)),
    ):
        volume = read_volume(path)
        assert volume.data.dtype == np.float32
        assert volume.data.flags.c_contiguous
        np.testing.assert_array_equal(volume.data, data.astype("f4")[None])
        np.testing.assert_array_equal(volume.affine, AFFINE)
        assert volume.source.warnings == ()
        assert volume.source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("header", "image"), [("s.hdr", "s.img"), ("s.HDR", "s.IMG"), ("s.hdr.gz", "s.img.gz")])
def test_a_pair_reads_by_either_of_its_names(tmp_path: Path, version: int, header: str, image: str) -> None:
    for name, part in zip((header, image), nifti(version=version, pair=True), strict=True):
        write(tmp_path / name, gzip.compress(part) if name.endswith(".gz") else part)
    for name in (header, image):
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.data[0], voxels())
        both = (tmp_path / header).read_bytes() + (tmp_path / image).read_bytes()
        assert volume.source.sha256 == hashlib.sha256(both).hexdigest()


@pytest.mark.parametrize(
    "name",
    ["S.NII.GZ", "a b.v1.nii", "-x.nii.gz", "50%{0}[1]'\".nii", "größe.nii.gz", "gro\u0308\u00dfe.nii", "no_suffix"],
)
def test_odd_names_read(tmp_path: Path, name: str) -> None:
    head, body = nifti()
    packed = name.lower().endswith(".gz")
    volume = read_volume(write(tmp_path / name, gzip.compress(head + body) if packed else head + body))
    np.testing.assert_array_equal(volume.data[0], voxels())


def test_gzip_variants_and_disagreeing_suffixes_read(tmp_path: Path) -> None:
    head, body = nifti(gap=64)
    whole = head + body + b"tail after the last voxel"
    forms = {
        "members.nii.gz": gzip.compress(whole[:500]) + gzip.compress(whole[500:]),
        "stored.nii.gz": gzip.compress(whole, 0),
        "padded.nii.gz": gzip.compress(whole) + bytes(512),
        "packed.nii": gzip.compress(whole),
        "plain.nii.gz": whole,
    }
    for name, content in forms.items():
        np.testing.assert_array_equal(read_volume(write(tmp_path / name, content)).data[0], voxels(), err_msg=name)
    link = tmp_path / "link.nii.gz"
    link.symlink_to("stored.nii.gz")
    np.testing.assert_array_equal(read_volume(link).data[0], voxels())


@pytest.mark.parametrize(
    ("slope", "inter", "expected"),
    [(0, 5, (1, 0)), (np.nan, 5, (1, 0)), (-2, 7, (-2, 7)), (0.25, -1024, (0.25, -1024)), (1, 0, (1, 0))],
)
def test_slope_and_intercept_are_applied(
    tmp_path: Path, slope: float, inter: float, expected: tuple[float, float]
) -> None:
    path = write(tmp_path / "s.nii", *nifti(scl_slope=slope, scl_inter=inter))
    wanted = voxels().astype(float) * expected[0] + expected[1]
    np.testing.assert_allclose(read_volume(path).data[0], wanted, rtol=1e-7)


@pytest.mark.parametrize("shape", [(7, 6, 5, 1), (7, 6, 5, 1, 1), (7, 6, 1), (1, 1, 1), (300, 2, 130)])
def test_trailing_axes_vanish_and_thin_volumes_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = voxels(shape=shape)
    volume = read_volume(write(tmp_path / "s.nii", *nifti(data)), channels=1)
    np.testing.assert_array_equal(volume.data, data.reshape(1, *shape[:3]))


def test_channels_come_from_the_fourth_axis_or_from_several_files(tmp_path: Path) -> None:
    data = voxels(shape=(7, 6, 5, 3))
    path = write(tmp_path / "s.nii.gz", gzip.compress(b"".join(nifti(data))))
    np.testing.assert_array_equal(read_volume(path, channels=3).data, np.moveaxis(data, 3, 0))
    np.testing.assert_array_equal(read_volume(path).data, np.moveaxis(data, 3, 0))
    np.testing.assert_array_equal(read_volume(path, channels=1, volume_index=2).data[0], data[..., 2])
    paths = [write(tmp_path / f"{n}.nii", *nifti(data[..., n])) for n in range(3)]
    volume = read_volume(paths, channels=3)
    np.testing.assert_array_equal(volume.data, np.moveaxis(data, 3, 0))
    assert volume.source.sha256 == hashlib.sha256(b"".join(p.read_bytes() for p in paths)).hexdigest()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"sform_code": 0, "qform_code": 0}, "left and right may be exchanged"),
        ({"qform_code": 1, "qoffset_x": 90}, "sform and qform differ"),
        ({"qform_code": 9}, "unknown qform_code 9"),
        ({"srow_x": (-1.5, 0.2, 0, 40)}, "degrees off a right angle"),
        ({"xyzt_units": 5}, "unknown unit code"),
    ],
)
def test_what_had_to_be_assumed_is_a_warning(tmp_path: Path, fields: dict[str, Any], word: str) -> None:
    path = write(tmp_path / "s.nii", *nifti(**fields))
    volume = read_volume(path)
    assert len(volume.source.warnings) == 1
    assert word in volume.source.warnings[0]
    np.testing.assert_array_equal(volume.affine, nib.load(path).affine)


@pytest.mark.parametrize("qfac", [-1, 0, 1])
@pytest.mark.parametrize("version", [1, 2])
def test_a_qform_alone_places_the_scan(tmp_path: Path, qfac: int, version: int) -> None:
    quaternion = {"quatern_b": 0.1, "quatern_c": -0.2, "quatern_d": 0.3, "qoffset_z": -5.0}
    pixdim = (qfac, 1.5, 1.25, 3, 0, 0, 0, 0)
    path = write(tmp_path / "s.nii", *nifti(version=version, sform_code=0, qform_code=2, pixdim=pixdim, **quaternion))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.affine, nib.load(path).affine)
    assert (np.linalg.det(volume.affine) < 0) == (qfac == -1)
    assert volume.source.warnings == ()


def test_a_quaternion_a_little_too_long_is_rounding(tmp_path: Path) -> None:
    long = {"quatern_b": 0.6003, "quatern_c": 0.8}
    volume = read_volume(write(tmp_path / "s.nii", *nifti(sform_code=0, qform_code=1, **long)))
    axes = volume.affine[:3, :3] / (1.5, 1.5, 3)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)


@pytest.mark.parametrize(("unit", "factor"), [(0, 1.0), (1, 1000.0), (2, 1.0), (3, 0.001), (10, 1.0)])
def test_units_become_millimetres(tmp_path: Path, unit: int, factor: float) -> None:
    rows = {f"srow_{name}": row / factor for name, row in zip("xyz", AFFINE[:3], strict=True)}
    volume = read_volume(write(tmp_path / "s.nii", *nifti(xyzt_units=unit, **rows)))
    np.testing.assert_allclose(volume.affine, AFFINE, rtol=1e-6)


def test_nan_and_infinite_voxels_are_replaced_and_counted(tmp_path: Path) -> None:
    data = voxels("f8")
    data[0, 0, :4] = (np.nan, np.inf, -np.inf, 1e300)  # the last is beyond float32
    finite = data[np.isfinite(data) & (data < 1e300)]
    volume = read_volume(write(tmp_path / "s.nii", *nifti(data)))
    low, high = finite.min(), finite.max()
    np.testing.assert_array_equal(volume.data[0, 0, 0, :4], (low, high, low, high))
    assert volume.source.warnings[0].startswith("4 voxels")


@pytest.mark.parametrize("scale", [1e33, 1e-27])
def test_extreme_but_finite_values_stay(tmp_path: Path, scale: float) -> None:
    data = voxels("f8") * scale
    np.testing.assert_allclose(read_volume(write(tmp_path / "s.nii", *nifti(data))).data[0], data, rtol=1e-6)


def test_labels_keep_their_integers_and_refuse_fractions(tmp_path: Path) -> None:
    large = voxels("i8")
    large[0, 0, 0] = 2**40 + 1
    labels, affine = read_labels(write(tmp_path / "a.nii", *nifti(large)))
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, large)
    np.testing.assert_array_equal(affine, AFFINE)
    whole, _ = read_labels(write(tmp_path / "b.nii", *nifti(voxels("f4"), order=">")))
    assert whole.dtype == np.int32
    np.testing.assert_array_equal(whole, voxels("f4"))
    with pytest.raises(InputError, match="not whole numbers"):
        read_labels(write(tmp_path / "c.nii", *nifti(voxels("f4") + 0.5)))
    with pytest.raises(InputError, match="not whole numbers"):
        read_labels(write(tmp_path / "d.nii", *nifti(scl_slope=0.3)))


def good() -> bytes:
    return b"".join(nifti())


def long() -> bytes:
    """A scan that is longer than what is read to tell the format, so that only the voxel pass meets its end."""
    return b"".join(nifti(voxels(shape=(40, 40, 40))))


def with_crc_broken() -> bytes:
    packed = bytearray(gzip.compress(long()))
    packed[-6] ^= 1
    return bytes(packed)


def with_stored_bit_flipped() -> bytes:
    packed = bytearray(gzip.compress(long(), 0))
    packed[100_000] ^= 1
    return bytes(packed)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.nii.gz": (lambda: b"", "empty file"),
    "empty_stream.nii.gz": (lambda: gzip.compress(b""), "empty gzip stream"),
    "text.nii": (lambda: b"patient notes, nothing else\n" * 30, "a text file"),
    "html.nii.gz": (lambda: b"\n<!DOCTYPE html><html><body>404</body></html>", "failed download"),
    "lfs.nii.gz": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
    "png.nii": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(500), "PNG"),
    "jpeg.nii": (lambda: b"\xff\xd8\xff\xe0" + bytes(500), "JPEG"),
    "random.nii": (lambda: np.random.default_rng(1).bytes(4000), "not those of a NIfTI"),
    "random.nii.gz": (lambda: gzip.compress(np.random.default_rng(1).bytes(4000)), "not those of a NIfTI"),
    "dicom.dcm": (lambda: bytes(128) + b"DICM" + bytes(100), "no volume"),
    "archive.zip": (lambda: b"PK\x03\x04" + bytes(100), "zip"),
    "short_header.nii": (lambda: good()[:200], "header ends after 200"),
    "truncated.nii.gz": (lambda: gzip.compress(long())[:-60], "ends early"),
    "no_trailer.nii.gz": (lambda: gzip.compress(long())[:-8], "ends early"),
    "wrong_crc.nii.gz": (with_crc_broken, "damaged"),
    "flipped_bit.nii.gz": (with_stored_bit_flipped, "damaged"),
    "garbage_after.nii.gz": (lambda: gzip.compress(long()) + b"garbage", "damaged"),
    "few.nii": (lambda: good()[:-200], "holds 0.00022 of 0.00042 MB"),
    "few.nii.gz": (lambda: gzip.compress(good()[:-200]), "holds 0.00022 of 0.00042 MB"),
    "long_tail.nii.gz": (lambda: gzip.compress(good() + bytes(65 << 20)), "after the last voxel"),
    "sizeof_hdr.nii": (lambda: patched(0, "<i", 347), "not those of a NIfTI"),
    "magic.nii": (lambda: patched(344, "<4s", b"n+3\0"), "magic"),
    "analyze.hdr": (lambda: patched(344, "<4s", b"\0\0\0\0"), "ANALYZE"),
    "lonely.hdr": (lambda: nifti(pair=True)[0], "absent"),
    "lonely.img": (lambda: nifti(pair=True)[1], "absent"),
    "type_0.nii": (lambda: patched(70, "<h", 0), "unknown datatype 0"),
    "type_9999.nii": (lambda: patched(70, "<h", 9999), "unknown datatype 9999"),
    "bit.nii": (lambda: patched(70, "<h", 1), "1-bit"),
    "complex.nii": (lambda: patched(70, "<h", 32), "complex64"),
    "float128.nii": (lambda: patched(70, "<h", 1536), "float128"),
    "rgb.nii": (lambda: patched(70, "<h", 128), "RGB"),
    "rgba.nii": (lambda: patched(70, "<h", 2304), "RGBA"),
    "dim0_0.nii": (lambda: patched(40, "<h", 0), "0 dimensions"),
    "dim0_8.nii": (lambda: patched(40, "<h", 8), "8 dimensions"),
    "dim_zero.nii": (lambda: patched(40, "<4h", 3, 7, 0, 5), "at least one voxel"),
    "dim_negative.nii": (lambda: patched(40, "<4h", 3, 7, -6, 5), "at least one voxel"),
    "one_axis.nii": (lambda: patched(40, "<2h", 1, 7), "one dimension"),
    "plane.nii": (lambda: patched(40, "<3h", 2, 7, 6), "two dimensions"),
    "vectors.nii": (lambda: b"".join(nifti(voxels(shape=(7, 6, 5, 1, 3)))), r"shape \(7, 6, 5, 1, 3\)"),
    "huge.nii": (lambda: patched(40, "<4h", 3, 32767, 32767, 32767), "holds"),
    "huge.nii.gz": (lambda: gzip.compress(patched(40, "<4h", 3, 32767, 32767, 32767)), "of gzip can hold"),
    "wraps.nii": (lambda: b"".join(nifti(version=2, dim=(3, 2**40, 2**40, 2**40, 1, 1, 1, 1))), "holds"),
    "offset_nan.nii": (lambda: patched(108, "<f", np.nan), "vox_offset"),
    "offset_minus.nii": (lambda: patched(108, "<f", -352), "vox_offset"),
    "offset_inside.nii": (lambda: patched(108, "<f", 16), "vox_offset"),
    "offset_past.nii": (lambda: patched(108, "<f", 1e9), "holds 0 of"),
    "offset_past.nii.gz": (lambda: gzip.compress(patched(108, "<f", 20000)), "holds 0 of"),
    "slope_inf.nii": (lambda: patched(112, "<2f", np.inf, 0), "not finite"),
    "inter_inf.nii": (lambda: patched(112, "<2f", 2, -np.inf), "not finite"),
    "inter_nan.nii": (lambda: patched(112, "<2f", 2, np.nan), "scl_inter is NaN"),
    "all_nan.nii": (lambda: b"".join(nifti(np.full((4, 4, 4), np.nan, "f4"))), "no voxel"),
    "affine_nan.nii": (lambda: b"".join(nifti(srow_x=(np.nan, 0, 0, 0))), "NaN"),
    "affine_zero.nii": (lambda: b"".join(nifti(srow_x=0, srow_y=0, srow_z=0)), "singular"),
    "affine_flat.nii": (lambda: b"".join(nifti(srow_z=(1.5, 1.5, 0, 0))), "singular"),
    "spacing_0.nii": (lambda: b"".join(nifti(sform_code=0, pixdim=(1, 1, 0, 1, 0, 0, 0, 0))), "voxel size is unknown"),
    "spacing_nan.nii": (
        lambda: b"".join(nifti(sform_code=0, qform_code=1, pixdim=(1, 1, np.nan, 1, 0, 0, 0, 0))),
        "voxel size is unknown",
    ),
    "metres.nii": (lambda: b"".join(nifti(xyzt_units=1)), "implausible voxel size 1500 x 1500 x 3000 mm"),
    "microns.nii": (lambda: b"".join(nifti(xyzt_units=3)), "implausible"),
    "long.nii": (lambda: b"".join(nifti(voxels(shape=(2, 2, 100)), srow_z=(0, 0, 45, 0))), "implausible"),
    "quaternion.nii": (lambda: b"".join(nifti(sform_code=0, qform_code=1, quatern_b=1.1)), "quaternion"),
    "qfac.nii": (lambda: b"".join(nifti(sform_code=0, qform_code=1, pixdim=(-4, 1, 1, 1, 0, 0, 0, 0))), r"pixdim\[0\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_clear_input_error(tmp_path: Path, name: str) -> None:
    build, word = BAD[name]
    path = write(tmp_path / name, build())
    start = time.monotonic()
    with pytest.raises(InputError, match=word) as caught:
        read_volume(path)
    assert time.monotonic() - start < 2
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("shape", "channels", "word"),
    [
        ((7, 6, 5, 4), 1, r"shape \(7, 6, 5, 4\): 4 volumes; .* takes 1 channel; .*--volume N, 0 to 3"),
        ((7, 6, 1, 5), 1, r"shape \(7, 6, 1, 5\): slices lie on the fourth axis"),
        ((7, 6, 5), 4, r"shape \(7, 6, 5\): 1 of 4 channels; .*give 4 files"),
        ((7, 6, 5, 3), 4, r"3 of 4 channels"),
    ],
)
def test_a_wrong_number_of_channels_names_the_shape_and_the_way_out(
    tmp_path: Path, shape: tuple[int, ...], channels: int, word: str
) -> None:
    path = write(tmp_path / "s.nii", *nifti(voxels(shape=shape)))
    with pytest.raises(InputError, match=word):
        read_volume(path, channels=channels)


def test_a_volume_index_out_of_range_is_a_usage_error(tmp_path: Path) -> None:
    path = write(tmp_path / "s.nii", *nifti(voxels(shape=(7, 6, 5, 4))))
    with pytest.raises(UsageError, match="0 to 3"):
        read_volume(path, volume_index=4)


def test_channels_on_different_grids_are_refused_with_the_difference(tmp_path: Path) -> None:
    first = write(tmp_path / "a.nii", *nifti())
    moved = write(tmp_path / "b.nii", *nifti(srow_x=(-1.5, 0, 0, 40.5)))
    other = write(tmp_path / "c.nii", *nifti(voxels(shape=(7, 6, 4))))
    with pytest.raises(InputError, match=r"b\.nii: its grid lies up to 0\.5 mm off"):
        read_volume([first, moved])
    with pytest.raises(InputError, match=r"c\.nii: shape \(7, 6, 4\), but a\.nii has \(7, 6, 5\)"):
        read_volume([first, other])
    with pytest.raises(InputError, match="2 files; the bundle takes 4 channels"):
        read_volume([first, moved], channels=4)


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "dangling.nii").symlink_to("nowhere.nii")
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    for name, word in {
        "": "a folder",
        "pipe.nii": "not a regular file",
        "dangling.nii": "symbolic link to a file that does not exist",
        "loop.nii": "loop",
        "absent.nii": "no such file",
        "absent.nii/x.nii": "no such file",
        "a\0b.nii": "not a valid file name",
        "n" * 300 + ".nii": "name too long",
    }.items():
        with pytest.raises(InputError, match=f"(?i){word}"):
            read_volume(tmp_path / name)
    with pytest.raises(InputError, match="not a regular file"):
        read_volume("/dev/zero")


def test_a_file_without_permission_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "s.nii", good())

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        read_volume(path)


def test_a_header_that_asks_for_terabytes_costs_no_memory(tmp_path: Path) -> None:
    bomb = bytearray(patched(40, "<4h", 3, 2048, 2048, 500)[:352])
    path = write(tmp_path / "bomb.nii.gz", gzip.compress(bytes(bomb) + bytes(300_000_000)))
    assert path.stat().st_size < 400_000
    code = (
        "import sys, time; from medseg.errors import InputError; from medseg.io.read import read_volume\n"
        "import nibabel\n"
        "start = time.monotonic()\n"
        "try: read_volume(sys.argv[1])\n"
        "except InputError as error: print(error, time.monotonic() - start < 2)\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000, 1_500_000_000))

    child = subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert "of gzip can hold" in child.stdout, child.stderr
    assert child.stdout.strip().endswith("True")


@pytest.mark.parametrize("version", [1, 2])
def test_a_thousand_damaged_headers_read_or_are_refused(tmp_path: Path, version: int) -> None:
    head, body = nifti(version=version, qform_code=1, quatern_b=0.5)
    rng = np.random.default_rng(20)
    path = tmp_path / "s.nii"
    outcomes = {"ok": 0, "refused": 0}
    for _ in range(1000):
        buffer = bytearray(head)
        buffer[rng.integers(len(head) - 4)] = rng.integers(256)
        write(path, bytes(buffer), body)
        start = time.monotonic()
        try:
            volume = read_volume(path)
        except InputError:
            outcomes["refused"] += 1
        else:
            outcomes["ok"] += 1
            assert np.isfinite(volume.data).all()
            assert np.isfinite(volume.affine).all()
        assert time.monotonic() - start < 2
    assert min(outcomes.values()) > 50, outcomes


REAL = [
    "ct/example_ct.nii.gz",
    "ct/example_seg_dicom.nii.gz",
    "brain/chris_t1.nii.gz",
    "hippocampus/imagesTr/hippocampus_003.nii.gz",
]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
@pytest.mark.parametrize("name", REAL)
def test_real_scans_read_as_nibabel_reads_them(name: str) -> None:
    volume = read_volume(SHARED / name, channels=1)
    expected = nib.load(SHARED / name)
    np.testing.assert_array_equal(volume.data[0], expected.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert volume.source.warnings == ()
