"""DICOM series: a folder, one multi-frame file, or a zip archive of either, as one volume."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, MemoryBudgetError, UsageError
from medseg.io import checks, geometry
from medseg.io.archive import is_archive, unpacked
from medseg.io.discreet import discreet
from medseg.io.pixels import PixelError, stored_values
from medseg.io.series import Contents, Frame, Series, choose_series, list_series, public_name
from medseg.io.stack import OFF_LINE, TILT_DEGREES, UNEVEN_MM, Stack, stack
from medseg.io.volume import DicomFrames, Source, Volume

log = logging.getLogger(__name__)

PATIENT_AND_STUDY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime"),
    *("StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
"""Elements that every DICOM object has, empty where nothing is known."""

_STORAGE = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "PT": "1.2.840.10008.5.1.4.1.1.128"}
"""SOP class of the classic images of a modality."""

_QUANTITIES = {"CT", "PT"}
"""Modalities whose rescaled values have a unit, so that MONOCHROME1 says only how to show them."""


def read(
    path: Path,
    *,
    channels: int | None = None,
    volume_index: int | None = None,
    digest: hashlib._Hash,
    series: str | None = None,
    fix_gantry_tilt: bool = False,
) -> Volume:
    """Read one series.

    Args:
        path: a folder, searched with all below it; a multi-frame file; or a zip archive.
        channels: how many channels are wanted; None accepts what is there.
        volume_index: take this one volume of a 4D series, counted from 0.
        digest: updated with the sorted SHA-256 of the files that are read.
        series: which series, see `medseg.io.series.choose_series`.
        fix_gantry_tilt: resample a sheared series to right angles instead of refusing it.

    Returns:
        The scan; data (C, X, Y, Z) float32 with X along the columns, Y along the rows and Z along the slices' normal.

    Raises:
        InputError: no volume or several, damaged, unsupported, or slices that make no grid.
        UsageError: `series` or `volume_index` fits nothing.
        MemoryBudgetError: the voxels do not fit into memory.
    """
    with opened(path) as root:
        contents = list_series(root, path)
        chosen = choose_series(contents, series, path)
        found = stack(chosen.frames, root, path)
        _check_tilt(path, found, fix=fix_gantry_tilt)
        _check_units(path, chosen)
        wanted = _wanted(path, found, channels, volume_index)
        warnings = [*_left_out(contents, chosen), *found.warnings]
        if not fix_gantry_tilt:
            warnings += checks.check_grid(path, found.shape, found.affine)
        frames = [found.volumes[number] for number in wanted]
        data, dtype = _voxels(root, path, frames, found.shape, digest, invert=_inverts(chosen, warnings))
        files = tuple(frame.path.relative_to(root) for frame in frames[0])
    warnings += checks.make_finite(path, data)
    affine, shear = found.affine, (0.0, 0.0)
    if fix_gantry_tilt and found.tilt_degrees > TILT_DEGREES:
        shear = _shear(found.affine)
        data, affine = _straightened(data, found.affine, shear)
        warnings += [
            f"a gantry tilt of {found.tilt_degrees:.1f} degrees was resampled to right angles",
            *checks.check_grid(path, data.shape[1:], affine),
        ]
    origin = DicomFrames(
        files=files,
        numbers=tuple(frame.number for frame in frames[0]),
        shape=found.shape,
        affine=found.affine,
        modality=chosen.modality,
        referable=chosen.referable,
    )
    log.debug("%s: shape %s, spacing %s mm", path, found.shape, geometry.spacing(affine))
    header = _nifti_header(data.shape[1:], affine)
    return Volume(data, affine, Source(path, "dicom", header, digest.hexdigest(), tuple(warnings), origin, dtype))


def read_labels(path: Path) -> tuple[NDArray[np.integer], geometry.Affine]:
    """Refuse: label maps are read from NIfTI, MetaImage and NRRD.

    Raises:
        InputError: always.
    """
    raise InputError(path, "label maps are not read from DICOM", "give a NIfTI, MetaImage or NRRD label map")


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The folder or file to read: the path itself, or where its archive is unpacked while the block lasts.

    Raises:
        InputError: a damaged or dangerous archive.
    """
    if path.is_dir() or not is_archive(path):
        yield path
    else:
        with unpacked(path) as folder:
            yield folder


