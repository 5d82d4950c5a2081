"""What DICOM objects are made from: a label map of a DICOM scan, and who made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

import medseg
from medseg.bundles.spec import LabelCode
from medseg.io.volume import Volume

if TYPE_CHECKING:
    from medseg.inference.run import Result

_LONGEST_STATEMENT = 1024


@dataclass(frozen=True)
class Segmented:
    """A label map on the grid of a DICOM scan.

    Attributes:
        volume: the scan.
        label_map: (X, Y, Z).
        labels: value to name, with or without the background.
        model: name of the bundle; "" for what was drawn by hand.
        version: of the bundle.
        origin: by the bundle alone, corrected by a person, or drawn by one.
        codes: of the labels for which the bundle states one.
        statement: what else is to be said of the object's origin, e.g. who accepted it; "" for nothing.
    """

    volume: Volume
    label_map: NDArray[np.integer]
    labels: Mapping[int, str]
    model: str
    version: str
    origin: Literal["AUTOMATIC", "SEMIAUTOMATIC", "MANUAL"] = "AUTOMATIC"
    codes: Mapping[int, LabelCode] = field(default_factory=dict)
    statement: str = ""

    @classmethod
    def of(cls, result: Result) -> Segmented:
        """What a run made."""
        bundle = result.record.bundle
        return cls(result.volume, result.label_map, result.labels, bundle.name, bundle.version, codes=result.codes)

    @property
    def summary(self) -> str:
        """Model and version, or that there was none."""
        return f"{self.model} {self.version}".strip() or "drawn by hand"

    def contribution(self) -> Any:
        """An item of ContributingEquipmentSequence that holds the statement."""
        import pydicom

        item, purpose = pydicom.Dataset(), pydicom.Dataset()
        purpose.CodeValue, purpose.CodingSchemeDesignator = "109103", "DCM"
        purpose.CodeMeaning = "Modifying Equipment"
        item.PurposeOfReferenceCodeSequence = [purpose]
        item.Manufacturer, item.ManufacturerModelName = "medseg", "review"
        item.SoftwareVersions = medseg.__version__
        item.ContributionDescription = self.statement[:_LONGEST_STATEMENT]
        return item
