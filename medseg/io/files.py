"""Files as the user names them: the suffix, what the first bytes say, and opening for reading only."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from medseg.errors import InputError

HEAD = 2048
"""Bytes that `sniff` wants to see."""

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".hdr.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
"""Suffixes of files that `medseg.io.read` reads, lower case."""

_DOUBLE = (".nii.gz", ".hdr.gz", ".img.gz")
_BLOCK = 1 << 20
_KNOWN = (*_DOUBLE, ".nii", ".hdr", ".img", ".mha", ".mhd", ".nrrd", ".nhdr", ".dcm", ".zip")

_SIGNATURES = (
    (b"\x1f\x8b", "gzip"),
    (b"NRRD", "nrrd"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"%PDF", "a PDF document"),
    (b"\x89HDF", "an HDF5 or MINC file"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
)


def split_suffix(path: str | Path) -> tuple[str, str]:
    """Name and suffix of a volume's file: ``("scan.v2", ".nii.gz")``.

    Only the suffixes of volumes count, in any case; of other names the last suffix is split off.
    """
    name = Path(path).name
    for suffix in _KNOWN:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], name[-len(suffix) :]
    return Path(name).stem, Path(name).suffix


def case_name(path: Path) -> str:
    """What a scan's outputs are called after: a folder's name, or a file's without its suffix."""
    return path.resolve().name if path.is_dir() else split_suffix(path)[0]


def patient_names(path: Path) -> list[str]:
    """What a table may call the patient of a scan: the file's name, without a number such as _0001, or the folder's."""
    name = case_name(path)
    return [name, re.sub(r"_\d{4}$", "", name), path.resolve().parent.name]


def check_regular(path: Path) -> os.stat_result:
    """Stat a file and refuse all that is not a regular file, before anything is opened.

    Raises:
        InputError: nothing there, a folder, pipe, socket or device, or not reachable.
    """
    try:
        found = path.stat()
    except OSError as err:
        if err.errno == errno.ELOOP:
            raise InputError(path, "symbolic links that form a loop", "check the path") from err
        if isinstance(err, FileNotFoundError) and path.is_symlink():
            raise InputError(path, "a symbolic link to a file that does not exist", "check the link") from err
        if isinstance(err, FileNotFoundError | NotADirectoryError):
            raise InputError(path, "no such file", "check the path") from err
        raise InputError(path, f"cannot be read ({err.strerror})", "check the path and its permissions") from err
    except ValueError as err:  # a null byte in the name
        raise InputError(repr(str(path)), "not a valid file name", "check the path") from err
    if stat.S_ISDIR(found.st_mode):
        raise InputError(path, "a folder, not a file", "give one volume")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(path, "not a regular file (pipe, socket or device)", "save the scan to a file first")
    return found


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file with content for reading.

    Raises:
        InputError: as `check_regular`; or empty, or without permission.
    """
    if check_regular(path).st_size == 0:
        raise InputError(path, "empty file", "copy or download it again")
    try:
        return path.open("rb")
    except OSError as err:
        raise InputError(path, f"cannot be read ({err.strerror})", "check its permissions") from err


def read_head(path: Path) -> bytes:
    """The first `HEAD` bytes of a regular file.

    Raises:
        InputError: as `open_regular`.
    """
    with open_regular(path) as file:
        try:
            return file.read(HEAD)
        except OSError as err:
            raise unreadable(path, err) from err


def sha256_of(*paths: Path) -> str:
    """SHA-256 of the bytes of files, one after the other, hexadecimal.

    Raises:
        InputError: as `check_regular`, or without permission, or a file fails to deliver its bytes.
    """
    digest = hashlib.sha256()
    for path in paths:
        check_regular(path)
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        except OSError as err:
            raise unreadable(path, err) from err
    return digest.hexdigest()


def unreadable(path: Path, err: OSError) -> InputError:
    """The error for a file that was opened and then fails to deliver its bytes."""
    return InputError(path, f"cannot be read ({err.strerror or err})", "check the disk or share")


def sniff(head: bytes) -> str:
    """What a file is, by its first bytes.

    Args:
        head: the first `HEAD` bytes, or all when there are fewer.

    Returns:
        "nifti", "gzip", "metaimage", "nrrd" or "dicom" for what has a reader or a message of its own;
        else a noun phrase for the error message ("a PNG picture"), empty when nothing is known.
    """
    if len(head) >= 4 and {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")} & {348, 540}:
        return "nifti"
    if head[128:132] == b"DICM":
        return "dicom"
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the scan itself (run 'git lfs pull')"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page saved by a failed download"
    if text.startswith((b"objecttype", b"ndims", b"comment")) and b"ndims" in text:
        return "metaimage"
    if head and not any(byte < 9 or 13 < byte < 32 for byte in head):
        return "a text file"
    return ""
