"""A DICOMweb server as the place of images and labels: series are fetched from it, labels go to it as DICOM SEG."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pydicom
import requests
from dicomweb_client import DICOMwebClient
from numpy.typing import NDArray

from medseg.errors import InputError
from medseg.io.dicom import source_images
from medseg.io.discreet import discreet
from medseg.io.volume import Volume
from medseg.label.serve import PASSWORD, USERNAME

log = logging.getLogger(__name__)

MODALITIES = ("CT", "MR", "PT")
"""Of series that are offered as images."""

_SUBJECT = "DICOMweb server"
_TIMEOUT_S = (10.0, 120.0)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Reference:
    """A DICOM SEG object on the server.

    Attributes:
        study: its StudyInstanceUID.
        series: its SeriesInstanceUID.
        image: SeriesInstanceUID of the images that it lies on, "" where it names none.
        made: date and time of its content.
        by_person: a person drew or corrected it.
    """

    study: str
    series: str
    image: str
    made: str
    by_person: bool


class DicomWeb:
    """Requests to a DICOMweb server; what goes wrong is said without its address or an identifier.

    Args:
        url: of the service, e.g. http://127.0.0.1:8042/dicom-web.
        login: name and password, None for a server that asks for none.
    """

    def __init__(self, url: str, login: tuple[str, str] | None) -> None:
        session = requests.Session()
        session.auth = login
        self._client = DICOMwebClient(url, session=session, timeout=_TIMEOUT_S)
        self._client.set_http_retry_params(retry=False)
        self._references: dict[str, Reference] = {}

    def images(self) -> dict[str, str]:
        """SeriesInstanceUID to StudyInstanceUID of all series that can be segmented."""
        found: dict[str, str] = {}
        for modality in MODALITIES:
            for one in self._search({"Modality": modality}):
                found[str(one.SeriesInstanceUID)] = str(one.StudyInstanceUID)
        return found

    def fetch(self, study: str, series: str, path: Path) -> None:
        """Write a series into a .zip file.

        Raises:
            InputError: the server has nothing of it.
        """
        images = _asked(lambda: self._client.retrieve_series(study, series))
        if not images:
            raise InputError("image", "the DICOMweb server has no images of this series", "send them to it again")
        with zipfile.ZipFile(path, "w") as archive:
            for number, image in enumerate(sorted(images, key=lambda one: str(one.SOPInstanceUID))):
                packed = io.BytesIO()
                image.save_as(packed, enforce_file_format=True)
                archive.writestr(zipfile.ZipInfo(f"{number:05}.dcm"), packed.getvalue())  # without the time

    def references(self) -> list[Reference]:
        """The DICOM SEG objects, oldest first."""
        found = []
        for one in self._search({"Modality": "SEG"}):
            study, series = str(one.StudyInstanceUID), str(one.SeriesInstanceUID)
            if series not in self._references:
                self._references[series] = self._describe(study, series)
            found.append(self._references[series])
        return sorted(found, key=lambda one: one.made)

    def _describe(self, study: str, series: str) -> Reference:
        described = _asked(lambda: self._client.retrieve_series_metadata(study, series))
        return _reference(study, series, _parsed(described[0]))

    def segmentation(self, reference: Reference) -> Any:
        """A DICOM SEG object.

        Returns:
            A pydicom dataset.
        """
        return _asked(lambda: self._client.retrieve_series(reference.study, reference.series))[0]

    def store(self, packed: bytes) -> None:
        """Add a DICOM file.

        Raises:
            InputError: the server does not take it.
        """
        answer = _asked(lambda: self._client.store_instances([pydicom.dcmread(io.BytesIO(packed))]))
        if answer.get("FailedSOPSequence"):
            raise InputError(_SUBJECT, "did not take the label", "see its log")

    def _search(self, filters: Mapping[str, str]) -> list[Any]:
        answer = _asked(lambda: self._client.search_for_series(search_filters=dict(filters), get_remaining=True))
        found = [_parsed(one) for one in answer]
        # A server may leave a filter that it does not know unheeded.
        return [one for one in found if all(str(one.get(key)) == value for key, value in filters.items())]


@discreet()
def read_segmentation(dataset: Any, volume: Volume) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """A DICOM SEG object on the grid of the images that it was made from.

    Args:
        dataset: the object.
        volume: the images.

    Returns:
        Labels (X, Y, Z), segment numbers; and the segments' names.

    Raises:
        InputError: segments overlap, or it lies on another grid.
    """
    import highdicom

    hd: Any = highdicom
    images = [str(image.SOPInstanceUID) for image in source_images(volume)]
    try:
        made = hd.seg.Segmentation.from_dataset(dataset)
        frames = made.get_pixels_by_source_instance(
            images,
            combine_segments=True,
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
            dtype=np.uint8,
        )
    except Exception as err:  # whatever the object's parts lead highdicom to
        raise InputError("label", f"a DICOM SEG that cannot be read ({type(err).__name__})", "submit it again") from err
    labels = np.ascontiguousarray(frames.transpose(2, 1, 0))
    if labels.shape != volume.shape:
        raise InputError("label", f"a DICOM SEG of shape {labels.shape} on images of {volume.shape}", "submit it again")
    return labels, {int(one.SegmentNumber): str(one.SegmentLabel) for one in dataset.SegmentSequence}


def _asked(request: Callable[[], _Answer]) -> _Answer:
    """What the server answers.

    Raises:
        InputError: it does not, or refuses.
    """
    try:
        with discreet():
            return request()
    except requests.HTTPError as err:
        status = err.response.status_code if err.response is not None else 0
        remedy = f"set {USERNAME} and {PASSWORD}" if status in (401, 403) else "see its log"
        raise InputError(_SUBJECT, f"refuses a request (status {status})", remedy) from None
    except requests.RequestException as err:
        raise InputError(_SUBJECT, f"does not answer ({type(err).__name__})", "is it running?") from None


@discreet()
def _parsed(answer: dict[str, Any]) -> Any:
    return pydicom.Dataset.from_json(answer)


def _reference(study: str, series: str, described: Any) -> Reference:
    seen = described.get("ReferencedSeriesSequence") or [pydicom.Dataset()]
    segments = described.get("SegmentSequence") or []
    return Reference(
        study=study,
        series=series,
        image=str(seen[0].get("SeriesInstanceUID", "")),
        made=f"{described.get('ContentDate', '')}{described.get('ContentTime', '')}",
        by_person=any(one.get("SegmentAlgorithmType") != "AUTOMATIC" for one in segments),
    )
