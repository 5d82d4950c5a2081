"""What a site hands out: a folder, a zip or a tar archive, read file by file and never unpacked by its own names."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from medseg.errors import InputError, OutputError
from medseg.io.files import read_head, sniff

MOST_ENTRIES = 200_000
LARGEST_FILE = 8 << 30
LARGEST_RATIO = 200
"""Of one zip entry, when it unpacks to more than `RATIO_FROM_BYTES`."""

RATIO_FROM_BYTES = 64 << 20
_CHUNK = 1 << 20
_AGAIN = "download it again"
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile, NotImplementedError)


class Source(ABC):
    """Files by their names, which are relative, with forward slashes; hidden ones are left out.

    Attributes:
        path: the folder or archive.
        sizes: bytes of each file, as the archive claims.
    """

    def __init__(self, path: Path, sizes: dict[str, int]) -> None:
        self.path, self.sizes = path, sizes

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """The content of a file."""

    def read(self, name: str, *, limit: int = 10 << 20) -> bytes:
        """The content of a small file.

        Raises:
            InputError: damaged, or larger than `limit` bytes.
        """
        with self._reading(name), self.open(name) as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise InputError(self.path, f"{name} is larger than {limit >> 20} MB", "is it another data set?")
        return content

    def copy(self, name: str, target: Path) -> None:
        """Write a file's content to `target`, to its end, where an archive's checksum is compared.

        Raises:
            InputError: damaged, or larger than the archive's directory says or this program allows.
            OutputError: it cannot be written.
        """
        done, expected = 0, self.sizes[name]
        try:
            with target.open("xb") as file:
                with self._reading(name), self.open(name) as stream:
                    while chunk := stream.read(_CHUNK):
                        done += len(chunk)
                        if done > min(expected, LARGEST_FILE):
                            raise InputError(self.path, f"{name} is larger than it should be", _AGAIN)
                        try:
                            file.write(chunk)
                        except OSError as err:
                            raise _unwritable(target, err) from err
                os.fsync(file.fileno())
        except OSError as err:
            raise _unwritable(target, err) from err
        if done != expected:
            raise InputError(self.path, f"{name} ends after {done} of {expected} bytes", _AGAIN)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as err:
            raise InputError(self.path, f"{name} is damaged in it", _AGAIN) from err
        except OSError as err:
            raise InputError(self.path, f"{name} cannot be read ({err.strerror or err})", "check the disk") from err


class _Folder(Source):
    def __init__(self, path: Path) -> None:
        sizes = {}
        for folder, _folders, files in os.walk(path):
            for file in files:
                here = Path(folder, file)
                name = here.relative_to(path).as_posix()
                if not _hidden(name) and here.is_file():
                    sizes[name] = here.stat().st_size
        super().__init__(path, sizes)

    def open(self, name: str) -> IO[bytes]:
        return (self.path / name).open("rb")


class _Zip(Source):
    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._archive = stack.enter_context(zipfile.ZipFile(path))
        sizes = {}
        for entry in self._archive.infolist():
            mode = entry.external_attr >> 16
            _check_name(path, entry.orig_filename)
            if mode and stat.S_IFMT(mode) not in {0, stat.S_IFREG, stat.S_IFDIR}:
                raise InputError(path, f"{entry.filename} is a link or a device", _AGAIN)
            if entry.flag_bits & 0x1:
                raise InputError(path, "the archive is encrypted", "unpack it first, and give the folder")
            if entry.file_size > RATIO_FROM_BYTES and entry.file_size > LARGEST_RATIO * max(entry.compress_size, 1):
                problem = f"{entry.filename} would unpack to more than {LARGEST_RATIO} times its size"
                raise InputError(path, problem, _AGAIN)
            if not entry.is_dir() and not _hidden(entry.filename):
                sizes[entry.filename] = entry.file_size
        super().__init__(path, sizes)

    def open(self, name: str) -> IO[bytes]:
        return self._archive.open(name)


class _Tar(Source):
    def __init__(self, path: Path, named: Path, stack: ExitStack) -> None:
        self._archive = stack.enter_context(tarfile.open(path, "r:"))  # noqa: SIM115 - closed with the stack
        self._members = {}
        for member in self._archive:
            _check_name(named, member.name)
            if not (member.isfile() or member.isdir()):
                raise InputError(named, f"{member.name} is a link or a device", _AGAIN)
            if member.isfile() and not _hidden(member.name):
                self._members[member.name.removeprefix("./")] = member
        super().__init__(named, {name: member.size for name, member in self._members.items()})

    def open(self, name: str) -> IO[bytes]:
        stream = self._archive.extractfile(self._members[name])
        assert stream is not None  # noqa: S101 - only regular files are listed
        return stream


@contextmanager
def open_source(path: Path, work: Path) -> Iterator[Source]:
    """The files of a folder or an archive, after a look at all their names.

    Args:
        path: folder, .zip, .tar, .tar.gz or .tgz; decided by the first bytes.
        work: folder for what a packed tar archive unpacks to, while it is read.

    Raises:
        InputError: absent, no archive, damaged, or with names, links or sizes that no data set has.
    """
    with ExitStack() as stack:
        source = _opened(path, work, stack)
        if len(source.sizes) > MOST_ENTRIES:
            raise InputError(path, f"{len(source.sizes)} files; at most {MOST_ENTRIES} are read", "is it this one?")
        large = next((name for name, size in source.sizes.items() if size > LARGEST_FILE), None)
        if large is not None:
            raise InputError(path, f"{large} is larger than {LARGEST_FILE >> 30} GiB", _AGAIN)
        yield source


def _opened(path: Path, work: Path, stack: ExitStack) -> Source:
    if path.is_dir():
        return _Folder(path)
    kind = sniff(read_head(path))
    try:
        if kind == "a zip archive":
            return _Zip(path, stack)
        if kind == "gzip":
            return _Tar(stack.enter_context(_plain(path, work)), path, stack)
        if tarfile.is_tarfile(path):
            return _Tar(path, path, stack)
    except _DAMAGE as err:
        raise InputError(path, f"damaged, or no archive of a data set ({err})", _AGAIN) from err
    raise InputError(path, f"{kind or 'unknown format'}, no archive", "give a folder, .zip, .tar or .tar.gz")


@contextmanager
def _plain(path: Path, work: Path) -> Iterator[Path]:
    """A packed tar archive as a plain one: files are read out of order, which gzip cannot do."""
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=work) as folder:
        plain = Path(folder, "plain.tar")
        packed, done = path.stat().st_size, 0
        with gzip.open(path) as stream, plain.open("xb") as file:
            while chunk := stream.read(_CHUNK):
                done += len(chunk)
                if done > RATIO_FROM_BYTES and done > LARGEST_RATIO * packed:
                    raise InputError(path, f"unpacks to more than {LARGEST_RATIO} times its size", _AGAIN)
                try:
                    file.write(chunk)
                except OSError as err:
                    raise _unwritable(plain, err) from err
        yield plain


def _check_name(path: Path, name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name:
        raise InputError(path, f"{name!r} leads out of the archive's folder", "do not use this archive")


def _hidden(name: str) -> bool:
    """Files that no data set means: ``._a.nii.gz`` and ``__MACOSX`` of macOS, ``.DS_Store``."""
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in name.split("/"))


def _unwritable(path: Path, err: OSError) -> OutputError:
    return OutputError(path, f"cannot be written ({err.strerror or err})", "make room, or choose another folder")


def check_room(folder: Path, size: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OutputError: less than `size` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(folder, f"{size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free", "choose another disk")
