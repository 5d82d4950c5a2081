"""DICOM series that tests write for themselves: classic slices and enhanced multi-frame files, with a named patient."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, FileDataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SOP_CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
}
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
IDENTITY = ("Zyxwvut", "Qponmlk", "PID-8675309", "ACC-424242", "19570311", "Dr Marker Physician", "Marker Study")
"""What may never leave a file: parts of names, identifiers and descriptions that `identified` writes."""

Change = Callable[[Dataset, int], None]


def identified(dataset: Dataset) -> None:
    """Fill in a patient and a study."""
    dataset.PatientName = "Zyxwvut^Qponmlk"
    dataset.PatientID = "PID-8675309"
    dataset.PatientBirthDate = "19570311"
    dataset.PatientSex = "F"
    dataset.AccessionNumber = "ACC-424242"
    dataset.ReferringPhysicianName = "Dr Marker Physician"
    dataset.StudyDescription = "Marker Study of Zyxwvut"
    dataset.SeriesDescription = "Series of Zyxwvut"
    dataset.StudyID = "1"
    dataset.StudyDate, dataset.StudyTime = "20200101", "120000"


def grid(affine: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """LPS matrix (3, 3) with the steps along X, Y and Z, and the first voxel's centre, of a RAS affine."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return lps[:3, :3], lps[:3, 3]


def _text(values: Any) -> list[str]:
    return [f"{value:.10g}"[:16] for value in values]


def _base(modality: str, rows: int, columns: int, stored: NDArray[np.integer]) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    identified(dataset)
    dataset.Modality = modality
    dataset.Rows, dataset.Columns = rows, columns
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = stored.dtype.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    return dataset


def slice_datasets(
    stored: NDArray[np.integer],
    affine: NDArray[np.float64],
    *,
    modality: str = "MR",
    rescale: tuple[float, float] | None = None,
    number: int = 1,
    study: str = "",
    change: Change | None = None,
) -> list[FileDataset]:
    """A classic series, one dataset a slice along Z.

    Args:
        stored: (X, Y, Z), columns, rows, slices.
        affine: voxel index to RAS mm.
        modality: CT, MR or PT.
        rescale: slope and intercept; for CT (1, 0) when not given.
        number: SeriesNumber.
        study: StudyInstanceUID.
        change: called with each dataset and its place before it is returned.
    """
    steps, origin = grid(affine)
    columns, rows, slices = stored.shape
    spacing = np.linalg.norm(steps, axis=0)
    study, series, space = study or generate_uid(), generate_uid(), generate_uid()
    if modality == "CT" and rescale is None:
        rescale = (1.0, 0.0)
    made = []
    for k in range(slices):
        dataset = _base(modality, rows, columns, stored)
        dataset.SOPClassUID, dataset.SOPInstanceUID = SOP_CLASSES[modality], generate_uid()
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, series, space
        dataset.SeriesNumber, dataset.InstanceNumber = number, k + 1
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.ImagePositionPatient = _text(origin + k * steps[:, 2])
        dataset.ImageOrientationPatient = _text([*(steps[:, 0] / spacing[0]), *(steps[:, 1] / spacing[1])])
        dataset.PixelSpacing = _text([spacing[1], spacing[0]])
        dataset.SliceThickness = "7.5"  # never the step
        if rescale is not None:
            dataset.RescaleSlope, dataset.RescaleIntercept = _text(rescale)
        dataset.PixelData = np.ascontiguousarray(stored[:, :, k].T).tobytes()
        if change is not None:
            change(dataset, k)
        made.append(dataset)
    return made


def write_series(
    folder: Path, stored: NDArray[np.integer], affine: NDArray[np.float64], *, order: int = 0, **arguments: Any
) -> list[Path]:
    """Write a classic series; the files, in the order of the slices.

    Args:
        folder: made when it is not there.
        stored: (X, Y, Z).
        affine: voxel index to RAS mm.
        order: seed of the file names' order; 0 keeps that of the slices.
        arguments: see `slice_datasets`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    datasets = slice_datasets(stored, affine, **arguments)
    places = np.arange(len(datasets)) if order == 0 else np.random.default_rng(order).permutation(len(datasets))
    paths = [folder / f"IM{place:04}_{dataset.SeriesNumber}" for place, dataset in zip(places, datasets, strict=True)]
    for path, dataset in zip(paths, datasets, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    return paths


def write_multiframe(
    path: Path,
    stored: NDArray[np.integer],
    affine: NDArray[np.float64],
    *,
    rescale: tuple[float, float] = (1.0, -1000.0),
    order: NDArray[np.integer] | None = None,
) -> Path:
    """Write an Enhanced CT file whose frames stand in any order.

    Args:
        path: of the file.
        stored: (X, Y, Z).
        affine: voxel index to RAS mm.
        rescale: slope and intercept of frame 0; the slope of frame k is k times 0.5 more.
        order: of the frames in the file.
    """
    steps, origin = grid(affine)
    columns, rows, slices = stored.shape
    spacing = np.linalg.norm(steps, axis=0)
    order = np.arange(slices) if order is None else order
    dataset = _base("CT", rows, columns, stored)
    dataset.SOPClassUID, dataset.SOPInstanceUID = ENHANCED_CT, generate_uid()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.FrameOfReferenceUID = generate_uid()
    dataset.SeriesNumber, dataset.InstanceNumber = 3, 1
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.ContentDate, dataset.ContentTime = "20200101", "120000"
    dataset.NumberOfFrames = slices
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = _text([spacing[1], spacing[0]]), "7.5"
    orientation.ImageOrientationPatient = _text([*(steps[:, 0] / spacing[0]), *(steps[:, 1] / spacing[1])])
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in order:
        frame, position, values, content = Dataset(), Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = _text(origin + k * steps[:, 2])
        values.RescaleSlope, values.RescaleIntercept = _text([rescale[0] + 0.5 * k, rescale[1]])
        values.RescaleType = "HU"
        content.FrameAcquisitionNumber, content.StackID, content.InStackPositionNumber = 1, "1", int(k) + 1
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [position], [values]
        frame.FrameContentSequence = [content]
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.PixelData = np.ascontiguousarray(stored[:, :, order].transpose(2, 1, 0)).tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_zip(path: Path, folder: Path) -> Path:
    """Pack all files below a folder."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path
