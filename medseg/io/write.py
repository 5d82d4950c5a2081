"""Writing, whole or not at all: label maps, probability maps, and the files that go with them.

Every output is first a hidden temporary file in its own folder and takes its name by a rename once it is on disk.
"""

from __future__ import annotations

import errno
import gzip
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from medseg import __version__
from medseg.errors import OutputError, UsageError
from medseg.io import geometry
from medseg.io.files import split_suffix
from medseg.io.volume import Volume

log = logging.getLogger(__name__)

NIFTI_SUFFIXES = (".nii.gz", ".nii")
_INTENT_LABEL = 1002
_NIFTI1_MAX_DIM = 32767
_LONGEST_NAME = 255
_SLAB_BYTES = 16 << 20
_FRACTION_STEP = 2.0**-15


@dataclass(frozen=True)
class Target:
    """A place that was checked to be writable.

    Attributes:
        path: the output's final name.
        overwrite: whether a file of that name may be replaced.
        new_folder: whether its folder is made when the file is written.
    """

    path: Path
    overwrite: bool = False
    new_folder: bool = False


def reserve(
    output: str | Path,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
    make_parents: bool = False,
    new_folder: bool = False,
    suffixes: Sequence[str] = (),
    expected_bytes: int = 0,
) -> Target:
    """Check that an output can be written, before the work begins; nothing is created but folders asked for.

    Args:
        output: the file to write.
        overwrite: replace a file of that name.
        inputs: files that must not be replaced.
        make_parents: create missing folders.
        new_folder: the output's folder may be missing, if the one above is there; it is made with the output.
        suffixes: suffixes that the name may have (in any case); none given means any.
        expected_bytes: space that the output will need at most, or 0 when unknown.

    Raises:
        UsageError: the output is one of the inputs, or its suffix is none of `suffixes`.
        OutputError: no folder, no permission, no space, or the output exists and must not be replaced.
    """
    path = Path(output)
    if suffixes and split_suffix(path)[1].lower() not in suffixes:
        raise UsageError(path, f"suffix {path.suffix!r} is not known", f"use {' or '.join(suffixes)}")
    folder = path.parent
    try:
        if make_parents:
            folder.mkdir(parents=True, exist_ok=True)
        made = new_folder and not folder.exists() and folder.parent.is_dir()
        if made:
            folder = folder.parent
        if not folder.is_dir():
            raise OutputError(path, f"its folder {folder} does not exist", "create it first")
        for source in inputs:
            if _same_file(path, Path(source)):
                raise UsageError(path, f"the output is the input {source}", "choose another name")
        if path.is_dir():
            raise OutputError(path, "a folder of that name exists", "choose another name")
        if path.exists() and not path.is_file():
            raise OutputError(path, "a device or pipe of that name exists", "choose another name")
        if not overwrite and (path.exists() or path.is_symlink()):
            raise OutputError(path, "exists already", "use --overwrite to replace it")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(path, f"the folder {folder} cannot be written to", "choose another folder")
        if not made:
            _remove_leftovers(path)
        free = shutil.disk_usage(folder).free
    except OSError as err:
        raise _output_error(path, err) from err
    if free < expected_bytes:
        raise OutputError(
            path, f"about {expected_bytes / 1e6:.4g} MB needed, {free / 1e6:.4g} MB free", "make room on the disk"
        )
    return Target(path, overwrite, made)


def write_labels(
    target: Target | str | Path, labels: NDArray[np.integer], volume: Volume, *, names: Mapping[int, str] | None = None
) -> Path:
    """Write a label map on the grid of the scan it belongs to.

    Args:
        target: from `reserve`, or a path that does not exist yet.
        labels: (X, Y, Z), whole numbers from 0.
        volume: the scan; its header gives the output's geometry to the last bit.
        names: all labels that the map could hold: the integer type then is the same for every case of a bundle.

    Returns:
        The path written.

    Raises:
        ValueError: shape or values that a label map of this scan cannot have.
        UsageError: the suffix is not .nii or .nii.gz.
        OutputError: it cannot be written; nothing is left behind and an older output is untouched.
    """
    with OutputSet() as outputs:
        return outputs.add_labels(target, labels, volume, names=names)


