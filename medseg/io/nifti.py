"""NIfTI-1 and NIfTI-2, as one file or as .hdr/.img, plain or gzip, in both byte orders.

The header is judged before a voxel is read, and the voxels are read slab by slab straight into the result.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, MemoryBudgetError
from medseg.io import checks, geometry
from medseg.io.files import split_suffix
from medseg.io.stream import Stream
from medseg.io.volume import Source, Volume

if TYPE_CHECKING:
    import hashlib

log = logging.getLogger(__name__)

_DTYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_REFUSED = {
    1: "1-bit",
    32: "complex64",
    128: "RGB colour",
    1536: "float128",
    1792: "complex128",
    2048: "complex256",
    2304: "RGBA colour",
}
_MAGIC = {348: (344, 4, b"n+1\0", b"ni1\0"), 540: (4, 8, b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n")}
_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_XFORM_CODES = range(6)
_IDENTITY = ("descrip", "db_name", "aux_file", "intent_name", "data_type")
_FORMS_DIFFER_MM = 0.1
_SLAB_BYTES = 16 << 20
_CACHE_LINE_VOXELS = 16


@dataclass(frozen=True)
class _Layout:
    """What a header says, checked.

    Attributes:
        header: nibabel header in native byte order, without identity, for the writer.
        shape: (X, Y, Z) or (X, Y, Z, C).
        dtype: of the stored voxels, with their byte order.
        scale: slope and intercept, None when voxels are stored as they are.
        offset: where the voxels start, in bytes.
        affine: to RAS millimetres.
        warnings: what had to be assumed.
    """

    header: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scale: tuple[float, float] | None
    offset: int
    affine: geometry.Affine
    warnings: tuple[str, ...]

    def values(self, raw: NDArray[Any]) -> NDArray[Any]:
        """Stored voxels with slope and intercept applied, in float64."""
        return raw if self.scale is None else raw.astype(np.float64) * self.scale[0] + self.scale[1]


def read(path: Path, *, channels: int | None = None, volume_index: int | None = None, digest: hashlib._Hash) -> Volume:
    """Read a scan.

    Args:
        path: the .nii or .nii.gz file, or either file of a .hdr/.img pair.
        channels: how many channels are wanted; None accepts what is there.
        volume_index: take this one volume of (x, y, z, volumes), counted from 0.
        digest: updated with the bytes of the file, or of header and image in this order.

    Returns:
        The scan; data (C, X, Y, Z) float32, finite.

    Raises:
        InputError: not a NIfTI volume, damaged, unsupported or implausible.
        UsageError: `volume_index` is out of range.
        MemoryBudgetError: the voxels do not fit into memory.
    """
    header_path, image_path = _files(path)
    with Stream(header_path, digest) as stream:
        layout, single = _parse(path, stream)
        wanted = checks.wanted_volumes(path, layout.shape, channels, volume_index)
        with _image(path, stream, image_path, digest, single=single) as image:
            data: NDArray[np.float32] = _voxels(path, image, layout, wanted, np.dtype(np.float32))
    warnings = layout.warnings
    if layout.dtype.kind == "f" or layout.scale is not None:
        warnings += tuple(checks.make_finite(path, data))
    source = Source(path, "nifti", layout.header, digest.hexdigest(), warnings, dtype=layout.dtype.name)
    return Volume(data, layout.affine, source)


def read_labels(path: Path) -> tuple[NDArray[np.integer], geometry.Affine]:
    """Read a label map (X, Y, Z) of whole numbers, and its affine to RAS millimetres.

    Raises:
        InputError: as `read`; more than one volume, or values that are not whole numbers.
        MemoryBudgetError: the voxels do not fit into memory.
    """
    header_path, image_path = _files(path)
    with Stream(header_path) as stream:
        layout, single = _parse(path, stream)
        wanted = checks.wanted_volumes(path, layout.shape, 1, None)
        kind = layout.dtype.newbyteorder("=") if layout.scale is None else np.dtype(np.float64)
        with _image(path, stream, image_path, None, single=single) as image:
            data = _voxels(path, image, layout, wanted, kind)
    return checks.to_integers(path, data[0]), layout.affine


def _files(path: Path) -> tuple[Path, Path | None]:
    """The file with the header, and the one with the voxels when the user named that one of a pair."""
    suffix = split_suffix(path)[1].lower()
    return (_partner(path, ".hdr"), path) if suffix in {".img", ".img.gz"} else (path, None)


def _partner(path: Path, kind: str) -> Path:
    """The other file of a .hdr/.img pair, in the same folder.

    Raises:
        InputError: it is not there.
    """
    stem, _ = split_suffix(path)
    names = [stem + suffix for suffix in (kind, kind.upper(), kind + ".gz", kind.upper() + ".GZ", kind.upper() + ".gz")]
    for name in names:
        other = path.with_name(name)
        if other.exists():
            return other
    raise InputError(path, f"its other half {names[0]} is absent", "keep both files of the pair in one folder")


def _image(
    path: Path, stream: Stream, image_path: Path | None, digest: hashlib._Hash | None, *, single: bool
) -> Stream:
    """The stream that holds the voxels: the header's own, or the second file of a pair."""
    if single:
        return stream
    stream.finish()
    return Stream(image_path or _partner(path, ".img"), digest)


