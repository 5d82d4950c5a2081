"""A label map as a DICOM Segmentation object on the images it was made from."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

import medseg
from medseg.io.dicom import on_source_grid, source_images
from medseg.io.discreet import discreet
from medseg.report.codes import label_code
from medseg.report.palette import label_colours

if TYPE_CHECKING:
    from medseg.bundles.spec import Code
    from medseg.report.segmented import Segmented

SERIES_NUMBER = 900
_DESCRIPTION = "medseg, research use only"
_TEXT = 64
"""Longest text of the value representation LO."""


def dicom_seg(result: Segmented) -> bytes:
    """The file: one binary segment for each label of the table, found or not; frames without a voxel are left out.

    Patient and study are those of the images, so that archives file it beside them.

    Args:
        result: its labels become segments 1, 2, ... in the order of their values.

    Raises:
        ValueError: the scan was not DICOM.
        InputError: the images are no longer what they were.
    """
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import ExplicitVRLittleEndian

    hd: Any = highdicom
    images = source_images(result.volume)
    values = [value for value in result.labels if value != 0]
    labels = on_source_grid(result.label_map, result.volume)
    segments = np.zeros(int(max([*values, labels.max()])) + 1, dtype=np.uint16)
    segments[values] = np.arange(1, len(values) + 1)
    frames = segments[labels].transpose(2, 1, 0)
    numbers = result.volume.source.dicom.numbers if result.volume.source.dicom is not None else ()
    if len(images) == 1:  # one multi-frame file: its frames in their own order, other volumes of a 4D series empty
        placed = np.zeros((int(images[0].NumberOfFrames), *frames.shape[1:]), dtype=np.uint16)
        placed[list(numbers)] = frames
        frames = placed
    how: dict[str, Any] = {"algorithm_type": hd.seg.SegmentAlgorithmTypeValues(result.origin)}
    if result.origin != "MANUAL":  # which names no algorithm
        how["algorithm_identification"] = hd.AlgorithmIdentificationSequence(
            name=result.model[:_TEXT],
            version=(result.version or "unversioned")[:_TEXT],
            family=codes.DCM.ArtificialIntelligence,
            source=f"medseg {medseg.__version__}",
        )
    descriptions = []
    for number, (value, colour) in enumerate(zip(values, label_colours(len(values)), strict=True), start=1):
        code = label_code(value, result.labels[value], result.codes)
        described = hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=result.labels[value][:_TEXT],
            segmented_property_category=_concept(code.category),
            segmented_property_type=_concept(code.type),
            **how,
            display_color=hd.color.CIELabColor.from_rgb(*colour),
        )
        if code.modifier is not None:
            described.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
                _concept(code.modifier)
            ]
        descriptions.append(described)
    with discreet():
        made = hd.seg.Segmentation(
            source_images=images,
            pixel_array=frames,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=descriptions,
            series_instance_uid=hd.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="medseg",
            manufacturer_model_name=(result.model or "review")[:_TEXT],
            software_versions=medseg.__version__,
            device_serial_number="0",
            content_label="RESEARCH",
            content_description=f"Research use only; {result.summary}"[:_TEXT],
            series_description=f"{_DESCRIPTION}; {result.model or result.summary}"[:_TEXT],
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
        made.SpecificCharacterSet = "ISO_IR 192"  # labels and people have names in all scripts
        if result.statement:
            made.ContributingEquipmentSequence = [
                *made.get("ContributingEquipmentSequence", []),
                result.contribution(),
            ]
        packed = io.BytesIO()
        made.save_as(packed)
    return packed.getvalue()


def _concept(code: Code) -> Any:
    from highdicom.sr import CodedConcept

    concept: Any = CodedConcept
    return concept(code.value, code.scheme, code.meaning)