def write_float(target: Target | str | Path, values: NDArray[np.floating], volume: Volume) -> Path:
    """Write maps of real numbers, e.g. probabilities, on the grid of a scan, as float32.

    Args:
        target: from `reserve`, or a path that does not exist yet.
        values: (X, Y, Z) or (C, X, Y, Z); several channels become the file's fourth axis.
        volume: the scan.

    Returns:
        The path written.

    Raises:
        ValueError: another shape than the scan's.
        UsageError: the suffix is not .nii or .nii.gz.
        OutputError: it cannot be written; nothing is left behind and an older output is untouched.
    """
    with OutputSet() as outputs:
        return outputs.add_float(target, values, volume)


def write_bytes(target: Target | str | Path, data: bytes) -> Path:
    """Write a file of any kind (JSON, PNG, CSV); the path written.

    Raises:
        OutputError: it cannot be written; nothing is left behind and an older output is untouched.
    """
    with OutputSet() as outputs:
        return outputs.add_bytes(target, data)


@dataclass
class _Staged:
    """A temporary file that is complete on disk and waits for its name."""

    path: Path
    temporary: Path
    lock: BinaryIO
    backup: Path | None = None


class OutputSet:
    """Outputs that appear together, or not at all.

    Each `add_*` writes a temporary file; leaving the ``with`` block renames them all, in the order added. Any
    exception (KeyboardInterrupt included) removes the temporary files, and puts back what was already replaced.

    Example:
        with OutputSet() as outputs:
            outputs.add_labels(labels_target, labels, volume)
            outputs.add_bytes(record_target, record)
    """

    def __init__(self) -> None:
        self._staged: list[_Staged] = []
        self._made: list[Path] = []

    def __enter__(self) -> OutputSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            for item in self._staged:
                _unlink(item.temporary)
                item.lock.close()
            for folder in self._made:
                with suppress(OSError):  # what holds outputs stays
                    folder.rmdir()
            self._staged, self._made = [], []

    def add_labels(
        self,
        target: Target | str | Path,
        labels: NDArray[np.integer],
        volume: Volume,
        *,
        names: Mapping[int, str] | None = None,
    ) -> Path:
        """Stage a label map; see `write_labels`."""
        if labels.shape != volume.shape:
            raise ValueError(f"labels {labels.shape} do not fit the scan {volume.shape}")
        if labels.dtype.kind not in "biu":
            raise ValueError(f"labels must be whole numbers, got {labels.dtype}")
        if labels.min() < 0:
            raise ValueError(f"labels must not be negative, got {labels.min()}")
        dtype = np.min_scalar_type(max(int(labels.max()), *(names or {0: ""})))
        header = _header(volume, labels.shape, dtype)
        header["intent_code"] = _INTENT_LABEL
        return self._add_nifti(target, header, labels[None], dtype)

    def add_float(self, target: Target | str | Path, values: NDArray[np.floating], volume: Volume) -> Path:
        """Stage maps of real numbers; see `write_float`."""
        channels = values if values.ndim == 4 else values[None]
        if channels.shape[1:] != volume.shape:
            raise ValueError(f"values {values.shape} do not fit the scan {volume.shape}")
        shape = volume.shape if len(channels) == 1 else (*volume.shape, len(channels))
        return self._add_nifti(target, _header(volume, shape, np.dtype("f4")), channels, np.dtype("f4"))

    def add_fractions(self, target: Target | str | Path, values: NDArray[np.floating], volume: Volume) -> Path:
        """Stage a map (X, Y, Z) of values in [0, 1], as uint16 in steps of 2^-15 that the header scales back.

        Half the size of float32, and far smaller when packed: what is nearly 0 is 0. Every reader that applies
        scl_slope, as NIfTI demands, sees real numbers; 0 and 1 are exact.
        """
        if values.shape != volume.shape:
            raise ValueError(f"values {values.shape} do not fit the scan {volume.shape}")
        header = _header(volume, volume.shape, np.dtype("u2"))
        header["scl_slope"], header["cal_max"] = _FRACTION_STEP, 1
        whole = np.rint(values * np.float32(1 / _FRACTION_STEP)).astype(np.uint16)
        return self._add_nifti(target, header, whole[None], np.dtype("u2"))

    def add_bytes(self, target: Target | str | Path, data: bytes) -> Path:
        """Stage a file of any kind; see `write_bytes`."""
        with self._temporary(_target(target)) as file:
            file.write(data)
        return _target(target).path

    def _add_nifti(
        self, target: Target | str | Path, header: Any, channels: NDArray[Any], dtype: np.dtype[Any]
    ) -> Path:
        """Stage channels (C, X, Y, Z) as a NIfTI file."""
        target = _target(target)
        suffix = split_suffix(target.path)[1].lower()
        if suffix not in NIFTI_SUFFIXES:
            raise UsageError(target.path, f"suffix {target.path.suffix!r} is not known", "use .nii.gz or .nii")
        head = header.binaryblock + bytes(4)
        with self._temporary(target) as file:
            if suffix == ".nii":
                _write_voxels(file, head, channels, dtype)
            else:
                # No name and no time in the gzip header: the same labels are the same bytes. Probabilities hardly
                # shrink further at higher levels, and take minutes.
                level = 1 if dtype.kind == "f" else 6
                with gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=file, mtime=0) as packed:
                    _write_voxels(packed, head, channels, dtype)
        self._check_head(target.path, head)
        return target.path

    def _check_head(self, path: Path, head: bytes) -> None:
        """Compare the beginning of the file just staged with what was meant."""
        temporary = self._staged[-1].temporary
        try:
            with temporary.open("rb") as file:
                packed = temporary.suffix.lower() == ".gz"
                same = (gzip.GzipFile(fileobj=file) if packed else file).read(len(head)) == head
        except OSError as err:
            raise _output_error(path, err) from err
        if not same:
            raise OutputError(path, "what was written does not read back", "check the disk")

    @contextmanager
    def _temporary(self, target: Target) -> Iterator[BinaryIO]:
        """A new file beside the target; complete on disk and staged when the block ends well, else removed."""
        temporary = _hidden_path(target.path, "tmp")
        try:
            if target.new_folder and not target.path.parent.exists():
                target.path.parent.mkdir()
                self._made.append(target.path.parent)
            file = temporary.open("xb")
        except OSError as err:
            raise _output_error(target.path, err) from err
        try:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        except OSError as err:
            _discard(file, temporary)
            raise _output_error(target.path, err) from err
        except BaseException:
            _discard(file, temporary)
            raise
        self._staged.append(_Staged(target.path, temporary, file))

    def _commit(self) -> None:
        """Give every staged file its name."""
        done: list[_Staged] = []
        path = Path()
        try:
            for item in self._staged:
                path = item.path
                done.append(item)
                item.backup = _back_up(path)
                item.temporary.replace(path)
            for folder in {item.path.parent for item in self._staged}:
                _sync_folder(folder)
        except BaseException as err:
            for item in reversed(done):
                _roll_back(item)
            if isinstance(err, OSError):
                raise _output_error(path, err) from err
            raise
        for item in done:
            if item.backup:
                _unlink(item.backup)
            log.info("wrote %s", item.path)


