"""`read_volume` and `read_labels`: the one way in for scans and label maps."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, UsageError
from medseg.io import geometry, nifti
from medseg.io.files import HEAD, open_regular, read_head, sniff, split_suffix
from medseg.io.stream import Stream
from medseg.io.volume import Volume

log = logging.getLogger(__name__)

GRID_TOLERANCE = 0.01
"""Largest distance, in voxels, between the corners of the grids of files that make up one scan."""


def read_volume(
    path: str | Path | Sequence[str | Path],
    *,
    channels: int | None = None,
    volume_index: int | None = None,
    series: str | None = None,
    fix_gantry_tilt: bool = False,
    digest: hashlib._Hash | None = None,
) -> Volume:
    """Read a scan; the reader is chosen by the file's first bytes.

    Args:
        path: one file (x, y, z) or (x, y, z, channels), a DICOM folder or zip archive, or several of these on one
            grid that are one channel each.
        channels: how many channels the bundle takes; None accepts what is there.
        volume_index: take this one volume of (x, y, z, volumes), counted from 0.
        series: which DICOM series: its number in the list, its UID, or the beginning or end of it.
        fix_gantry_tilt: resample a sheared DICOM series to right angles instead of refusing it.
        digest: SHA-256 of what was read before as a part of the same scan; it goes on with these files.

    Returns:
        The scan; data (C, X, Y, Z) float32, finite.

    Raises:
        InputError: missing, damaged, unsupported or implausible; or not as many channels as wanted.
        UsageError: `volume_index` is out of range, or `series` fits nothing.
        MemoryBudgetError: the voxels do not fit into memory.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    if not paths:
        raise ValueError("at least one file is needed")
    digest = hashlib.sha256() if digest is None else digest

    def one_volume(one: Path, channels: int | None) -> Volume:
        reader = _reader(one)
        extra: dict[str, Any] = {}
        if reader.__name__ == "medseg.io.dicom":
            extra = {"series": series, "fix_gantry_tilt": fix_gantry_tilt}
        elif series is not None:
            raise UsageError("--series", f"{one} is not DICOM", "leave it out")
        volume: Volume = reader.read(one, channels=channels, volume_index=volume_index, digest=digest, **extra)
        return volume

    if len(paths) == 1:
        return one_volume(paths[0], channels)
    if channels is not None and len(paths) != channels:
        takes = f"{len(paths)} files; the bundle takes {channels} channel{'s' if channels > 1 else ''}"
        raise InputError(paths[0], takes, "give one file for each channel; the output's name goes after -o")
    volumes = [one_volume(one, 1) for one in paths]
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
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a name is too long
        from medseg.io import dicom

        return dicom
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
    if kind in {"dicom", "a zip archive"}:
        from medseg.io import dicom

        return dicom
    if kind:
        raise InputError(path, kind + ", not a scan", "give a DICOM series, NIfTI, MetaImage or NRRD volume")
    raise InputError(path, _no_format(suffix, head), "give a DICOM series, NIfTI, MetaImage or NRRD volume")


def is_dicom_input(path: Path) -> bool:
    """Whether `read_volume` takes a path for DICOM.

    Raises:
        InputError: as `read_volume`.
    """
    return str(_reader(path).__name__) == "medseg.io.dicom"


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
        ".dcm": "DICOM",
    }
    if not head:
        return "nothing but an empty gzip stream"
    if suffix in expected:
        return f"its first bytes are not those of a {expected[suffix]} file"
    return "unknown format"