def check_referable(volume: Volume) -> None:
    """Refuse a scan that no other DICOM object can refer to.

    Raises:
        UsageError: the scan is not DICOM.
        InputError: its images lack identifiers.
    """
    origin, path = volume.source.dicom, volume.source.path
    if origin is None:
        raise not_dicom(path)
    if not origin.referable:
        problem = "identifiers are missing (UID of study, series, image, storage class or frame of reference)"
        raise InputError(
            path, problem + ", which DICOM SEG and RTSTRUCT refer to", "write NIfTI instead, or use --assign-uids"
        )


def with_assigned_uids(volume: Volume) -> Volume:
    """The same volume, for whose images identifiers that they lack are made up; the files stay as they are.

    They follow from the files' content, so that the same images get the same ones again.

    Raises:
        UsageError: the scan is not DICOM.
    """
    origin = volume.source.dicom
    if origin is None:
        raise UsageError("--assign-uids", f"{volume.source.path} is not DICOM", "leave it out")
    if origin.referable:
        return volume
    warning = "identifiers that the images lack were made up; archives know the images by none of them"
    known = replace(origin, referable=True, assigned=True)
    return replace(volume, source=replace(volume.source, dicom=known, warnings=(*volume.source.warnings, warning)))


def _assign_uids(header: Any, file: Path, series_sha256: str) -> None:
    """Make up the identifiers that an image's header lacks, from the SHA-256 of its file and of the series.

    Raises:
        ValueError: nothing tells what kind of image it is.
    """
    storage = header.file_meta.get("MediaStorageSOPClassUID") or _STORAGE.get(str(header.get("Modality")))
    if not header.get("SOPClassUID") and not storage:
        raise ValueError("no SOPClassUID")
    made = {"SOPClassUID": storage, "SOPInstanceUID": _made_up_uid(hashlib.sha256(file.read_bytes()).hexdigest())}
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        made[name] = _made_up_uid(hashlib.sha256(f"{name} {series_sha256}".encode()).hexdigest())
    for name, uid in made.items():
        if not header.get(name):
            setattr(header, name, uid)


def _made_up_uid(sha256: str) -> str:
    """A UID under the root 2.25, which anyone may use with a number of 128 bits."""
    return f"2.25.{int(sha256[:32], 16)}"


def not_dicom(path: Path) -> UsageError:
    """The error for DICOM outputs of another scan."""
    return UsageError("--dicom-seg, --rtstruct", f"{path} is not DICOM", "they refer to the images of a DICOM scan")


@discreet()
def source_images(volume: Volume) -> list[Any]:
    """The headers of the images that a volume was read from, in the order of its slices; one for a multi-frame file.

    Returns:
        pydicom datasets without pixels, elements of `PATIENT_AND_STUDY` that were stripped empty. They hold the
        patient's identity and are for DICOM outputs only.

    Raises:
        ValueError: the volume is not from DICOM.
        InputError: a file is gone or cannot be read any more.
    """
    import pydicom

    origin, path = volume.source.dicom, volume.source.path
    if origin is None:
        raise ValueError(f"{volume.source.format} has no DICOM images")
    with opened(path) as root:
        found = []
        for file in dict.fromkeys(root / name for name in origin.files):
            try:
                found.append(pydicom.dcmread(file, stop_before_pixels=True))
                if origin.assigned:
                    _assign_uids(found[-1], file, volume.source.sha256)
            except Exception as err:  # pydicom raises whatever the bytes lead it to
                problem = f"one of its images cannot be read any more ({type(err).__name__})"
                raise InputError(path, problem, "keep the series in place until the work is done") from err
            for name in PATIENT_AND_STUDY:
                if name not in found[-1]:
                    setattr(found[-1], name, "")
    if len(found) == origin.shape[2]:
        first = geometry.world(origin.affine, [(0, 0, z) for z in range(origin.shape[2])]) * (-1, -1, 1)
        now = np.array([header.get("ImagePositionPatient") or (np.nan,) * 3 for header in found], dtype=np.float64)
        if not np.abs(now - first).max() <= max(OFF_LINE * geometry.spacing(origin.affine)[2], UNEVEN_MM):
            raise InputError(path, "its images are no longer those that were read", "segment the series again")
    return found