def _target(target: Target | str | Path) -> Target:
    return target if isinstance(target, Target) else reserve(target)


def _same_file(one: Path, other: Path) -> bool:
    """Whether two names mean the same file, through links too."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def _output_error(path: Path, err: OSError) -> OutputError:
    """The one line for a failed system call."""
    causes = {
        errno.ENOSPC: ("no space left on the disk", "make room or choose another folder"),
        errno.EDQUOT: ("the disk quota is used up", "make room or choose another folder"),
        errno.EFBIG: ("the file would exceed the size limit", "choose another folder or raise the limit"),
        errno.EACCES: ("no permission to write", "choose another folder"),
        errno.EPERM: ("no permission to write", "choose another folder"),
        errno.EROFS: ("the disk is read-only", "choose another folder"),
        errno.ENAMETOOLONG: ("the file name is too long", "choose a shorter name"),
        errno.EEXIST: ("another run of this process writes to it", "wait for that run"),
    }
    problem, remedy = causes.get(err.errno or 0, (f"cannot be written ({err.strerror or err})", "check the disk"))
    return OutputError(path, problem, remedy)


def _hidden_path(path: Path, kind: Literal["tmp", "old"]) -> Path:
    """Hidden name in the output's folder, of this process, that ends in the output's suffix."""
    stem, suffix = split_suffix(path)
    tail = f".{os.getpid()}.{kind}{suffix}"
    room = _LONGEST_NAME - len(os.fsencode(tail)) - 1
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return path.with_name(f".{stem}{tail}")


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files to this output whose process is gone."""
    stem, suffix = split_suffix(path)
    pattern = re.compile(re.escape(f".{stem}.") + r"(\d+)\.(tmp|old)" + re.escape(suffix))
    for other in path.parent.iterdir():
        found = pattern.fullmatch(other.name)
        if not found or not other.is_file() or (int(found[1]) != os.getpid() and _alive(int(found[1]))):
            continue
        if found[2] == "old" and not path.exists():
            continue
        # A writer holds a lock on its file: one in a container or on another machine, whose number says nothing here.
        with suppress(OSError), other.open("rb") as file:
            _lock(file)
            other.unlink()
            log.debug("removed leftover %s", other)


