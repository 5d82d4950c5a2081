"""A file's bytes from front to back, once: unpacked when they are gzip, hashed as stored, read to the very end.

Python compares gzip's checksum only at the end of the stream, and readers that stop at the last voxel never get
there; so the end is read here too.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from medseg.errors import InputError
from medseg.io.files import open_regular, unreadable

if TYPE_CHECKING:
    import hashlib

GZIP_RATIO = 1032
"""Deflate never unpacks to more than this times the packed size."""

CHUNK = 1 << 20
TRAILING = 64 << 20
"""Bytes accepted after the last voxel: a longer tail is no scan."""


class _Hashed(io.RawIOBase):
    """A raw file that feeds a digest with what is read."""

    def __init__(self, file: BinaryIO, digest: hashlib._Hash | None) -> None:
        self.file, self.digest = file, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self.file.readinto(buffer)  # type: ignore[attr-defined]
        if self.digest is not None:
            self.digest.update(buffer[:count])
        return int(count)


class Stream:
    """A file opened for one pass.

    Args:
        path: a regular file.
        digest: updated with the file's bytes as stored; complete after `finish`.
        unpack: unpack gzip; else the bytes come as stored.

    Attributes:
        packed: whether the file is gzip.
        size: bytes on disk.
        limit: bytes that the unpacked content can have at most.

    Raises:
        InputError: the file cannot be opened.
    """

    def __init__(self, path: Path, digest: hashlib._Hash | None = None, *, unpack: bool = True) -> None:
        self.path = path
        self._file = open_regular(path)
        self.size = os.fstat(self._file.fileno()).st_size
        try:
            self.packed = unpack and self._file.read(2) == b"\x1f\x8b"
            self._file.seek(0)
        except OSError as err:
            self._file.close()
            raise unreadable(path, err) from err
        hashed = _Hashed(self._file, digest)
        self._reader: io.RawIOBase | gzip.GzipFile = gzip.GzipFile(fileobj=hashed, mode="rb") if self.packed else hashed
        self.limit = self.size * GZIP_RATIO if self.packed else self.size

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def fill(self, buffer: memoryview) -> int:
        """Read until the buffer is full or the content ends; the number of bytes read.

        Raises:
            InputError: damaged gzip, or the disk cannot be read.
        """
        done = 0
        try:
            while done < len(buffer):
                count = self._reader.readinto(buffer[done : done + CHUNK])
                if not count:
                    break
                done += count
        except EOFError as err:
            raise InputError(self.path, "the gzip stream ends early", "copy or download it again") from err
        except (gzip.BadGzipFile, zlib.error) as err:
            raise InputError(self.path, "the gzip stream is damaged", "copy or download it again") from err
        except OSError as err:
            raise unreadable(self.path, err) from err
        return done

    def read(self, count: int) -> bytes:
        """Read `count` bytes, fewer at the end of the content."""
        buffer = bytearray(count)
        return bytes(buffer[: self.fill(memoryview(buffer))])

    def skip(self, count: int) -> int:
        """Read over `count` bytes; the number of bytes that were there."""
        buffer = memoryview(bytearray(min(CHUNK, max(count, 0))))
        done = 0
        while done < count:
            step = self.fill(buffer[: min(len(buffer), count - done)])
            if not step:
                break
            done += step
        return done

    def finish(self) -> None:
        """Read to the end, so that checksums are compared and the digest is complete.

        Raises:
            InputError: damaged, or far more bytes than the voxels need.
        """
        if self.skip(TRAILING + 1) > TRAILING:
            raise InputError(self.path, f"more than {TRAILING >> 20} MB after the last voxel", "export the scan again")
