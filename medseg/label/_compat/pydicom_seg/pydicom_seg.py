"""Stands for pydicom-seg, which does not import beside pydicom 3 and which MONAI Label 0.8.5 imports at its start.

It is used for DICOM Segmentations in a DICOMweb store only; medseg writes its own with highdicom.
"""

from __future__ import annotations

from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(f"pydicom_seg.{name}: pydicom-seg does not work with pydicom 3; see medseg infer --dicom-seg")
