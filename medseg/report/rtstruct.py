"""A label map as a DICOM RT Structure Set: contours on the slices of the images it was made from."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import medseg
from medseg.io.dicom import PATIENT_AND_STUDY, on_source_grid, source_images
from medseg.io.discreet import discreet
from medseg.report.contours import outlines
from medseg.report.palette import label_colours

if TYPE_CHECKING:
    from medseg.io.volume import DicomFrames
    from medseg.report.segmented import Segmented

SERIES_NUMBER = 901
_STORAGE = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_MANAGEMENT = "1.2.840.10008.3.1.2.3.1"
_CONTOUR_DATA = 0x30060050
_TEXT = 64
_COPIED = (
    *PATIENT_AND_STUDY,
    *("SpecificCharacterSet", "IssuerOfPatientID", "PatientAge", "PatientSize", "PatientWeight", "StudyDescription"),
    "PositionReferenceIndicator",
)


def rtstruct(result: Segmented) -> bytes:
    """The file: one structure for each label that was found, as closed contours along the edges of its pixels.

    Patient and study are those of the images, so that archives file it beside them.

    Args:
        result: the label map.

    Raises:
        ValueError: the scan was not DICOM.
        InputError: the images are no longer what they were.
    """
    import pydicom
    from pydicom.uid import ImplicitVRLittleEndian, generate_uid

    origin = result.volume.source.dicom
    if origin is None:
        raise ValueError("an RT Structure Set needs a DICOM scan")
    with discreet():
        images = source_images(result.volume)
        now = datetime.now(UTC)
        made = pydicom.Dataset()
        for name in _COPIED:
            if name in images[0]:
                made[name] = images[0][name]
        made.SOPClassUID, made.SOPInstanceUID = _STORAGE, generate_uid()
        made.Modality, made.SeriesInstanceUID, made.SeriesNumber = "RTSTRUCT", generate_uid(), SERIES_NUMBER
        made.SeriesDescription = f"medseg, research use only; {result.model or result.summary}"[:_TEXT]
        made.Manufacturer, made.ManufacturerModelName = "medseg", (result.model or "review")[:_TEXT]
        made.SoftwareVersions, made.OperatorsName = medseg.__version__, ""
        made.InstanceNumber = 1
        made.StructureSetLabel = "RESEARCH"
        made.StructureSetName = f"Research use only; {result.summary}"[:_TEXT]
        made.StructureSetDate = made.InstanceCreationDate = made.SeriesDate = now.strftime("%Y%m%d")
        made.StructureSetTime = made.InstanceCreationTime = made.SeriesTime = now.strftime("%H%M%S")
        made.ApprovalStatus = "UNAPPROVED"
        made.FrameOfReferenceUID = images[0].FrameOfReferenceUID
        references = _references(images, origin)
        made.ReferencedFrameOfReferenceSequence = [_frame_of_reference(images[0], references)]
        _add_structures(made, result, origin, references)
        made.SpecificCharacterSet = "ISO_IR 192"  # labels and people have names in all scripts
        if result.statement:
            made.ContributingEquipmentSequence = [result.contribution()]
        made.file_meta = pydicom.dataset.FileMetaDataset()
        # Implicit, because explicit DS ends at 64 KiB, less than a long contour takes.
        made.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
        made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
        packed = io.BytesIO()
        made.save_as(packed, enforce_file_format=True)
    return packed.getvalue()


def _references(images: Sequence[Any], origin: DicomFrames) -> list[Any]:
    """What refers to the image of each slice."""
    import pydicom

    found = []
    for z, number in enumerate(origin.numbers):
        image = images[z if len(images) > 1 else 0]
        reference = pydicom.Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
        if len(images) == 1:
            reference.ReferencedFrameNumber = number + 1
        found.append(reference)
    return found


def _frame_of_reference(image: Any, references: Sequence[Any]) -> Any:
    import pydicom

    series, study, space = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    series.SeriesInstanceUID = image.SeriesInstanceUID
    series.ContourImageSequence = list(references)
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_MANAGEMENT, image.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    space.FrameOfReferenceUID = image.FrameOfReferenceUID
    space.RTReferencedStudySequence = [study]
    return space


def _add_structures(made: Any, result: Segmented, origin: DicomFrames, references: Sequence[Any]) -> None:
    """Fill the sequences of structures, of their contours and of what they are."""
    import pydicom
    from scipy.ndimage import find_objects

    labels = on_source_grid(result.label_map, result.volume)
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ origin.affine
    made.StructureSetROISequence, made.ROIContourSequence, made.RTROIObservationsSequence = [], [], []
    values = [value for value in result.labels if value != 0]
    boxes: list[Any] = find_objects(labels, max_label=max(values))
    for value, colour in zip(values, label_colours(len(values)), strict=True):
        box = boxes[value - 1]
        if box is None:
            continue
        first = np.array([box[0].start, box[1].start])
        contours = [
            _contour(outline + first, z, to_lps, references[z])
            for z in range(box[2].start, box[2].stop)
            for outline in outlines(labels[box[0], box[1], z] == value)
        ]
        number = len(made.StructureSetROISequence) + 1
        structure, drawn, observed = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        structure.ROINumber, structure.ROIName = number, result.labels[value][:_TEXT]
        structure.ReferencedFrameOfReferenceUID = made.FrameOfReferenceUID
        structure.ROIGenerationAlgorithm = result.origin
        structure.ROIGenerationDescription = f"medseg {medseg.__version__}, {result.summary}"[:_TEXT]
        drawn.ReferencedROINumber, drawn.ROIDisplayColor = number, list(colour)
        drawn.ContourSequence = contours
        observed.ObservationNumber, observed.ReferencedROINumber = number, number
        observed.RTROIInterpretedType, observed.ROIInterpreter = "", ""
        made.StructureSetROISequence.append(structure)
        made.ROIContourSequence.append(drawn)
        made.RTROIObservationsSequence.append(observed)


def _contour(outline: NDArray[np.float64], z: int, to_lps: NDArray[np.float64], reference: Any) -> Any:
    """One closed contour, in LPS mm, of an outline (n, 2) in pixel indices."""
    import pydicom

    index = np.column_stack([outline, np.full(len(outline), z), np.ones(len(outline))])
    contour = pydicom.Dataset()
    contour.ContourGeometricType = "CLOSED_PLANAR"
    contour.NumberOfContourPoints = len(outline)
    text = "\\".join(f"{number:.4f}" for number in (index @ to_lps.T)[:, :3].ravel()).encode()
    text += b" " * (len(text) % 2)
    # As it will be written: pydicom would check and convert each of many thousand numbers.
    contour[_CONTOUR_DATA] = pydicom.dataelem.RawDataElement(
        pydicom.tag.Tag(_CONTOUR_DATA), "DS", len(text), text, 0, is_implicit_VR=True, is_little_endian=True
    )
    contour.ContourImageSequence = [reference]
    return contour
