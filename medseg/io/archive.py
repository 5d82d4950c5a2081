"""Zip archives of DICOM files: judged before and while they are unpacked into a private folder.

The limits count bytes that were really unpacked; what the archive's directory claims is only a first hurdle.
"""

from __future__ import annotations

import errno
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from medseg.errors import InputError, MemoryBudgetError
from medseg.io.files import HEAD, open_regular, read_head, sniff

MOST_ENTRIES = 20_000
MOST_BYTES = 8 << 30
LARGEST_RATIO = 200
"""Of one entry, when it unpacks to more than `RATIO_FROM_BYTES`."""

RATIO_FROM_BYTES = 64 << 20
_CHUNK = 1 << 20
_AGAIN = "copy or download it again"


def is_archive(path: Path) -> bool:
    """Whether a regular file begins as a zip archive does.

    Raises:
        InputError: no regular file with content.
    """
    return sniff(read_head(path)) == "a zip archive"


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The DICOM files of an archive in a folder of their own, gone when the block ends.

    Files are named ``000000.dcm`` by their place in the archive, so that a second call gives the same names.

    Raises:
        InputError: damaged, encrypted, nested, larger than the limits, or with names that lead out of a folder.
        MemoryBudgetError: no room in the temporary folder.
    """
    with tempfile.TemporaryDirectory(prefix="medseg-") as name:  # 0700
        folder = Path(name)
        try:
            with open_regular(path) as file, zipfile.ZipFile(file) as archive:
                _unpack(path, archive, folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeError, ValueError) as err:
            raise InputError(path, "the zip archive is damaged or of an unknown kind", _AGAIN) from err
        except OSError as err:
            if err.errno in {errno.ENOSPC, errno.EDQUOT}:
                remedy = "make room, or set TMPDIR to another folder"
                raise MemoryBudgetError(path, "no room to unpack it in the temporary folder", remedy) from err
            raise InputError(path, "the zip archive cannot be read", _AGAIN) from err
        yield folder


def _unpack(path: Path, archive: zipfile.ZipFile, folder: Path) -> None:
    """Check all entries, then unpack those that are DICOM."""
    entries = archive.infolist()
    if len(entries) > MOST_ENTRIES:
        raise InputError(path, f"{len(entries)} entries; at most {MOST_ENTRIES} are read", "pack one series alone")
    for entry in entries:
        _check_entry(path, entry)
    if sum(entry.file_size for entry in entries) > MOST_BYTES:
        raise _too_large(path)
    total = 0
    for number, entry in enumerate(entries):
        if entry.is_dir():
            continue
        with archive.open(entry) as source:
            head = source.read(HEAD)
            if sniff(head) == "a zip archive":
                raise InputError(path, "an archive inside the archive", "unpack it first")
            if sniff(head) != "dicom":
                continue
            total += _copy(path, entry, head, source, folder / f"{number:06}.dcm", MOST_BYTES - total)


def _copy(path: Path, entry: zipfile.ZipInfo, head: bytes, source: IO[bytes], target: Path, room: int) -> int:
    """Unpack one entry to its end, where its checksum is compared; the number of bytes."""
    done, chunk = 0, head
    with target.open("xb") as file:
        while chunk:
            done += len(chunk)
            if done > room:
                raise _too_large(path)
            if done > RATIO_FROM_BYTES and done > LARGEST_RATIO * max(entry.compress_size, 1):
                raise InputError(path, f"an entry unpacks to more than {LARGEST_RATIO} times its size", _AGAIN)
            file.write(chunk)
            chunk = source.read(_CHUNK)
    return done


def _check_entry(path: Path, entry: zipfile.ZipInfo) -> None:
    """Refuse names that lead elsewhere, links and encrypted entries; names may be identifying and are not repeated."""
    name = entry.orig_filename
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name:
        raise InputError(path, "an entry's name leads out of the archive's folder", "pack the series again")
    mode = entry.external_attr >> 16
    if mode and stat.S_IFMT(mode) not in {0, stat.S_IFREG, stat.S_IFDIR}:
        raise InputError(path, "an entry is a link or a device", "pack the series again, files only")
    if entry.flag_bits & 0x1:
        raise InputError(path, "the archive is encrypted", "unpack it first")


def _too_large(path: Path) -> InputError:
    return InputError(path, f"unpacks to more than {MOST_BYTES >> 30} GiB", "pack one series alone")
