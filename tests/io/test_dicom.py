"""DICOM series as volumes: voxels and affine against SimpleITK, and every way a series can be no volume."""

from __future__ import annotations

import io
import logging
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - as everybody calls it
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless, generate_uid
from scipy.spatial.transform import Rotation

from medseg.errors import InputError, UsageError
from medseg.io import archive, geometry
from medseg.io.dicom import on_source_grid
from medseg.io.read import read_volume
from tests.builders import HIPPOCAMPUS, SHARED
from tests.dicom_builders import IDENTITY, slice_datasets, write_multiframe, write_series, write_zip

EXAMPLE = SHARED / "data" / "ct" / "dicom"
AFFINE = np.array([[-0.8, 0, 0, 20.0], [0, -0.7, 0, 31.5], [0, 0, 2.5, -40.0], [0, 0, 0, 1]])


def _stored(shape: tuple[int, int, int] = (9, 7, 6), dtype: str = "<i2", seed: int = 0) -> NDArray[np.integer]:
    low, high = {"<i2": (-2000, 3000), "<u2": (0, 4095), "u1": (0, 255)}[dtype]
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def _by_simpleitk(paths: list[Path]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Voxels (X, Y, Z) and affine that SimpleITK makes of files in the order of the slices, through NIfTI."""
    image = sitk.ReadImage([str(path) for path in paths])
    with tempfile.TemporaryDirectory() as folder:
        sitk.WriteImage(image, f"{folder}/series.nii")
        again = nib.load(f"{folder}/series.nii")
        return np.asarray(again.dataobj, dtype=np.float32), again.affine


def _rotated(degrees: tuple[float, float, float], spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * spacing
    affine[:3, 3] = (-31.25, 17.5, 208.75)
    return affine


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the example CT series is not at hand")
def test_a_real_compressed_ct_equals_the_reference_and_simpleitk() -> None:
    volume = read_volume(EXAMPLE)
    expected = np.diag([-0.9765625, -0.9765625, 2.0, 1.0])
    expected[:3, 3] = (249.51171875, 437.51171875, -804.5)
    np.testing.assert_array_equal(volume.affine, expected)
    assert volume.source.dicom is not None
    assert not volume.source.dicom.referable
    voxels, _ = _by_simpleitk([EXAMPLE / file for file in volume.source.dicom.files])
    np.testing.assert_array_equal(volume.data[0], voxels)
    assert (volume.shape, volume.data.min(), volume.data.max()) == ((512, 512, 20), -1024, 1839)


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("angles", [(0, 0, 0), (15, -20, 40), (90, 0, 90)], ids=str)
def test_voxels_and_affine_are_those_of_simpleitk(
    modality: str, angles: tuple[float, float, float], tmp_path: Path
) -> None:
    stored, affine = _stored(dtype="<u2"), _rotated(angles, (0.8, 0.7, 2.5))
    # SimpleITK leaves out the rescaling of MR.
    rescale = (1, -1024) if modality == "CT" else None
    paths = write_series(tmp_path, stored, affine, modality=modality, rescale=rescale, order=5)
    volume = read_volume(tmp_path)
    voxels, expected = _by_simpleitk(paths)
    np.testing.assert_array_equal(volume.data[0], voxels)
    np.testing.assert_allclose(volume.affine, expected, atol=2e-5)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    quaternion=st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(x * x for x in q) > 0.01),
    spacing=st.tuples(*[st.floats(0.3, 5)] * 3),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(2, 6)),
    flip=st.booleans(),
    seed=st.integers(1, 1000),
)
def test_a_nifti_grid_comes_back_through_dicom(
    quaternion: tuple[float, ...],
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float],
    shape: tuple[int, int, int],
    flip: bool,
    seed: int,
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_quat(quaternion).as_matrix() * spacing
    affine[:3, 3] = origin
    if flip:  # a left-handed grid: slices come back in the opposite order
        affine[:3, 2] *= -1
    stored = _stored(shape, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        write_series(Path(folder, "s"), stored, affine, order=seed)
        volume = read_volume(Path(folder, "s"))
    if flip:
        stored = stored[:, :, ::-1]
        affine[:3, 3] += affine[:3, 2] * (shape[2] - 1)
        affine[:3, 2] *= -1
    np.testing.assert_array_equal(volume.data[0], stored)
    assert geometry.corner_shift(shape, volume.affine, affine) < 1e-4


def test_signed_values_and_a_slope_of_each_slice(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = str(0.5 * (k + 1)), str(-10 * k)

    stored = _stored()
    write_series(tmp_path, stored, AFFINE, modality="PT", change=change)
    expected = stored * 0.5 * np.arange(1, 7) - 10.0 * np.arange(6)
    np.testing.assert_array_equal(read_volume(tmp_path).data[0], expected.astype(np.float32))


def test_bits_beside_the_stored_ones_are_no_values(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 1

    true = _stored() // 2  # fits into 12 bits with sign
    overlay = np.where(np.arange(9)[:, None, None] % 2, 0x4000, 0)
    stored = ((true & 0xFFF) | overlay).astype("<u2")
    write_series(tmp_path, stored, AFFINE, change=change)
    np.testing.assert_array_equal(read_volume(tmp_path).data[0], true)


def test_monochrome1_is_inverted_for_mr_and_only_a_way_to_show_ct(tmp_path: Path) -> None:
    def change(dataset: Dataset, k: int) -> None:
        dataset.PhotometricInterpretation, dataset.BitsStored, dataset.HighBit = "MONOCHROME1", 12, 11

    stored = _stored(dtype="<u2")
    write_series(tmp_path / "mr", stored, AFFINE, change=change)
    write_series(tmp_path / "ct", stored, AFFINE, modality="CT", rescale=(1, -1024), change=change)
    inverted = read_volume(tmp_path / "mr")
    np.testing.assert_array_equal(inverted.data[0], 4095 - stored.astype(int))
    assert "MONOCHROME1" in inverted.source.warnings[0]
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").data[0], stored.astype(int) - 1024)


def _compress(dataset: Dataset, syntax: str, folder: Path) -> None:
    """Compress an image in place; SimpleITK knows the kinds that pydicom's plug-ins do not."""
    if syntax in {RLELossless, JPEGLSLossless}:
        dataset.compress(syntax, encoding_plugin="pydicom" if syntax == RLELossless else "pyjpegls")
        return
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(folder / "packed.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG2000" if syntax == JPEG2000Lossless else "JPEG")
    writer.Execute(sitk.GetImageFromArray(dataset.pixel_array[None]))
    packed = pydicom.dcmread(folder / "packed.dcm")
    (folder / "packed.dcm").unlink()
    assert packed.file_meta.TransferSyntaxUID == syntax
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset["PixelData"] = packed["PixelData"]


@pytest.mark.parametrize(
    "syntax", [JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless], ids=lambda uid: uid.name[:16]
)
@pytest.mark.parametrize("dtype", ["<u2", "u1", "<i2"])
def test_compressed_series_equal_plain_ones(syntax: str, dtype: str, tmp_path: Path) -> None:
    stored = _stored((32, 20, 3), dtype)
    for k, dataset in enumerate(slice_datasets(stored, AFFINE, rescale=(2, 1))):
        _compress(dataset, syntax, tmp_path)
        dataset.save_as(tmp_path / f"{k}", enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(tmp_path).data[0], stored * 2.0 + 1.0)
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame[: len(frame) // 2]])
    dataset.save_as(tmp_path / "2", enforce_file_format=True)
    with pytest.raises(InputError, match="2: its pixels are damaged"):
        read_volume(tmp_path)


def test_a_multiframe_file_is_placed_by_its_functional_groups(tmp_path: Path) -> None:
    stored, affine = _stored(dtype="<u2"), _rotated((10, 5, 0), (0.8, 0.7, 2.5))
    path = write_multiframe(tmp_path / "enhanced.dcm", stored, affine, order=np.array([3, 0, 5, 1, 4, 2]))
    volume = read_volume(path)
    expected = stored * (1.0 + 0.5 * np.arange(6)) - 1000.0
    np.testing.assert_array_equal(volume.data[0], expected.astype(np.float32))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert volume.source.dicom is not None
    assert volume.source.dicom.numbers == (1, 3, 5, 0, 4, 2)


def test_a_compressed_multiframe_file_equals_the_plain_one(tmp_path: Path) -> None:
    path = write_multiframe(tmp_path / "plain.dcm", _stored(dtype="<u2"), AFFINE)
    dataset = pydicom.dcmread(path)
    dataset.compress(JPEGLSLossless, encoding_plugin="pyjpegls", generate_instance_uid=False)
    dataset.save_as(tmp_path / "packed.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(tmp_path / "packed.dcm").data, read_volume(path).data)


def test_other_files_and_objects_are_left_out_with_one_warning(tmp_path: Path) -> None:
    def localiser(dataset: Dataset, k: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    def capture(dataset: Dataset, k: int) -> None:
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"

    stored = _stored()
    write_series(tmp_path / "a" / "b", stored, AFFINE)
    write_series(tmp_path / "scout", stored[:, :, :3], AFFINE, number=2, change=localiser)
    write_series(tmp_path / "capture", stored[:, :, :1], AFFINE, number=3, change=capture)
    (tmp_path / "notes.txt").write_text("x" * 200)
    (tmp_path / "empty").touch()
    (tmp_path / ".DS_Store").write_bytes(b"\0" * 300)
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.data[0], stored)
    assert volume.source.warnings == ("left out: 3 localisers, 1 secondary capture, 2 files that are not DICOM",)


def test_a_series_is_chosen_by_number_or_part_of_its_uid(tmp_path: Path) -> None:
    def named(uid: str) -> Callable[[Dataset, int], None]:
        def change(dataset: Dataset, k: int) -> None:
            dataset.SeriesInstanceUID = uid

        return change

    stored = _stored()
    write_series(tmp_path, stored, AFFINE, number=7, change=named("1.2.3.7.4711"))
    write_series(tmp_path, stored[:, :, :4] + 1, AFFINE, number=5, modality="CT", change=named("1.2.3.5.4712"))
    with pytest.raises(InputError, match=r"2 series \(1: CT, 4 images, 9 x 7; 2: MR, 6 images, 9 x 7\)") as caught:
        read_volume(tmp_path)
    assert not any(word in str(caught.value) for word in IDENTITY)
    for wanted in ("2", "1.2.3.7.4711", "4711", "1.2.3.7"):
        volume = read_volume(tmp_path, series=wanted)
        np.testing.assert_array_equal(volume.data[0], stored)
    assert "1 other series left out" in volume.source.warnings[0]
    for wanted in ("3", "1.2.3", "", "9.9"):
        with pytest.raises(UsageError, match="--series"):
            read_volume(tmp_path, series=wanted)


def test_a_4d_series_is_split_by_what_tells_its_volumes_apart(tmp_path: Path) -> None:
    first, second = _stored(seed=1), _stored(seed=2)
    uid = generate_uid()

    def echo(value: str) -> Callable[[Dataset, int], None]:
        def change(dataset: Dataset, k: int) -> None:
            dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID, dataset.EchoTime = uid, "1.2.3", value

        return change

    write_series(tmp_path, second, AFFINE, number=1, change=echo("80.5"))
    write_series(tmp_path, first, AFFINE, number=2, change=echo("9.25"))
    with pytest.raises(InputError, match=r"2 volumes .* differ in EchoTime; .*--volume N, 0 to 1"):
        read_volume(tmp_path, channels=1)
    np.testing.assert_array_equal(read_volume(tmp_path).data, np.stack([first, second]))
    np.testing.assert_array_equal(read_volume(tmp_path, channels=1, volume_index=1).data[0], second)


def test_slices_sent_twice_are_read_once(tmp_path: Path) -> None:
    stored = _stored()
    paths = write_series(tmp_path, stored, AFFINE)
    before = read_volume(tmp_path)
    (tmp_path / "copy").write_bytes(paths[2].read_bytes())
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.data[0], stored)
    assert volume.source.warnings == ("1 image is a copy of another and left out",)
    assert volume.source.sha256 == before.source.sha256


SHEAR = np.array([[-0.8, 0, 0, 20.0], [0, -0.7, 0.7, 31.5], [0, 0, 2.0, -40.0], [0, 0, 0, 1]])


def test_a_gantry_tilt_is_refused_or_resampled_to_right_angles(tmp_path: Path) -> None:
    x, y, z = np.meshgrid(np.arange(16), np.arange(18), np.arange(8), indexing="ij")
    # A ramp in space, so that linear interpolation gives it back exactly.
    world = geometry.world(SHEAR, np.stack([x, y, z], axis=-1))
    stored = np.rint(world @ (50, 100, 30)).astype("<i2")
    write_series(tmp_path, stored, SHEAR, modality="CT")
    with pytest.raises(InputError, match=r"gantry tilt: .* 19\.3 degrees .*--fix-gantry-tilt"):
        read_volume(tmp_path)
    volume = read_volume(tmp_path, fix_gantry_tilt=True)
    assert geometry.is_orthogonal(volume.affine)
    np.testing.assert_allclose(geometry.spacing(volume.affine), (0.8, 0.7, 2.0), rtol=1e-6)
    places = geometry.world(volume.affine, np.stack(np.indices(volume.shape), axis=-1))
    index = (places - SHEAR[:3, 3]) @ np.linalg.inv(SHEAR[:3, :3]).T
    inside = ((index >= 0) & (index <= np.array(stored.shape) - 1)).all(axis=-1)
    assert inside.sum() > 0.9 * 16 * 17 * 8
    np.testing.assert_allclose(volume.data[0][inside], (places @ (50, 100, 30))[inside], atol=1.0)
    # Labels go back onto the images within half a voxel: a half space stays one.
    labels = (places[..., 1] > 30.0).astype(np.uint8)
    back = on_source_grid(labels, volume)
    assert back.shape == stored.shape
    far = np.abs(world[..., 1] - 30.0) > 0.36
    np.testing.assert_array_equal(back[far], (world[..., 1] > 30.0)[far])


def _drop(folder: Path, paths: list[Path]) -> None:
    paths[2].unlink()


def _edit(path: Path, **values: object) -> None:
    dataset = pydicom.dcmread(path)
    for name, value in values.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)


def _uneven(folder: Path, paths: list[Path]) -> None:
    _edit(paths[-1], ImagePositionPatient=["-20", "-31.5", "-26.3"])


def _cut(folder: Path, paths: list[Path]) -> None:
    paths[3].write_bytes(paths[3].read_bytes()[:-40])


def _second_phase(folder: Path, paths: list[Path]) -> None:
    dataset = pydicom.dcmread(paths[2])
    dataset.SOPInstanceUID, dataset.AcquisitionTime = generate_uid(), "120001"
    dataset.PixelData = dataset.PixelData[::-1]
    dataset.save_as(folder / "other", enforce_file_format=True)


def _half_turned(folder: Path, paths: list[Path]) -> None:
    for path in paths[3:]:
        _edit(path, ImageOrientationPatient=["0", "1", "0", "0", "0", "-1"])


def _no_rescale(folder: Path, paths: list[Path]) -> None:
    for path in paths:
        _edit(path, Modality="CT", RescaleSlope=None, RescaleIntercept=None)


def _only_one(folder: Path, paths: list[Path]) -> None:
    for path in paths[1:]:
        path.unlink()


def _all_gone(folder: Path, paths: list[Path]) -> None:
    for path in paths:
        path.write_text("no DICOM " * 40)


BAD: list[tuple[str, Callable[[Path, list[Path]], None], str]] = [
    ("missing slice", _drop, r"1 slice is missing, between -37.50 and -32.50 mm"),
    ("uneven steps", _uneven, r"unevenly spaced, steps from 2.5 over 2.5 .median. to 3.7 mm"),
    ("truncated pixels", _cut, r"IM0003_1: its pixels are damaged, truncated"),
    ("two phases", _second_phase, r"1 of 6 places hold several images.*AcquisitionTime"),
    ("two orientations", _half_turned, r"images of 2 sizes, orientations.*3 of 9 x 7, 3 of 9 x 7"),
    (
        "no position",
        lambda _, paths: _edit(paths[1], ImagePositionPatient=None),
        "IM0001_1 has no usable ImagePosition",
    ),
    ("no spacing", lambda _, paths: _edit(paths[1], PixelSpacing=None), "IM0001_1 has no usable PixelSpacing"),
    ("no pixels", lambda _, paths: _edit(paths[1], PixelData=None), r"IM0001_1: no pixel data \(7FE0,0010\)"),
    ("other rows", lambda _, paths: _edit(paths[1], Rows=14), "1 slice is missing, between -40"),
    ("CT without rescale", _no_rescale, "6 of 6 CT images have no RescaleSlope"),
    ("one image", _only_one, "one image; medseg reads volumes; give the folder"),
    ("no DICOM", _all_gone, "without a DICOM file"),
    ("kilometres", lambda _, paths: [_edit(p, PixelSpacing=["900", "900"]) for p in paths], "implausible voxel size"),
]


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_series_that_is_no_volume_is_one_clear_line(
    change: Callable[[Path, list[Path]], None], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    change(folder, write_series(folder, _stored(), AFFINE, rescale=(1, 0)))
    with pytest.raises(InputError, match=words) as caught:
        read_volume(folder, channels=1)
    assert str(caught.value).startswith(f"{folder}: ")
    assert not any(word in str(caught.value) for word in IDENTITY)


def test_a_file_named_after_the_patient_is_not_named(tmp_path: Path) -> None:
    paths = write_series(tmp_path, _stored(), AFFINE)
    named = paths[2].rename(tmp_path / "ZYXWVUT_002.dcm")
    _edit(named, PixelSpacing=None)
    with pytest.raises(InputError, match="file 6 in the order of names has no usable PixelSpacing"):
        read_volume(tmp_path)


def test_series_without_uids_are_read_and_kept_apart_by_number(tmp_path: Path) -> None:
    def stripped(dataset: Dataset, k: int) -> None:
        dataset.SeriesInstanceUID = dataset.StudyInstanceUID = dataset.SOPInstanceUID = ""

    stored = _stored()
    write_series(tmp_path, stored, AFFINE, number=1, change=stripped)
    write_series(tmp_path, stored, AFFINE, number=2, change=stripped)
    with pytest.raises(InputError, match="2 series"):
        read_volume(tmp_path)
    np.testing.assert_array_equal(read_volume(tmp_path, series="2").data[0], stored)


def test_an_archive_is_the_folder_it_holds(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "deep", _stored(), AFFINE, order=3)
    (tmp_path / "in" / "readme.txt").write_text("x")
    packed = read_volume(write_zip(tmp_path / "study.zip", tmp_path / "in"))
    plain = read_volume(tmp_path / "in")
    np.testing.assert_array_equal(packed.data, plain.data)
    np.testing.assert_array_equal(packed.affine, plain.affine)
    assert packed.source.sha256 == plain.source.sha256


def _zipped(*entries: tuple[str, bytes], link: bool = False) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if link:
                info.external_attr = 0o120777 << 16
            file.writestr(info, data)
    return packed.getvalue()


IMAGE = bytes(128) + b"DICM" + bytes(3000)
ARCHIVES: list[tuple[str, bytes, str]] = [
    ("climbing", _zipped(("../../evil.dcm", IMAGE)), "leads out"),
    ("absolute", _zipped(("/tmp/evil.dcm", IMAGE)), "leads out"),  # noqa: S108
    ("backslashes", _zipped(("..\\evil.dcm", IMAGE)), "leads out"),
    ("drive", _zipped(("C:\\evil.dcm", IMAGE)), "leads out"),
    ("link", _zipped(("evil.dcm", b"/etc/passwd"), link=True), "link or a device"),
    ("nested", _zipped(("inner", _zipped(("a", IMAGE)))), "archive inside"),
    ("many entries", _zipped(*((f"{n}", b"x") for n in range(40))), "40 entries"),
    ("too large", _zipped(("a", IMAGE * 40)), "more than"),
    ("bomb", _zipped(("a", IMAGE + bytes(60_000))), "times its size"),
    ("truncated", _zipped(("a", IMAGE))[:-30], "damaged"),
    ("wrong checksum", _zipped(("a", IMAGE)).replace(zlib.crc32(IMAGE).to_bytes(4, "little"), b"abcd"), "damaged"),
    ("no image", _zipped(("a.txt", b"text")), "without a DICOM file"),
    ("empty", _zipped(), "without a DICOM file|unknown format|damaged"),
    (
        "encrypted",
        _zipped(("a", IMAGE)).replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\x01\0"),
        "encr",
    ),
]


@pytest.mark.parametrize(("data", "words"), [row[1:] for row in ARCHIVES], ids=[row[0] for row in ARCHIVES])
def test_a_dangerous_archive_leaves_nothing_behind(
    data: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MOST_ENTRIES", 30)
    monkeypatch.setattr(archive, "MOST_BYTES", 100_000)
    monkeypatch.setattr(archive, "RATIO_FROM_BYTES", 50_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    path = tmp_path / "study.zip"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_volume(path)
    assert not list((tmp_path / "tmp").iterdir())
    assert {file.name for file in tmp_path.iterdir()} == {"tmp", "study.zip"}


@pytest.mark.skipif(not HIPPOCAMPUS.exists(), reason="the hippocampus sample is not at hand")
def test_a_real_scan_comes_back_through_dicom(tmp_path: Path) -> None:
    image = nib.load(min((HIPPOCAMPUS / "imagesTr").glob("*.nii.gz")))
    stored = np.rint(np.asarray(image.dataobj)).astype("<u2")
    write_series(tmp_path, stored, image.affine, order=1)
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.data[0], stored)
    assert geometry.corner_shift(volume.shape, volume.affine, image.affine) < 1e-4


def test_pydicoms_warnings_about_values_do_not_get_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    paths = write_series(tmp_path, _stored(), AFFINE)
    for path in paths:  # an invalid identifier that holds the patient's name
        raw = path.read_bytes()
        uid = str(pydicom.dcmread(path).SeriesInstanceUID).encode()
        path.write_bytes(raw.replace(uid, b"Zyxwvut^Qponmlk".ljust(len(uid), b"x")))
    with caplog.at_level("DEBUG"):
        logging.captureWarnings(capture=True)
        read_volume(tmp_path)
        logging.captureWarnings(capture=False)
    assert not any(word in caplog.text for word in IDENTITY)
    assert not recwarn.list