def _alive(pid: int) -> bool:
    """Whether a process of that number exists on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _lock(file: BinaryIO) -> None:
    """Lock a file against a second holder, where the platform and the file system can.

    Raises:
        BlockingIOError: another holder has it.
    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        log.debug("no file locks here")


def _discard(file: BinaryIO, temporary: Path) -> None:
    """Close and remove a temporary file that will not be used."""
    with suppress(OSError):  # closing flushes, and fails once more on a full disk
        file.close()
    _unlink(temporary)


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _back_up(path: Path) -> Path | None:
    """Keep an existing output under a second, hidden name; None when there is none."""
    if not path.exists() and not path.is_symlink():
        return None
    backup = _hidden_path(path, "old")
    _unlink(backup)
    try:
        os.link(path, backup, follow_symlinks=False)
    except OSError:  # a file system without hard links: the name is free for a moment
        path.replace(backup)
    return backup


def _roll_back(item: _Staged) -> None:
    """Undo the rename of one output, if it came to it."""
    renamed = not item.temporary.exists()
    with suppress(OSError):
        if item.backup is None and renamed:
            item.path.unlink()
        elif item.backup is not None:
            if renamed or not item.path.exists():
                item.backup.replace(item.path)
            item.backup.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power loss."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as err:
        if err.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems do not offer it
            raise
    finally:
        os.close(handle)


def _header(volume: Volume, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
    """NIfTI header for an array (X, Y, Z[, C]) on the grid of a scan.

    Geometry is copied field by field: computing it again from the affine would change the last bits.
    """
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    source = volume.source.header
    second = max(shape) > _NIFTI1_MAX_DIM if source is None else source["sizeof_hdr"] == 540
    header_class: Any = Nifti2Header if second else Nifti1Header
    header = header_class()
    header.set_data_shape(tuple(shape))
    header.set_data_dtype(dtype)
    if source is None:
        header.set_sform(volume.affine, code=1)
        header["pixdim"][1:4] = geometry.spacing(volume.affine)
        header["xyzt_units"] = 2
    else:
        for name in (
            "qform_code",
            "sform_code",
            *("quatern_b", "quatern_c", "quatern_d"),
            *("qoffset_x", "qoffset_y", "qoffset_z"),
            *("srow_x", "srow_y", "srow_z"),
            "xyzt_units",
        ):
            header[name] = source[name]
        header["pixdim"][:4] = source["pixdim"][:4]
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["descrip"] = f"medseg {__version__}".encode()
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    return header


def _write_voxels(file: BinaryIO | gzip.GzipFile, head: bytes, channels: NDArray[Any], dtype: np.dtype[Any]) -> None:
    """Write header and voxels (C, X, Y, Z) of a NIfTI file, a slab of z at a time."""
    file.write(head)
    x, y, z = channels.shape[1:]
    planes = max(1, _SLAB_BYTES // (x * y * dtype.itemsize))
    for channel in channels:
        for low in range(0, z, planes):
            slab = channel[:, :, low : low + planes].astype(dtype, order="F")
            file.write(memoryview(slab.ravel(order="F")))
