"""Whether a scan is still the one that was computed, without reading all of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from medseg.io.files import check_regular, open_regular, sha256_of, split_suffix

_END = 1 << 20
_HEADER = 1 << 16
_BEGINNING = 1 << 12
_DATA_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)[ \t]*([^\r\n]+)", re.IGNORECASE | re.MULTILINE)
_PARTNERS = {".hdr": ".img", ".hdr.gz": ".img", ".img": ".hdr", ".img.gz": ".hdr"}


class Fingerprint(BaseModel):
    """What is known of a scan's files before they are read.

    Attributes:
        files: names without folders; of a DICOM folder its own name only.
        sizes: bytes; of a folder all files together.
        mtimes_ns: times of the last change, nanoseconds; of a folder the latest.
        ends_sha256: SHA-256 of the first and the last MiB of each file, in order; of a folder, of the names, sizes and
            beginnings of all its files.
    """

    model_config = ConfigDict(frozen=True)

    files: tuple[str, ...]
    sizes: tuple[int, ...]
    mtimes_ns: tuple[int, ...]
    ends_sha256: str


def fingerprint(scans: Sequence[Path]) -> Fingerprint:
    """Take the fingerprint of a scan's files, those included that its headers name.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    names, sizes, times = [], [], []
    for path in _with_data(scans):
        if path.is_dir():
            size, time = _folder(path, digest)
            names.append(path.name)
            sizes.append(size)
            times.append(time)
            continue
        found = check_regular(path)
        with open_regular(path) as file:
            digest.update(file.read(_END))
            if found.st_size > _END:
                file.seek(max(_END, found.st_size - _END))
                digest.update(file.read(_END))
        names.append(path.name)
        sizes.append(found.st_size)
        times.append(found.st_mtime_ns)
    return Fingerprint(files=tuple(names), sizes=tuple(sizes), mtimes_ns=tuple(times), ends_sha256=digest.hexdigest())


def unchanged(scans: Sequence[Path], before: Fingerprint, sha256: str) -> bool:
    """Whether the files still hold what was read.

    A file whose time alone differs (copied, touched) is read to its end and compared by its SHA-256; a DICOM folder
    counts as changed then.

    Args:
        scans: the case's files.
        before: their fingerprint when they were read.
        sha256: of all their bytes in the reader's order, or "" when they were never read to the end.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    now = fingerprint(scans)
    if (now.sizes, now.ends_sha256) != (before.sizes, before.ends_sha256):
        return False
    if now.mtimes_ns == before.mtimes_ns:
        return True
    if any(scan.is_dir() for scan in scans):
        return False
    return bool(sha256) and sha256_of(*_with_data(scans)) == sha256


def _folder(folder: Path, digest: hashlib._Hash) -> tuple[int, int]:
    """Bytes and latest change of all files below a folder; the digest takes in their names, sizes and beginnings."""
    size, latest = 0, 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found = check_regular(path)
        size, latest = size + found.st_size, max(latest, found.st_mtime_ns)
        digest.update(f"{path.relative_to(folder)}\0{found.st_size}\0".encode("utf-8", "surrogateescape"))
        if found.st_size:
            with open_regular(path) as file:
                digest.update(file.read(_BEGINNING))
    return size, latest


def _with_data(scans: Sequence[Path]) -> Iterator[Path]:
    """The files, and after each header the file that holds its voxels."""
    for scan in scans:
        yield scan
        stem, suffix = split_suffix(scan)
        suffix = suffix.lower()
        if suffix in _PARTNERS:
            wanted = _PARTNERS[suffix]
            names = (f"{stem}{end}" for end in (wanted, wanted.upper(), f"{wanted}.gz", f"{wanted.upper()}.GZ"))
            yield from (scan.with_name(name) for name in names if scan.with_name(name).exists())
        elif suffix in {".mhd", ".nhdr"}:
            with open_regular(scan) as file:
                named = _DATA_FILE.search(file.read(_HEADER))
            name = Path(named[1].decode("utf-8", "replace").strip()).name if named else ""
            if name and scan.with_name(name).is_file():
                yield scan.with_name(name)
