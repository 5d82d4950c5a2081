"""The folder of images and submitted labels: MONAI Label's own store, closed against names that lead out of it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import ImageNotFoundException

import medseg
from medseg.errors import InputError, UsageError
from medseg.io import geometry
from medseg.io.files import sha256_of, split_suffix
from medseg.io.read import GRID_TOLERANCE, read_labels, read_volume
from medseg.label.parameters import SUFFIXES, checked_name

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (*SUFFIXES, ".mha", ".zip")
"""Of files in the studies folder that are images; a .zip holds one DICOM series."""


class StudyStore(LocalDatastore):  # type: ignore[misc]
    """Images of one folder, their labels below ``labels/TAG/``, and an index with what is known of them.

    MONAI Label's store builds paths from the identifier and the tag that a client sends, takes files of any kind, and
    lets one process write its copy of the index over what another one has written since. Here names are checked,
    images and labels are read before they are kept, a final label that is replaced goes to ``.medseg/earlier``, and
    every change starts from the index on disk.

    Args:
        folder: the studies.
        auto_reload: watch the folder for files that come and go.
    """

    def __init__(self, folder: str, *, auto_reload: bool) -> None:
        self._own = Path(folder) / ".medseg"
        self._own.mkdir(exist_ok=True)
        super().__init__(folder, extensions=[f"*{one}" for one in IMAGE_SUFFIXES], auto_reload=auto_reload)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Keep an image.

        Raises:
            UsageError: a name that cannot be one. InputError: no scan, or another image of that name is here.
        """
        path = Path(image_filename)
        suffix = _suffix(path, IMAGE_SUFFIXES)
        checked_name("image", image_id)
        with self._current():
            known = self._datastore.objects.get(image_id)
            if known is None and (Path(self._datastore_path) / f"{image_id}{suffix}").exists():
                raise InputError("image", "a file of that name is there already", "choose another identifier")
            if known is not None:
                if sha256_of(Path(self.get_image_uri(image_id))) == sha256_of(path):
                    return image_id
                raise InputError("image", "another image of that identifier is there", "choose another identifier")
            _readable(path)
            super().add_image(image_id, image_filename, image_info)
        return image_id

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Keep a label map of an image, in place of the one that has the same tag.

        Raises:
            UsageError: a tag that cannot be one. InputError: no label map, or not on the image's grid.
            ImageNotFoundException: no such image.
        """
        checked_name("tag", label_tag)
        path = Path(label_filename)
        image = self.get_image_uri(image_id)
        if not image:
            raise ImageNotFoundException("no such image")
        check_labels(Path(image), path)
        info = {**label_info, "sha256": sha256_of(path), "medseg": medseg.__version__}
        with self._current():
            self._put_aside(image_id, label_tag)
            super().save_label(image_id, label_filename, label_tag, info)
        return image_id

    def remove_image(self, image_id: str) -> None:
        """Remove an image and its labels."""
        with self._current():
            super().remove_image(image_id)

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Remove a label; a final one is put aside."""
        with self._current():
            self._put_aside(label_id, label_tag)
            super().remove_label(label_id, label_tag)

    def update_image_info(self, image_id: str, info: Mapping[str, Any]) -> None:
        """Add to what the index knows of an image."""
        with self._current():
            super().update_image_info(image_id, dict(info))

    def update_label_info(self, label_id: str, label_tag: str, info: Mapping[str, Any]) -> None:
        """Add to what the index knows of a label."""
        with self._current():
            super().update_label_info(label_id, label_tag, dict(info))

    def _reconcile_datastore(self) -> None:
        with self._current():
            super()._reconcile_datastore()

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Alone among the processes of this folder, and with the index as it is on disk."""
        with FileLock(str(self._own / "lock"), is_singleton=True):
            self._init_from_datastore_file()
            yield

    def _put_aside(self, image_id: str, tag: str) -> None:
        """Keep a copy of a final label that is about to go."""
        old = self.get_label_uri(image_id, tag)
        if tag != "final" or not old or not Path(old).is_file():
            return
        folder = self._own / "earlier"
        folder.mkdir(exist_ok=True)
        stem, suffix = split_suffix(Path(old))
        number = len(list(folder.glob(f"{_literal(stem)}.*"))) + 1
        shutil.copy2(old, folder / f"{stem}.{number}{suffix}")


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "[]*?" else letter for letter in name)


def _suffix(path: Path, allowed: tuple[str, ...]) -> str:
    suffix = split_suffix(path)[1]
    if suffix not in allowed:
        raise UsageError("file", f"suffix {suffix!r} is not known", f"send one of {', '.join(allowed)}")
    return suffix


def _readable(path: Path) -> None:
    """Refuse what is no scan, without a word of where the server keeps it."""
    try:
        read_volume(path)
    except InputError as err:
        raise InputError("image", err.problem, err.remedy) from None


def check_labels(image: Path, path: Path) -> None:
    """Refuse what is no label map of an image.

    Raises:
        UsageError: a suffix of no label map. InputError: no label map, or not on the image's grid.
    """
    _suffix(path, SUFFIXES)
    try:
        labels, affine = read_labels(path)
    except InputError as err:
        raise InputError("label", err.problem, err.remedy) from None
    volume = read_volume(image)
    if labels.shape != volume.shape:
        raise InputError(
            "label", f"shape {labels.shape}, the image has {volume.shape}", "export it on the image's grid"
        )
    shift = geometry.corner_shift(volume.shape, volume.affine, affine) / geometry.spacing(volume.affine).min()
    if shift > 10 * GRID_TOLERANCE:
        raise InputError("label", f"lies {shift:.2g} voxels off the image's grid", "export it on the image's grid")
