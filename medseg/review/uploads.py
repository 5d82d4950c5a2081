"""Uploads on their way: the files that a browser sends lie on disk, out of sight, until they become cases."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from medseg.errors import InputError

MOST_PARTS = 5_000
"""Files of one upload: a DICOM series has some thousands."""

KEPT_S = 24 * 3600
"""How long an upload waits that nobody added."""

_PREFIX = ".upload-"


def upload_folder(data: Path, upload_id: str) -> Path:
    """Where the files of an upload lie; intake passes over hidden folders.

    Args:
        data: the data folder.
        upload_id: random, made by the page.
    """
    return data / f"{_PREFIX}{upload_id}"


def begin_part(folder: Path, number: int, choice: int = 0) -> tuple[Path, int]:
    """Make room for a file.

    Args:
        folder: of the upload.
        number: of the file, from 1; the first begins the upload anew.
        choice: grows with each time that files are chosen: what still comes of a choice that was cancelled must not
            touch the files of a later one.

    Returns:
        Where it goes, and how many bytes the others have.

    Raises:
        InputError: files of a later choice are there.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    others = list(folder.iterdir())
    if any(_choice(other) > choice for other in others):
        raise InputError("upload", "other files were chosen since", "choose again")
    if number == 1:
        for other in others:
            other.unlink(missing_ok=True)
        others = []
    path = folder / f"scan_{choice:015}_{number:05}"
    return path, sum(other.stat().st_size for other in others if other != path)


def _choice(part: Path) -> int:
    return int(part.name.split("_")[1])


def parts(folder: Path) -> list[Path]:
    """The files of an upload that have come so far, in the order in which they were sent."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def drop_upload(folder: Path) -> None:
    """Remove an upload."""
    shutil.rmtree(folder, ignore_errors=True)


def drop_old_uploads(data: Path) -> None:
    """Remove what was sent long ago and never added; other servers of the folder may be receiving some right now."""
    for folder in data.glob(f"{_PREFIX}*"):
        if time.time() - folder.stat().st_mtime > KEPT_S:
            drop_upload(folder)
