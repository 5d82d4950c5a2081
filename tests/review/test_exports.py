"""Exports as other programs read them: right voxels in the right place, and where they come from."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its own name

from medseg.errors import InputError, UsageError
from medseg.io.geometry import world
from medseg.review.exports import export_case, kinds
from medseg.review.saving import save_labels
from medseg.review.store.models import User
from medseg.review.store.repo import BANNER, Store, check_export
from medseg.review.worklist import add_result, import_folder, import_upload, label_table
from tests.builders import save_scan
from tests.dicom_builders import IDENTITY, write_series, write_zip

SHAPE = (12, 10, 8)
OBLIQUE = np.array([[0.88, 0.1, -0.29, -20], [-0.14, 1.05, 0.2, 11], [0.21, -0.1, 1.94, 130], [0, 0, 0, 1.0]])
OBLIQUE[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] * (-0.9, -1.1, 2.0)
NAMES = {1: "left kidney", 3: "tumeur étrange"}


def labels() -> np.ndarray:
    found = np.zeros(SHAPE, np.uint8)
    found[2:6, 3:8, 1:4] = 1
    found[8:10, 2, 6] = 3
    return found


def in_latin_1(dataset: pydicom.Dataset, k: int) -> None:
    dataset.SpecificCharacterSet, dataset.PatientName = "ISO_IR 100", "Zyxwvut^Jörg"


class Desk:
    """A store, and the case of an uploaded archive, corrected and signed."""

    def __init__(self, folder: Path) -> None:
        self.stored = np.random.default_rng(0).integers(-500, 500, SHAPE).astype("<i2")
        write_series(folder / "series", self.stored, OBLIQUE, order=3, modality="CT", change=in_latin_1)
        upload = write_zip(folder / "upload.zip", folder / "series")
        shutil.rmtree(folder / "series")
        self.store = Store.in_folder(folder / "data")
        self.anna: User = self.store.sign_in("local:anna", "Anna Šimić")
        self.case = import_upload(self.store, upload, name="one", by=self.anna).id
        upload.unlink()
        add_result(self.store, self.case, labels(), names=NAMES, model="organs", version="1.2", by=self.anna)
        self.corrected = labels()
        self.corrected[0, 0, 7] = 3
        save_labels(self.store, self.case, self.corrected, base_revision=1, by=self.anna)
        self.store.add_review(self.case, 2, "accepted", by=self.anna)

    def export(self, kind: str) -> bytes:
        return export_case(self.store, self.case, kind, by=self.anna).content


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    found = Desk(tmp_path_factory.mktemp("exports"))
    yield found
    found.store.close()


def test_the_segmentation_object_lies_on_the_uploaded_images_for_three_readers(desk: Desk) -> None:
    data = desk.export("dicom-seg")
    seg = hd.seg.segread(io.BytesIO(data))
    assert [seg.get_segment_description(number).segment_label for number in (1, 2)] == ["left kidney", "tumeur étrange"]
    assert [item.SegmentAlgorithmType for item in seg.SegmentSequence] == ["SEMIAUTOMATIC"] * 2
    expected = np.select([desk.corrected == 1, desk.corrected == 3], [1, 2])

    volume = seg.get_volume(combine_segments=True, allow_missing_positions=True)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    found = np.zeros(SHAPE, int)
    for index in np.argwhere(volume.array):
        place = np.rint(world(np.linalg.inv(OBLIQUE), world(to_ras, index))).astype(int)
        found[tuple(place)] = volume.array[tuple(index)]
    assert np.array_equal(found, expected)

    header = pydicom.dcmread(io.BytesIO(data))
    assert (str(header.PatientName), header.PatientID) == ("Zyxwvut^Jörg", "PID-8675309")
    told = header.ContributingEquipmentSequence[-1].ContributionDescription
    version = desk.store.version(desk.case, 2)
    for part in (BANNER, desk.case, "version 2", version.sha256, "organs 1.2", "accepted by Anna Šimić", "exported 20"):
        assert part in told

    path = desk.store.folder / "seg.dcm"
    path.write_bytes(data)
    image = sitk.ReadImage(str(path))
    path.unlink()
    frames = sitk.GetArrayFromImage(image)  # (frames, rows, columns); ITK reads no spacing of segmentations
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ OBLIQUE
    along = np.array(image.GetDirection()).reshape(3, 3)[:, :2] * (0.9, 1.1)
    assert np.allclose(along, to_lps[:3, :2], atol=1e-6)
    assert len(frames) == len(header.PerFrameFunctionalGroupsSequence)
    for frame, group in zip(frames, header.PerFrameFunctionalGroupsSequence, strict=True):
        first = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        _, _, z = np.rint(world(np.linalg.inv(to_lps), first)).astype(int)
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        assert np.array_equal(frame > 0, number == expected[:, :, z].T)
        if group is header.PerFrameFunctionalGroupsSequence[0]:
            assert np.allclose(image.GetOrigin(), first, atol=1e-6)


def test_the_structure_set_draws_the_corrected_version(desk: Desk) -> None:
    found = pydicom.dcmread(io.BytesIO(desk.export("rtstruct")))
    assert [item.ROIName for item in found.StructureSetROISequence] == ["left kidney", "tumeur étrange"]
    assert {item.ROIGenerationAlgorithm for item in found.StructureSetROISequence} == {"SEMIAUTOMATIC"}
    assert (found.ApprovalStatus, str(found.PatientName)) == ("UNAPPROVED", "Zyxwvut^Jörg")
    assert desk.store.version(desk.case, 2).sha256 in found.ContributingEquipmentSequence[0].ContributionDescription
    lone = found.ROIContourSequence[1].ContourSequence
    points = np.concatenate([np.reshape(item.ContourData, (-1, 3)) for item in lone]).astype(float) * (-1, -1, 1)
    place = world(OBLIQUE, (0, 0, 7))
    assert np.linalg.norm(points - place, axis=1).min() < 1.2  # the corrected voxel's own edge


def test_labels_keep_voxels_and_geometry_and_say_where_they_come_from(desk: Desk) -> None:
    data = desk.export("nifti")
    version = desk.store.file(desk.store.version(desk.case, 2).path)
    found, stored = nib.Nifti1Image.from_bytes(gzip.decompress(data)), nib.load(version)
    assert np.array_equal(np.asarray(found.dataobj), desk.corrected)
    for field in (
        "srow_x",
        "srow_y",
        "srow_z",
        "quatern_b",
        "qoffset_x",
        "qform_code",
        "sform_code",
        "pixdim",
        "datatype",
    ):
        assert found.header[field].tobytes() == stored.header[field].tobytes(), field
    facts = json.loads(found.header.extensions[0].get_content())
    assert facts["disclaimer"] == BANNER
    assert facts["mask_sha256"] == hashlib.sha256(version.read_bytes()).hexdigest()
    assert (facts["reviewer"], facts["verdict"], facts["model"]) == ("Anna Šimić", "accepted", "organs")
    path = desk.store.folder / "labels.nii.gz"
    path.write_bytes(data)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T, desk.corrected)
    path.unlink()


def test_every_export_is_in_the_audit_trail_and_holds_no_identity_but_dicom(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="medseg")
    assert set(kinds(desk.store, desk.store.case(desk.case))) == {
        *("nifti", "dicom-seg", "rtstruct", "pdf", "html", "csv", "json"),
    }
    for kind in ("nifti", "pdf", "html", "csv", "json", "dicom-seg"):
        made = export_case(desk.store, desk.case, kind, by=desk.anna)
        assert made.name.startswith(f"{desk.case}_v2")
        line = list(desk.store.trail(case_id=desk.case))[-1]
        assert json.loads(line.detail) == {
            "kind": kind,
            "revision": 2,
            "sha256": hashlib.sha256(made.content).hexdigest(),
        }
        content = gzip.decompress(made.content) if kind == "nifti" else made.content
        if kind != "dicom-seg":
            assert not [word for word in IDENTITY if word.encode() in content]
        if kind in {"html", "csv", "json"}:
            assert desk.store.version(desk.case, 2).sha256.encode() in content
            assert BANNER.encode() in content
    trail = list(desk.store.export_trail())
    assert check_export(trail).broken_at is None
    assert not [word for word in IDENTITY if word in caplog.text or any(word in line for line in trail)]


def test_a_version_drawn_by_hand_says_so_and_images_that_changed_are_refused(tmp_path: Path) -> None:
    series = tmp_path / "scans" / "series"
    write_series(series, np.full(SHAPE, 40, "<i2"), OBLIQUE, modality="CT")
    save_scan(tmp_path / "scans" / "plain.nii.gz", np.ones(SHAPE, np.int16), OBLIQUE)
    store = Store.in_folder(tmp_path / "data")
    anna = store.sign_in("local:anna", "Anna")
    found = {store.case(case).name: case for case in import_folder(store, tmp_path / "scans", by=anna).added}
    for case in found.values():
        with pytest.raises(UsageError, match="no segmentation yet"):
            export_case(store, case, "nifti", by=anna)
        store.set_labels(case, label_table(case, NAMES), by=anna)
        save_labels(store, case, labels(), base_revision=0, by=anna)
    seg = pydicom.dcmread(io.BytesIO(export_case(store, found["series"], "dicom-seg", by=anna).content))
    assert {item.SegmentAlgorithmType for item in seg.SegmentSequence} == {"MANUAL"}
    assert "model none; not signed" in seg.ContributingEquipmentSequence[-1].ContributionDescription
    assert "dicom-seg" not in kinds(store, store.case(found["plain"]))
    with pytest.raises(UsageError, match="did not come from DICOM"):
        export_case(store, found["plain"], "rtstruct", by=anna)
    write_series(series, np.full(SHAPE, 41, "<i2"), OBLIQUE, modality="CT")
    with pytest.raises(InputError, match="no longer those of the case"):
        export_case(store, found["series"], "dicom-seg", by=anna)
    shutil.rmtree(series)
    with pytest.raises(UsageError, match="its images are gone"):
        export_case(store, found["series"], "dicom-seg", by=anna)
    store.close()
