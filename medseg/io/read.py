"""`read_volume` and `read_labels`: the one way in for scans and label maps."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError
from medseg.io import geometry, nifti
from medseg.io.files import HEAD, open_regular, read_head, sniff, split_suffix
from medseg.io.stream import Stream
from medseg.io.volume import Volume

log = logging.getLogger(__name__)

GRID_TOLERANCE = 0.01
"""Largest distance, in voxels, between the corners of the grids of files that make up one scan."""

_DICOM = "convert the series to NIfTI first, e.g. with dcm2niix"


def read_volume(
    path: str | Path | Sequence[str | Path], *, channels: int | None = None, volume_index: int | None = None
) -> Volume:
    """Read a scan; the reader is chosen by the file's first bytes.

    Args:
        path: one file (x, y, z) or (x, y, z, channels), or several files on one grid that are one channel each.
        channels: how many channels the bundle takes; None accepts what is there.
        volume_index: take this one volume of (x, y, z, volumes), counted from 0.

    Returns:
        The scan; data (C, X, Y, Z) float32, finite.

    Raises:
        InputError: missing, damaged, unsupported or implausible; or not as many channels as wanted.
        UsageError: `volume_index` is out of range.
        MemoryBudgetError: the voxels do not fit into memory.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    if not paths:
        raise ValueError("at least one file is needed")
    digest = hashlib.sha256()
    if len(paths) == 1:
        only: Volume = _reader(paths[0]).read(paths[0], channels=channels, volume_index=volume_index, digest=digest)
        return only
    if channels is not None and len(paths) != channels:
        takes = f"{len(paths)} files; the bundle takes {channels} channel{'s' if channels > 1 else ''}"
        raise InputError(paths[0], takes, "give one file for each channel")
    volumes: list[Volume] = [
        _reader(one).read(one, channels=1, volume_index=volume_index, digest=digest) for one in paths
    ]
    first = volumes[0]
    for one, other in zip(paths[1:], volumes[1:], strict=True):
        _check_same_grid(paths[0], first, one, other)
    warnings = tuple(
        f"{one.name}: {text}" for one, volume in zip(paths, volumes, strict=True) for text in volume.source.warnings
    )
    source = replace(first.source, sha256=digest.hexdigest(), warnings=warnings)
    return Volume(np.concatenate([volume.data for volume in volumes]), first.affine, source)


def read_labels(path: str | Path) -> tuple[NDArray[np.integer], geometry.Affine]:
    """Read a label map.

    Args:
        path: one file (x, y, z) whose values are whole numbers, of any type.

    Returns:
        Labels (X, Y, Z), in the file's integer type (int32 when the file holds floats), and the affine to RAS
        millimetres.

    Raises:
        InputError: as `read_volume`; or values that are not whole numbers.
        MemoryBudgetError: the voxels do not fit into memory.
    """
    labels: tuple[NDArray[np.integer], geometry.Affine] = _reader(Path(path)).read_labels(Path(path))
    return labels


def _check_same_grid(first_path: Path, first: Volume, path: Path, volume: Volume) -> None:
    """Refuse a second channel that lies on another grid."""
    remedy = "resample the files to one grid first"
    if volume.shape != first.shape:
        raise InputError(path, f"shape {volume.shape}, but {first_path.name} has {first.shape}", remedy)
    shift = geometry.corner_shift(first.shape, first.affine, volume.affine)
    if shift > GRID_TOLERANCE * geometry.spacing(first.affine).min():
        raise InputError(path, f"its grid lies up to {shift:.3g} mm off that of {first_path.name}", remedy)


def _reader(path: Path) -> Any:
    """The module that reads this file: it has `read` and `read_labels`.

    Raises:
        InputError: no regular file, or no format that medseg reads.
    """
    suffix = split_suffix(path)[1].lower()
    if suffix in {".img", ".img.gz"}:  # voxels only: the header lies beside it
        open_regular(path).close()
        return nifti
    head = read_head(path)
    kind = sniff(head)
    if kind == "gzip":
        with Stream(path) as stream:
            head = stream.read(HEAD)
        kind = sniff(head)
        if kind in {"metaimage", "nrrd", "dicom"}:
            raise InputError(path, "gzip around a format that packs by itself", "unpack it with gunzip first")
    if kind == "nifti":
        return nifti
    if kind in {"metaimage", "nrrd"}:
        from medseg.io import itk

        return itk
    if kind == "dicom" or suffix == ".dcm":
        raise InputError(path, "DICOM is not read by this version", _DICOM)
    if kind == "a zip archive":
        raise InputError(path, "a zip archive; DICOM archives are not read by this version", _DICOM)
    if kind:
        raise InputError(path, kind + ", not a scan", "give a NIfTI, MetaImage or NRRD volume")
    raise InputError(path, _no_format(suffix, head), "give a NIfTI, MetaImage or NRRD volume")


def _no_format(suffix: str, head: bytes) -> str:
    """What to say of bytes that no format begins with."""
    expected = {
        ".nii": "NIfTI",
        ".nii.gz": "NIfTI",
        ".hdr": "NIfTI",
        ".hdr.gz": "NIfTI",
        ".mha": "MetaImage",
        ".mhd": "MetaImage",
        ".nrrd": "NRRD",
        ".nhdr": "NRRD",
    }
    if not head:
        return "nothing but an empty gzip stream"
    if suffix in expected:
        return f"its first bytes are not those of a {expected[suffix]} file"
    return "unknown format"