def _parse(path: Path, stream: Stream) -> tuple[_Layout, bool]:
    """Read and judge the header; also whether the voxels follow in the same file.

    Raises:
        InputError: no NIfTI header, or one that contradicts itself, the file, or any scanner.
    """
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    header_class: dict[int, Any] = {348: Nifti1Header, 540: Nifti2Header}
    block = stream.read(348)
    sizes = {int.from_bytes(block[:4], "little"): "<", int.from_bytes(block[:4], "big"): ">"}
    size = next((n for n in (348, 540) if n in sizes), None)
    if size is None:
        raise InputError(path, "not a NIfTI file (sizeof_hdr is neither 348 nor 540)", "give a .nii or .nii.gz volume")
    block += stream.read(size - len(block))
    if len(block) < size:
        raise InputError(path, f"the header ends after {len(block)} of {size} bytes", "copy or download it again")
    start, length, magic_single, magic_pair = _MAGIC[size]
    magic = block[start : start + length]
    if magic not in {magic_single, magic_pair}:
        what = "an ANALYZE 7.5 file, or a damaged NIfTI header" if size == 348 else "a damaged NIfTI-2 header"
        raise InputError(path, f"{what} (wrong magic)", "export the scan as NIfTI again")
    single = magic == magic_single
    header = header_class[size](block, endianness=sizes[size], check=False)
    dtype = _dtype(path, header, sizes[size])
    ndim = int(header["dim"][0])
    if not 1 <= ndim <= 7:
        raise InputError(path, f"the header gives {ndim} dimensions (dim[0]); 1 to 7 are possible", "export it again")
    stored = [int(n) for n in header["dim"][1 : 1 + ndim]]
    shape = checks.volume_shape(path, stored)
    offset = _offset(path, header, size, single=single)
    if single:
        _check_size(path, stream, offset, shape, dtype)
    scale = _scale(path, header)
    clean, affine, warnings = _geometry(path, header, shape[:3])
    layout = _Layout(clean, shape, dtype, scale, offset - (size if single else 0), affine, warnings)
    log.debug("%s: shape %s, %s, spacing %s mm", path, shape, dtype, geometry.spacing(affine))
    return layout, single


def _dtype(path: Path, header: Any, order: str) -> np.dtype[Any]:
    code = int(header["datatype"])
    if code in _REFUSED:
        raise InputError(path, f"voxels are {_REFUSED[code]}; medseg reads one real number a voxel", "convert the scan")
    if code not in _DTYPES:
        raise InputError(path, f"unknown datatype {code}", "export the scan again")
    return np.dtype(_DTYPES[code]).newbyteorder("<" if order == "<" else ">")


def _offset(path: Path, header: Any, size: int, *, single: bool) -> int:
    """Byte at which the voxels start."""
    offset = header["vox_offset"].item()
    if not np.isfinite(offset) or offset < 0 or offset != int(offset):
        raise InputError(path, f"vox_offset is {offset}: not a place in a file", "export the scan again")
    if single and offset < size:
        # Zero is common in files of old writers and means "right after header and extension flag".
        if offset != 0:
            raise InputError(path, f"vox_offset is {offset:g}, inside the header", "export the scan again")
        offset = size + 4
    return int(offset)