def on_source_grid(labels: NDArray[np.integer], volume: Volume) -> NDArray[np.integer]:
    """Labels (X, Y, Z) of a volume on the grid of the images it was read from.

    The same array, unless a gantry tilt was taken out: then each voxel of the images gets the nearest label.
    """
    origin = volume.source.dicom
    if origin is None or np.array_equal(origin.affine, volume.affine):
        return labels
    result = np.zeros(origin.shape, dtype=labels.dtype)
    to_index = np.linalg.inv(volume.affine) @ origin.affine
    for z in range(origin.shape[2]):
        # The axes are parallel within a slice, so that each index depends on one other alone.
        x = np.rint(np.arange(origin.shape[0]) + to_index[0, 2] * z + to_index[0, 3]).astype(int)
        y = np.rint(np.arange(origin.shape[1]) + to_index[1, 2] * z + to_index[1, 3]).astype(int)
        result[:, :, z] = labels[np.clip(x, 0, labels.shape[0] - 1)][:, np.clip(y, 0, labels.shape[1] - 1), z]
    return result


def _check_tilt(path: Path, found: Stack, *, fix: bool) -> None:
    if found.tilt_degrees > TILT_DEGREES and not fix:
        problem = f"gantry tilt: slices are shifted by {found.tilt_degrees:.1f} degrees against their normal"
        raise InputError(path, problem, "use --fix-gantry-tilt to resample them to right angles")


def _check_units(path: Path, series: Series) -> None:
    """Refuse CT without the way to Hounsfield units."""
    lacking = sum(frame.rescale is None for frame in series.frames)
    if series.modality == "CT" and lacking:
        problem = f"{lacking} of {len(series.frames)} CT images have no RescaleSlope and RescaleIntercept (0028,1053)"
        raise InputError(path, problem + ", so no Hounsfield units", "export the series again")


def _wanted(path: Path, found: Stack, channels: int | None, volume_index: int | None) -> list[int]:
    """Which volumes of the series become channels."""
    count = len(found.volumes)
    if count > 1 and channels == 1 and volume_index is None:
        problem = f"{count} volumes in one series that differ in {found.trait}; the bundle takes 1 channel"
        raise InputError(path, problem, f"choose one with --volume N, 0 to {count - 1}")
    shape = found.shape if count == 1 else (*found.shape, count)
    return checks.wanted_volumes(path, shape, channels, volume_index)


def _left_out(contents: Contents, chosen: Series) -> list[str]:
    found = contents.left_out()
    others = len(contents.volumes) - 1
    if others:
        found.append(f"{others} other series left out; the chosen one is {chosen.summary}")
    return found


def _inverts(series: Series, warnings: list[str]) -> bool:
    """Whether the stored values are to be exchanged, small against large; a warning says so."""
    if not any(frame.inverted for frame in series.frames):
        return False
    if series.modality in _QUANTITIES:
        return False
    if not all(frame.inverted for frame in series.frames):
        warnings.append("only some images are MONOCHROME1; all are read as MONOCHROME2")
        return False
    warnings.append("MONOCHROME1: values were inverted, so that large ones are bright")
    return True


