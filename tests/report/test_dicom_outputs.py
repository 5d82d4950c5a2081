"""DICOM SEG and RTSTRUCT as other readers see them: the label map's voxels on the frames of the scan."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from medseg.bundles.load import Bundle, load_bundle
from medseg.bundles.spec import Code, LabelCode
from medseg.errors import InputError, UsageError
from medseg.inference.run import Result, infer
from medseg.io.dicom import source_images
from medseg.io.read import read_volume
from medseg.report.contours import outlines
from medseg.report.dicom_seg import dicom_seg
from medseg.report.outputs import reserve_outputs, write_outputs
from medseg.report.rtstruct import rtstruct
from medseg.report.segmented import Segmented
from tests.builders import blob_scan, save_scan, tiny_bundle
from tests.dicom_builders import write_multiframe, write_series, write_zip

SHAPE = (33, 42, 30)
LABELS = {0: "background", 1: "left kidney", 2: "something else"}
CODES = {2: LabelCode(Code("91723000", "SCT", "Anatomical Structure"), Code("5366008", "SCT", "Hippocampus"))}
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (8, -12, 25), degrees=True).as_matrix() * (0.9, 1.1, 1.3)
OBLIQUE[:3, 3] = (-20.5, 11.25, 130.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("bundles"), labels=LABELS, codes=CODES))


def _with_known_labels(result: Result) -> Result:
    """The result with a label map of known content: scattered pieces, a ring, empty slices."""
    labels = np.zeros(result.label_map.shape, dtype=np.uint8)
    labels[4:20, 5:25, 3:9] = 1
    labels[8:12, 9:14, 3:9] = 0  # a hole
    labels[9:11, 10:12, 4] = 2  # an island in it
    labels[25:31, 30:40, 20:] = 2
    labels[np.random.default_rng(0).random(labels.shape) < 0.002] = 1
    return replace(result, label_map=labels)


@pytest.fixture(scope="module")
def series(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("series")
    write_series(folder, np.rint(blob_scan(SHAPE)).astype("<i2"), OBLIQUE, order=4)
    return _with_known_labels(infer(folder, bundle=bundle, force=True))


def _labels_of_seg(data: bytes, result: Result) -> NDArray[np.integer]:
    """Segment numbers (X, Y, Z) of a SEG file by highdicom's reader, on the source's frames."""
    seg = hd.seg.segread(io.BytesIO(data))
    origin = result.volume.source.dicom
    assert origin is not None
    options = {"combine_segments": True, "assert_missing_frames_are_empty": True, "ignore_spatial_locations": True}
    if len(set(origin.files)) == 1:
        frames = [number + 1 for number in origin.numbers]
        uid = next(iter(seg.get_source_image_uids()))[2]
        pixels = seg.get_pixels_by_source_frame(source_sop_instance_uid=uid, source_frame_numbers=frames, **options)
    else:
        headers = [pydicom.dcmread(result.volume.source.path / file, stop_before_pixels=True) for file in origin.files]
        pixels = seg.get_pixels_by_source_instance([header.SOPInstanceUID for header in headers], **options)
    return np.asarray(pixels).transpose(2, 1, 0)


def _voxels_by_position(data: bytes, affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.integer]:
    """Segment numbers of a SEG file by its own plane positions alone, by plain pydicom, on the grid of an affine."""
    found = pydicom.dcmread(io.BytesIO(data))
    shared = found.SharedFunctionalGroupsSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    labels = np.zeros(shape, dtype=int)
    frames = found.pixel_array.reshape(-1, found.Rows, found.Columns)
    x, y = np.meshgrid(np.arange(found.Columns), np.arange(found.Rows))
    for frame, group in zip(frames, found.PerFrameFunctionalGroupsSequence, strict=True):
        first = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        places = first + x[..., None] * spacing[1] * orientation[0] + y[..., None] * spacing[0] * orientation[1]
        ras = places[frame > 0] * (-1, -1, 1)
        index = (ras - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
        whole = np.rint(index).astype(int)
        assert np.abs(index - whole).max(initial=0) < 1e-3
        labels[tuple(whole.T)] = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    return labels


def test_seg_holds_the_label_map_on_the_frames_of_the_scan(series: Result) -> None:
    data = dicom_seg(Segmented.of(series))
    np.testing.assert_array_equal(_labels_of_seg(data, series), series.label_map)
    np.testing.assert_array_equal(_voxels_by_position(data, series.affine, SHAPE), series.label_map)


def test_seg_says_what_the_segments_are_and_who_made_them(series: Result) -> None:
    found = pydicom.dcmread(io.BytesIO(dicom_seg(Segmented.of(series))))
    kidney, other = found.SegmentSequence
    assert (kidney.SegmentLabel, other.SegmentLabel) == ("left kidney", "something else")
    assert kidney.SegmentedPropertyTypeCodeSequence[0].CodeValue == "64033007"
    modifier = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (modifier.CodeValue, modifier.CodeMeaning) == ("7771000", "Left")
    assert other.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Hippocampus"
    algorithm = kidney.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, kidney.SegmentAlgorithmType) == ("tiny", "AUTOMATIC")
    assert algorithm.AlgorithmVersion == series.record.bundle.version
    assert "research use only" in found.SeriesDescription.lower()
    assert "research use only" in found.ContentDescription.lower()
    header = pydicom.dcmread(next(series.volume.source.path.iterdir()))
    for name in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert found[name].value == header[name].value


def test_a_label_map_without_any_structure_is_written_too(series: Result) -> None:
    empty = replace(series, label_map=np.zeros(SHAPE, dtype=np.uint8))
    seg = hd.seg.segread(io.BytesIO(dicom_seg(Segmented.of(empty))))
    assert seg.number_of_segments == 2
    assert not seg.pixel_array.any()
    assert not pydicom.dcmread(io.BytesIO(rtstruct(Segmented.of(empty)))).StructureSetROISequence


def test_a_series_stripped_of_patient_and_study_gets_both_objects(series: Result, tmp_path: Path) -> None:
    def strip(dataset: pydicom.Dataset, k: int) -> None:
        for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
            delattr(dataset, name)
        for name in ("StudyDate", "StudyTime", "ReferringPhysicianName", "InstanceNumber"):
            delattr(dataset, name)

    write_series(tmp_path, np.zeros(SHAPE, dtype="<i2"), OBLIQUE, change=strip)
    stripped = replace(series, volume=read_volume(tmp_path))
    np.testing.assert_array_equal(_labels_of_seg(dicom_seg(Segmented.of(stripped)), stripped), series.label_map)
    np.testing.assert_array_equal(_drawn(rtstruct(Segmented.of(stripped)), stripped), series.label_map)


def test_a_multiframe_scan_and_an_archive_get_the_same_segments(bundle: Bundle, tmp_path: Path) -> None:
    stored = (np.rint(blob_scan(SHAPE)) + 500).astype("<u2")
    order = np.random.default_rng(1).permutation(SHAPE[2])
    path = write_multiframe(tmp_path / "enhanced.dcm", stored, OBLIQUE, rescale=(1.0, 0.0), order=order)
    result = _with_known_labels(infer(path, bundle=bundle, force=True))
    np.testing.assert_array_equal(_labels_of_seg(dicom_seg(Segmented.of(result)), result), result.label_map)
    drawn = _drawn(rtstruct(Segmented.of(result)), result)
    np.testing.assert_array_equal(drawn, result.label_map)
    write_series(tmp_path / "in", stored, OBLIQUE, order=2)
    packed = infer(write_zip(tmp_path / "in.zip", tmp_path / "in"), bundle=bundle, force=True)
    packed = _with_known_labels(packed)
    np.testing.assert_array_equal(
        _voxels_by_position(dicom_seg(Segmented.of(packed)), packed.affine, SHAPE), packed.label_map
    )


def _inside(polygon: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels (X, Y) whose centres a polygon holds by the even-odd rule."""
    x, y = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    result = np.zeros(shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        crosses = (ay > y) != (by > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            result ^= crosses & (x < ax + (y - ay) * (bx - ax) / (by - ay))
    return result


def _drawn(data: bytes, result: Result) -> NDArray[np.integer]:
    """The label map that an RTSTRUCT's contours cover, each on the image it names."""
    found = pydicom.dcmread(io.BytesIO(data))
    origin = result.volume.source.dicom
    assert origin is not None
    to_index = np.linalg.inv(np.diag([-1.0, -1.0, 1.0, 1.0]) @ origin.affine)
    labels = np.zeros(origin.shape, dtype=int)
    for number, structure in enumerate(found.ROIContourSequence, start=1):
        assert structure.ReferencedROINumber == number
        for contour in structure.ContourSequence:
            assert contour.ContourGeometricType == "CLOSED_PLANAR"
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            assert len(points) == contour.NumberOfContourPoints
            index = points @ to_index[:3, :3].T + to_index[:3, 3]
            z = int(np.rint(index[0, 2]))
            assert np.abs(index[:, 2] - z).max() < 1e-3
            covered = _inside(index[:, :2], labels.shape[:2])
            assert not labels[:, :, z][covered].any()
            labels[:, :, z][covered] = number
    return labels


def test_rtstruct_covers_exactly_the_voxels(series: Result) -> None:
    data = rtstruct(Segmented.of(series))
    np.testing.assert_array_equal(_drawn(data, series), series.label_map)
    found = pydicom.dcmread(io.BytesIO(data))
    assert [roi.ROIName for roi in found.StructureSetROISequence] == ["left kidney", "something else"]
    assert found.ApprovalStatus == "UNAPPROVED"
    assert "research use only" in found.SeriesDescription.lower()
    headers = [pydicom.dcmread(path) for path in series.volume.source.path.iterdir()]
    place = {str(header.SOPInstanceUID): np.array(header.ImagePositionPatient, dtype=float) for header in headers}
    normal = np.cross(*np.array(headers[0].ImageOrientationPatient, dtype=float).reshape(2, 3))
    for contour in found.ROIContourSequence[0].ContourSequence:
        named = place[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
        assert abs((np.array(contour.ContourData[:3], dtype=float) - named) @ normal) < 1e-3


def test_a_contour_may_be_longer_than_64_kib(series: Result) -> None:
    wide = np.zeros((1500, *SHAPE[1:]), dtype=np.uint8)  # a comb of 750 teeth
    wide[::2, :, 4] = 1
    wide[:, 0, 4] = 1
    origin = series.volume.source.dicom
    assert origin is not None
    volume = replace(series.volume, source=replace(series.volume.source, dicom=replace(origin, shape=wide.shape)))
    result = replace(series, label_map=wide, volume=volume)
    data = rtstruct(Segmented.of(result))
    (contour,) = pydicom.dcmread(io.BytesIO(data)).ROIContourSequence[0].ContourSequence
    assert sum(len(f"{number}") + 1 for number in contour.ContourData) > 2**16
    np.testing.assert_array_equal(_drawn(data, result), wide)


@settings(max_examples=150, deadline=None)
@given(mask=arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_outlines_hold_the_mask_and_nothing_else(mask: NDArray[np.bool_]) -> None:
    covered = np.zeros(mask.shape, dtype=int)
    for outline in outlines(mask):
        assert len(outline) >= 4
        covered += _inside(outline, mask.shape)
    np.testing.assert_array_equal(covered, mask.astype(int))


def test_outputs_are_refused_for_what_they_cannot_refer_to(bundle: Bundle, tmp_path: Path) -> None:
    scan = save_scan(tmp_path / "scan.nii.gz", blob_scan(SHAPE))
    with pytest.raises(UsageError, match=r"scan\.nii\.gz is not DICOM"):
        infer(scan, bundle=bundle, force=True, refer=True)

    def stripped(dataset: pydicom.Dataset, k: int) -> None:
        dataset.SOPInstanceUID = ""

    write_series(tmp_path / "study", np.rint(blob_scan(SHAPE)).astype("<i2"), OBLIQUE, change=stripped)
    with pytest.raises(InputError, match="identifiers are missing"):
        infer(tmp_path / "study", bundle=bundle, force=True, refer=True)


def test_images_without_identifiers_get_the_same_ones_each_time_when_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    def stripped(dataset: pydicom.Dataset, k: int) -> None:
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"):
            setattr(dataset, name, "")
        del dataset.FrameOfReferenceUID

    paths = write_series(tmp_path / "study", np.rint(blob_scan(SHAPE)).astype("<i2"), OBLIQUE, change=stripped)
    before = [path.read_bytes() for path in paths]
    result = infer(tmp_path / "study", bundle=bundle, force=True, refer=True, assign_uids=True)
    assert any("made up" in warning for warning in result.record.warnings)
    marked = _with_known_labels(result)
    places = reserve_outputs(
        [tmp_path / "study"], tmp_path, dicom_seg=tmp_path / "seg.dcm", rtstruct=tmp_path / "rt.dcm"
    )
    write_outputs(marked, places)
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    uids = [str(header.SOPInstanceUID) for header in source_images(result.volume)]
    assert len(set(uids)) == SHAPE[2]
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in uids)
    pixels = seg.get_pixels_by_source_instance(
        uids, combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
    )
    assert np.array_equal(pixels.transpose(2, 1, 0), marked.label_map)
    again = infer(tmp_path / "study", bundle=bundle, force=True, assign_uids=True)
    assert [str(header.SOPInstanceUID) for header in source_images(again.volume)] == uids
    assert [path.read_bytes() for path in paths] == before


def test_all_outputs_appear_together_and_never_replace_an_image(series: Result, tmp_path: Path) -> None:
    scan = series.volume.source.path
    image = next(scan.iterdir()).rename(scan / "image.dcm")
    with pytest.raises(UsageError, match="the output is the input"):
        reserve_outputs([scan], tmp_path, overwrite=True, dicom_seg=image)
    image.rename(scan / "gone")
    places = reserve_outputs([scan], tmp_path, dicom_seg=tmp_path / "seg.dcm", rtstruct=tmp_path / "rt.dcm")
    with pytest.raises(InputError, match="cannot be read any more"):
        write_outputs(series, places)
    assert not list(tmp_path.iterdir())
