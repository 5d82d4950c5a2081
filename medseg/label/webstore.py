"""Images of a DICOMweb server, fetched when they are asked for; final labels are DICOM SEG objects on it."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.exception import ImageNotFoundException

from medseg.errors import InputError, UsageError
from medseg.io.read import read_labels, read_volume
from medseg.io.write import Target, write_labels
from medseg.label.dicomweb import DicomWeb, Reference, read_segmentation
from medseg.label.store import StudyStore, check_labels
from medseg.label.versions import read_names
from medseg.report.dicom_seg import dicom_seg
from medseg.report.segmented import Segmented

log = logging.getLogger(__name__)

_FRESH_S = 10.0
"""So long an answer about what there is counts; a viewer asks several times for one page."""


class WebStore(StudyStore):
    """The series of a DICOMweb server by their SeriesInstanceUID.

    A folder of the server's own holds what was fetched, each series as a .zip file that is read as any other. The
    final label of an image is the newest DICOM SEG object on it that a person drew or corrected, whoever put it there.

    Args:
        server: holds the images and the final labels.
        folder: for copies; nothing in it is needed again.
        auto_reload: watch the folder for what other processes change in it.
    """

    def __init__(self, server: DicomWeb, folder: str, *, auto_reload: bool) -> None:
        self._server = server
        self._known: tuple[float, dict[str, str]] = (-_FRESH_S, {})
        self._finals: tuple[float, dict[str, Reference]] = (-_FRESH_S, {})
        super().__init__(folder, auto_reload=auto_reload)

    def list_images(self) -> list[str]:
        """All series that can be segmented."""
        return list(self._images())

    def get_labeled_images(self, label_tag: str | None = None, labels: Any = None) -> list[str]:  # noqa: ARG002
        """Series with a final label."""
        return [one for one in self._images() if one in self._final_labels()]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: Any = None) -> list[str]:  # noqa: ARG002
        """Series without a final label."""
        return [one for one in self._images() if one not in self._final_labels()]

    def get_image_uri(self, image_id: str) -> str:
        """The series' file, fetched if it is not here yet; "" where the server has no such series.

        Raises:
            InputError: what the server has is no volume, or it does not answer.
        """
        study = self._images().get(image_id)
        if study is None:
            return ""
        if not super().get_image_uri(image_id):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "series.zip"
                self._server.fetch(study, image_id, path)
                super().add_image(image_id, str(path), {})
        return str(super().get_image_uri(image_id))

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """The label map's file; a final one is made from the newest DICOM SEG object."""
        if label_tag == "final" and (reference := self._final_labels().get(label_id)) is not None:
            kept = self.get_label_info(label_id, "final").get("seg")
            if kept != reference.series:
                self._take_over(label_id, reference)
        return str(super().get_label_uri(label_id, label_tag))

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:  # noqa: ARG002
        """Refuse: images come from the DICOMweb server."""
        raise UsageError("image", "images are those of the DICOMweb server", "send it there")

    def remove_image(self, image_id: str) -> None:  # noqa: ARG002
        """Refuse: images are the DICOMweb server's."""
        raise UsageError("image", "images are those of the DICOMweb server", "remove it there")

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Remove a label that is not final; a final one is the DICOMweb server's."""
        if label_tag == "final":
            raise UsageError("label", "final labels are those of the DICOMweb server", "remove it there")
        super().remove_label(label_id, label_tag)

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Keep a label map; a final one goes to the DICOMweb server as DICOM SEG.

        Raises:
            as `StudyStore.save_label`; InputError: a final one has a value without a name, or the server refuses it.
        """
        if not self.get_image_uri(image_id):
            raise ImageNotFoundException("no such image")
        if label_tag != "final":
            return super().save_label(image_id, label_filename, label_tag, label_info)
        check_labels(Path(self.get_image_uri(image_id)), Path(label_filename))
        self._server.store(dicom_seg(self._segmented(image_id, Path(label_filename), label_info)))
        self._finals = (-_FRESH_S, {})
        return image_id

    def update_image_info(self, image_id: str, info: Mapping[str, Any]) -> None:
        """Add to what the index knows of an image, which is fetched for it."""
        self.get_image_uri(image_id)
        super().update_image_info(image_id, info)

    def _put_aside(self, image_id: str, tag: str) -> None:
        """Nothing: a final label that a newer one replaces stays on the DICOMweb server."""

    def _images(self) -> dict[str, str]:
        if time.monotonic() - self._known[0] > _FRESH_S:
            self._known = (time.monotonic(), self._server.images())
        return self._known[1]

    def _final_labels(self) -> dict[str, Reference]:
        """Image to the newest label on it that a person had a hand in."""
        if time.monotonic() - self._finals[0] > _FRESH_S:
            newest = {one.image: one for one in self._server.references() if one.by_person}
            self._finals = (time.monotonic(), newest)
        return self._finals[1]

    def _take_over(self, image_id: str, reference: Reference) -> None:
        volume = read_volume(self.get_image_uri(image_id))
        labels, names = read_segmentation(self._server.segmentation(reference), volume)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "labels.nii.gz"
            write_labels(Target(path, overwrite=True), labels, volume, names=names)
            said = [{"name": name, "idx": value} for value, name in names.items()]
            super().save_label(image_id, str(path), "final", {"label_info": said, "seg": reference.series})

    def _segmented(self, image_id: str, path: Path, label_info: Mapping[str, Any]) -> Segmented:
        labels, _ = read_labels(path)
        names = read_names(label_info.get("label_info"))
        nameless = sorted({int(value) for value in labels[labels > 0].flat} - set(names))
        if nameless:
            problem = f"values without a name: {', '.join(map(str, nameless))}"
            raise InputError("label", problem, 'send "label_info": [{"name": ..., "idx": ...}, ...]')
        return Segmented(
            read_volume(self.get_image_uri(image_id)), labels, names, "MONAI Label", "", origin="SEMIAUTOMATIC"
        )