def _voxels(
    root: Path,
    path: Path,
    volumes: Sequence[Sequence[Frame]],
    shape: tuple[int, int, int],
    digest: hashlib._Hash,
    *,
    invert: bool,
) -> tuple[NDArray[np.float32], str]:
    """Decode and rescale all frames, each file read once: (C, X, Y, Z), and the type of the stored values."""
    try:
        data = np.empty((len(volumes), *shape), dtype=np.float32)
    except MemoryError as err:
        raise MemoryBudgetError(path, f"shape {shape} does not fit into memory", "use a machine with more") from err
    files: dict[Path, list[tuple[int, int, Frame]]] = {}
    for channel, frames in enumerate(volumes):
        for z, frame in enumerate(frames):
            files.setdefault(frame.path, []).append((channel, z, frame))
    digests, dtype = [], ""
    for file, members in files.items():
        try:
            raw = file.read_bytes()
        except OSError as err:
            named = public_name(file, root, path)
            raise InputError(path, f"{named} cannot be read ({err.strerror})", "check its permissions") from err
        digests.append(hashlib.sha256(raw).hexdigest())
        try:
            values = stored_values(raw, invert=invert)
        except PixelError as err:
            raise InputError(path, f"{public_name(file, root, path)}: {err}", "copy or export it again") from err
        for channel, z, frame in members:
            slope, intercept = frame.rescale or (1.0, 0.0)
            data[channel, :, :, z] = (values[frame.number] * slope + intercept).T
        dtype = values.dtype.name
    digest.update("".join(sorted(digests)).encode())
    return data, dtype


def _shear(affine: geometry.Affine) -> tuple[float, float]:
    """Voxels along X and Y by which each slice is shifted against the one before, beyond the normal."""
    sizes = geometry.spacing(affine)
    x, y = affine[:3, 0] / sizes[0], affine[:3, 1] / sizes[1]
    return float(affine[:3, 2] @ x / sizes[0]), float(affine[:3, 2] @ y / sizes[1])


def _straightened(
    data: NDArray[np.float32], affine: geometry.Affine, shear: tuple[float, float]
) -> tuple[NDArray[np.float32], geometry.Affine]:
    """Shift each slice by its part of the shear, linearly interpolated, on a grid that holds all of them.

    Args:
        data: (C, X, Y, Z).
        affine: of that grid.
        shear: voxels from slice to slice along X and Y.

    Returns:
        The volume at right angles, filled up with its smallest value, and its affine.
    """
    from scipy.ndimage import affine_transform

    channels, x, y, z = data.shape
    ends = [step * (z - 1) for step in shear]
    low = [int(np.floor(min(0.0, end))) for end in ends]
    grown = [int(np.ceil(max(0.0, end))) - first for end, first in zip(ends, low, strict=True)]
    result = np.empty((channels, x + grown[0], y + grown[1], z), dtype=np.float32)
    for channel in range(channels):
        smallest = float(data[channel].min())
        for k in range(z):
            # Slice k lies k * shear voxels further on than slice 0.
            # Rounded, so that the last bit does not push an outermost voxel out of the image.
            offset = [round(first - k * step, 6) for first, step in zip(low, shear, strict=True)]
            result[channel, :, :, k] = affine_transform(
                data[channel, :, :, k], (1, 1), offset, result.shape[1:3], order=1, mode="constant", cval=smallest
            )
    straight = np.array(affine)
    straight[:3, 2] -= affine[:3, 0] * shear[0] + affine[:3, 1] * shear[1]
    straight[:3, 3] = geometry.world(affine, (low[0], low[1], 0))
    return result, straight


def _nifti_header(shape: Sequence[int], affine: geometry.Affine) -> Any:
    """A NIfTI header with sform and, where the axes are at right angles, qform, for label maps of the series."""
    from nibabel.nifti1 import Nifti1Header

    header_class: Any = Nifti1Header
    header = header_class()
    header.set_data_shape(tuple(shape))
    header.set_zooms(geometry.spacing(affine))
    header.set_sform(affine, code=1)
    if geometry.is_orthogonal(affine):
        header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    return header


@contextmanager
def listed(path: Path) -> Iterator[tuple[Contents, Path]]:
    """The series and other objects of a folder, file or archive, and the folder or file they lie in for the block.

    Raises:
        InputError: no DICOM, or a damaged or dangerous archive.
    """
    with opened(path) as root:
        yield list_series(root, path), root