def _check_size(path: Path, stream: Stream, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Compare what the header asks for with what the file can hold, in Python integers, before any allocation."""
    needed = dtype.itemsize
    for n in shape:
        needed *= n
    if offset + needed <= stream.limit:
        return
    held, asked = max(stream.size - offset, 0) / 1e6, needed / 1e6
    if stream.packed:
        raise InputError(
            path,
            f"shape {shape} asks for {asked:.4g} MB, more than {stream.size / 1e6:.2g} MB of gzip can hold",
            "copy or download it again",
        )
    raise InputError(path, f"holds {held:.4g} of {asked:.4g} MB of voxels", "copy or download it again")


def _scale(path: Path, header: Any) -> tuple[float, float] | None:
    """Slope and intercept of the stored values, None when the header means them as they are."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isinf(slope) or np.isinf(inter):
        raise InputError(path, f"scl_slope {slope:g} and scl_inter {inter:g} are not finite", "export the scan again")
    if slope == 0 or np.isnan(slope):
        return None
    if np.isnan(inter):
        raise InputError(path, "scl_inter is NaN while scl_slope is set", "export the scan again")
    return None if (slope, inter) == (1.0, 0.0) else (slope, inter)


def _geometry(path: Path, header: Any, shape: tuple[int, ...]) -> tuple[Any, geometry.Affine, tuple[str, ...]]:
    """The header for the writer, the affine in millimetres, and what had to be assumed.

    The header returned differs from the file's where a field that counts is outside the standard, so that every
    reader of the output computes the same affine; identity is blanked.
    """
    warnings: list[str] = []
    clean = header.as_byteswapped("<" if np.little_endian else ">")
    for name in _IDENTITY:
        if name in clean:
            clean[name] = b""
    for name in ("qform_code", "sform_code"):
        if int(clean[name]) not in _XFORM_CODES:
            warnings.append(f"unknown {name} {int(clean[name])}, taken as not set")
            clean[name] = 0
    compare_forms = _clean_qform(path, clean)
    if clean["sform_code"] == 0:
        voxel = clean["pixdim"][1:4]
        if not np.isfinite(voxel).all() or (voxel == 0).any():
            raise InputError(path, "voxel size is unknown: no sform, and pixdim is zero or NaN", "export it again")
        if clean["qform_code"] == 0:
            warnings.append("neither sform nor qform is set: orientation is a guess, left and right may be exchanged")
    with np.errstate(over="ignore", invalid="ignore"):
        affine = np.array(clean.get_best_affine(), dtype=np.float64)
        qform = np.array(clean.get_qform(), dtype=np.float64) if compare_forms else None
    unit = int(clean["xyzt_units"]) & 7
    if unit not in _UNIT_MM:
        warnings.append(f"unknown unit code {unit}, millimetres assumed")
    scale = _UNIT_MM.get(unit, 1.0)
    affine[:3] *= scale
    warnings += checks.check_grid(path, shape, affine)
    voxel = clean["pixdim"][1:4]
    unknown = ~np.isfinite(voxel) | (voxel == 0)  # only possible where the sform gives the size
    voxel[unknown] = geometry.spacing(affine)[unknown] / scale
    if qform is not None and np.abs(qform).max() < checks.LARGEST_COORDINATE_MM:
        qform[:3] *= scale
        shift = geometry.corner_shift(shape, affine, qform)
        if shift > _FORMS_DIFFER_MM:
            warnings.append(f"sform and qform differ by up to {shift:.3g} mm; sform is used")
    return clean, affine, tuple(warnings)


def _clean_qform(path: Path, clean: Any) -> bool:
    """Bring pixdim and quaternion of a header into the standard's range, in place.

    Returns:
        Whether sform and qform are both set and usable, so that they can be compared.

    Raises:
        InputError: the qform is what places the scan, and it is not usable.
    """
    decides = clean["sform_code"] == 0 and clean["qform_code"] > 0
    pixdim = clean["pixdim"]
    pixdim[1:4] = np.abs(pixdim[1:4])
    if pixdim[0] not in (-1, 1):
        # The standard looks at the sign only; a negative value other than -1 is read differently by common tools.
        if pixdim[0] < 0 and decides:
            raise InputError(path, f"pixdim[0] is {float(pixdim[0]):g}; -1, 0 or 1 expected", "export the scan again")
        pixdim[0] = 1
    quaternion = np.array([clean["quatern_b"], clean["quatern_c"], clean["quatern_d"]], dtype=np.float64)
    length = math.hypot(*quaternion)
    if not math.isfinite(length) or length > 1 + 1e-3:
        if decides:
            raise InputError(path, f"the qform's quaternion has length {length:g}, at most 1", "export the scan again")
        return False
    if length > 1:
        # Rounding of the writer; unit length in float32 is within what readers accept.
        for name, value in zip(("quatern_b", "quatern_c", "quatern_d"), quaternion / length, strict=True):
            clean[name] = value
    both = clean["sform_code"] > 0 and clean["qform_code"] > 0
    return bool(both and np.isfinite(pixdim[1:4]).all())


def _voxels(path: Path, stream: Stream, layout: _Layout, wanted: list[int], kind: np.dtype[Any]) -> NDArray[Any]:
    """Read the wanted volumes into an array (C, X, Y, Z) of type `kind`, and the file to its end."""
    _check_size(path, stream, layout.offset, layout.shape, layout.dtype)
    x, y, z = layout.shape[:3]
    there = layout.shape[3] if len(layout.shape) == 4 else 1
    plane = x * y * layout.dtype.itemsize
    # The file runs along x first, the result along z: whole cache lines of z at a time make the turn cheap.
    planes = min(z, max(_CACHE_LINE_VOXELS, _SLAB_BYTES // plane // _CACHE_LINE_VOXELS * _CACHE_LINE_VOXELS))
    try:
        data = np.empty((len(wanted), x, y, z), dtype=kind)
        buffer = bytearray(plane * planes)
    except MemoryError as err:
        raise MemoryBudgetError(path, f"shape {layout.shape} does not fit into memory", "crop or resample it") from err
    read, missing = 0, stream.skip(layout.offset) < layout.offset
    for volume in range(there):
        for low in range(0, z, planes):
            count = plane * min(planes, z - low)
            got = stream.fill(memoryview(buffer)[:count]) if not missing else 0
            read += got
            missing = missing or got < count
            if missing:
                asked = plane * z * there
                raise InputError(
                    path, f"holds {read / 1e6:.4g} of {asked / 1e6:.4g} MB of voxels", "copy or download it again"
                )
            if volume not in wanted:
                continue
            slab = np.frombuffer(buffer, layout.dtype, count // layout.dtype.itemsize).reshape((x, y, -1), order="F")
            with np.errstate(over="ignore", invalid="ignore"):
                data[wanted.index(volume), :, :, low : low + planes] = layout.values(slab)
    stream.finish()
    return data
