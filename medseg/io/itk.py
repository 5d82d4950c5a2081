"""MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr), read by SimpleITK.

SimpleITK accepts damaged compressed data without a word and follows a header to any file on the disk. So the text
header is read here first, the data file is looked for in the header's own folder only, and its bytes are unpacked
once to compare checksums before SimpleITK opens it.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, MemoryBudgetError
from medseg.io import checks, geometry
from medseg.io.files import check_regular
from medseg.io.stream import CHUNK, GZIP_RATIO, Stream
from medseg.io.volume import Source, Volume

if TYPE_CHECKING:
    import hashlib

_HEADER_BYTES = 1 << 20
_AGAIN = "copy or export it again"
_ANATOMICAL = re.compile(r"(left|right)-(anterior|posterior)-(superior|inferior)|[lr][ap][si]", re.IGNORECASE)
_MILLIMETRES = {"mm", "millimeter", "millimetre", "millimeters", "millimetres", "???", ""}


@dataclass(frozen=True)
class _Header:
    """What the text header says of the data.

    Attributes:
        io: SimpleITK's name for the format.
        data: the file that holds the voxels.
        offset: where they start in it.
        wbits: zlib's code for the compression, None when the voxels are plain.
        text: whether the voxels are written as text.
        size: length of every axis, as written.
        warnings: what had to be assumed.
    """

    io: str
    data: Path
    offset: int
    wbits: int | None
    text: bool
    size: tuple[int, ...]
    warnings: tuple[str, ...] = ()


def read(path: Path, *, channels: int | None = None, volume_index: int | None = None, digest: hashlib._Hash) -> Volume:
    """Read a scan.

    Args:
        path: the .mha, .mhd, .nrrd or .nhdr file.
        channels: how many channels are wanted; None accepts what is there.
        volume_index: take this one channel or volume, counted from 0.
        digest: updated with the bytes of the file, or of header and data file in this order.

    Returns:
        The scan; data (C, X, Y, Z) float32, finite.

    Raises:
        InputError: damaged, unsupported or implausible.
        UsageError: `volume_index` is out of range.
        MemoryBudgetError: the voxels do not fit into memory.
    """
    array, affine, warnings, shape = _load(path, channels, volume_index, digest)
    wanted = checks.wanted_volumes(path, shape, channels, volume_index)
    with np.errstate(over="ignore"):
        data = np.ascontiguousarray(array[wanted], dtype=np.float32)
    if array.dtype.kind == "f":
        warnings += tuple(checks.make_finite(path, data))
    return Volume(data, affine, Source(path, "itk", None, digest.hexdigest(), warnings, dtype=array.dtype.name))


def read_labels(path: Path) -> tuple[NDArray[np.integer], geometry.Affine]:
    """Read a label map (X, Y, Z) of whole numbers, and its affine to RAS millimetres.

    Raises:
        InputError: as `read`; more than one channel, or values that are not whole numbers.
        MemoryBudgetError: the voxels do not fit into memory.
    """
    array, affine, _, _ = _load(path, 1, None, None)
    return checks.to_integers(path, np.ascontiguousarray(array[0])), affine


def _load(
    path: Path, channels: int | None, volume_index: int | None, digest: hashlib._Hash | None
) -> tuple[NDArray[Any], geometry.Affine, tuple[str, ...], tuple[int, ...]]:
    """Voxels (C, X, Y, Z) of the stored type, affine, warnings, and the file's shape (X, Y, Z[, C])."""
    header = _parse(path)
    import SimpleITK

    sitk: Any = SimpleITK
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # noqa: FBT003
    reader = sitk.ImageFileReader()
    reader.SetImageIO(header.io)
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as err:
        raise InputError(path, f"the header is not valid ({_reason(err)})", _AGAIN) from err
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in kind or ("float" not in kind and "integer" not in kind):
        raise InputError(path, f"voxels are {kind}; medseg reads real numbers", "convert the scan")
    components = reader.GetNumberOfComponents()
    size = tuple(int(n) for n in reader.GetSize())
    if _product(header.size) not in {_product(size), _product(size) * components}:
        raise InputError(path, f"the header's sizes {header.size} are read as {size}", _AGAIN)
    shape = checks.volume_shape(path, size)
    if components > 1:
        shape = checks.volume_shape(path, (*shape, components))
    dimension = len(size)
    direction = np.array(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
    affine = geometry.from_lps(direction, reader.GetSpacing()[:3], reader.GetOrigin()[:3])
    warnings = header.warnings + tuple(checks.check_grid(path, shape[:3], affine))
    checks.wanted_volumes(path, shape, channels, volume_index)
    voxel = 1 if header.text else _bytes_per_component(kind)
    _check_data(path, header, voxel * components * _product(size), digest)
    try:
        image = reader.Execute()
    except MemoryError as err:
        raise MemoryBudgetError(path, f"shape {shape} does not fit into memory", "crop or resample it") from err
    except RuntimeError as err:
        raise InputError(path, f"cannot be read ({_reason(err)})", _AGAIN) from err
    array = sitk.GetArrayFromImage(image)  # x runs fastest: (z, y, x), (z, y, x, components) or (volumes, z, y, x)
    if components > 1:
        array = array.reshape(*shape[2::-1], components).transpose(3, 2, 1, 0)
    else:
        array = array.reshape(-1, *shape[2::-1]).transpose(0, 3, 2, 1)
    return array, affine, warnings, shape


def _product(size: tuple[int, ...]) -> int:
    """Product in Python integers, which do not wrap."""
    count = 1
    for n in size:
        count *= n
    return count


def _bytes_per_component(kind: str) -> int:
    """Size of one number, from SimpleITK's name of the type ("vector of 16-bit signed integer")."""
    found = re.search(r"(\d+)-bit", kind)
    return int(found[1]) // 8 if found else 1


def _reason(err: RuntimeError) -> str:
    """The last line of SimpleITK's message, without its class names and addresses."""
    lines = [line for line in str(err).splitlines() if line.strip()]
    return re.sub(r"^ITK ERROR: |\w+\(0x[0-9a-f]+\): ", "", lines[-1]).strip() if lines else "no reason given"


def _check_data(path: Path, header: _Header, needed: int, digest: hashlib._Hash | None) -> None:
    """Read the data to the end: enough of it, and its checksum right.

    Args:
        path: the file that the user named.
        header: where the voxels lie.
        needed: their bytes, unpacked; for text, their number.
        digest: updated with all bytes.

    Raises:
        InputError: truncated or damaged.
    """
    if header.data != path and digest is not None:
        with Stream(path, digest) as stream:
            stream.skip(stream.size)
    with Stream(header.data, digest, unpack=False) as stream:
        stored = stream.size - header.offset
        most = stored * GZIP_RATIO if header.wbits else stored
        if most >= needed:
            stream.skip(header.offset)
            held = stream.skip(stored) if header.wbits is None else _unpacked_size(path, stream, header.wbits)
        else:
            held = stored
    if held < needed:
        raise InputError(path, f"holds {held / 1e6:.4g} of {needed / 1e6:.4g} MB of voxels", _AGAIN)


def _unpacked_size(path: Path, stream: Stream, wbits: int) -> int:
    """Unpack the rest of a stream, checksum included; the number of bytes it holds."""
    unpacker = zlib.decompressobj(wbits)
    held = 0
    try:
        while chunk := stream.read(CHUNK):
            while chunk and not unpacker.eof:
                held += len(unpacker.decompress(chunk, CHUNK))
                chunk = unpacker.unconsumed_tail
    except zlib.error as err:
        raise InputError(path, "the compressed voxels are damaged", _AGAIN) from err
    if not unpacker.eof:
        raise InputError(path, "the compressed voxels end early", _AGAIN)
    return held


def _parse(path: Path) -> _Header:
    """Read the text header."""
    with Stream(path, unpack=False) as stream:
        head = stream.read(_HEADER_BYTES)
    return _parse_nrrd(path, head) if head.startswith(b"NRRD") else _parse_metaimage(path, head)


def _parse_metaimage(path: Path, head: bytes) -> _Header:
    fields: dict[str, str] = {}
    offset = 0
    while "elementdatafile" not in fields:
        end = head.find(b"\n", offset)
        line = head[offset : end if end >= 0 else len(head)].decode("utf-8", "replace")
        key, *value = re.split("[=:]", line, maxsplit=1)
        if not value:
            raise InputError(path, "the MetaImage header ends without ElementDataFile", _AGAIN)
        fields[key.strip().lower()] = value[0].strip()
        offset = end + 1 if end >= 0 else len(head)
    if not fields.keys() & {"elementspacing", "elementsize"}:
        raise InputError(path, "voxel size is unknown: no ElementSpacing in the header", "export it again")
    name = fields["elementdatafile"]
    local = name.upper() == "LOCAL"
    if name.upper().startswith("LIST"):
        raise InputError(path, "its voxels are spread over a list of files", "save it as one .mha file")
    compressed = fields.get("compresseddata", "").lower() == "true"
    skip = fields.get("headersize", "0")
    if skip not in {"0", "-1"} and compressed:
        raise InputError(path, f"HeaderSize {skip} before compressed voxels is not supported", "save it as .mha")
    return _Header(
        io="MetaImageIO",
        data=path if local else _beside(path, name),
        offset=offset if local else 0,
        wbits=zlib.MAX_WBITS if compressed else None,
        text=fields.get("binarydata", "true").lower() == "false",
        size=_sizes(path, fields.get("dimsize", "")),
    )


def _parse_nrrd(path: Path, head: bytes) -> _Header:
    fields: dict[str, str] = {}
    offset = 0
    while True:
        end = head.find(b"\n", offset)
        line = head[offset : end if end >= 0 else len(head)].decode("utf-8", "replace").rstrip("\r")
        offset = end + 1 if end >= 0 else len(head)
        if not line or end < 0:
            break
        key, colon, value = line.partition(":")
        if colon and not value.startswith("=") and not line.startswith("#"):
            fields[key.strip().lower()] = value.strip()
    if not fields.keys() & {"space directions", "spacings"}:
        raise InputError(path, "voxel size is unknown: neither 'space directions' nor 'spacings'", "export it again")
    units = {unit.lower() for unit in re.findall(r'"([^"]*)"', fields.get("space units", "") + fields.get("units", ""))}
    if units - _MILLIMETRES:
        raise InputError(path, f"space units {', '.join(sorted(units))}; millimetres expected", "convert the scan")
    space = fields.get("space", "")
    warnings: tuple[str, ...] = ()
    if not _ANATOMICAL.match(space):
        found = f"space {space!r} is not anatomical" if space else "no space is named"
        warnings = (f"{found}: left-posterior-superior is assumed, sides may be exchanged",)
    name = fields.get("data file", fields.get("datafile", ""))
    if name.upper().startswith("LIST") or re.search(r"%\d*d", name):
        raise InputError(path, "its voxels are spread over a list of files", "save it as one .nrrd file")
    encoding = fields.get("encoding", "").lower()
    packed = encoding in {"gz", "gzip"}
    skips = {fields.get(key, "0") for key in ("line skip", "lineskip", "byte skip", "byteskip")}
    if packed and skips != {"0"}:
        raise InputError(path, "bytes skipped before compressed voxels are not supported", "save it as one .nrrd file")
    return _Header(
        io="NrrdImageIO",
        data=_beside(path, name) if name else path,
        offset=0 if name else offset,
        wbits=zlib.MAX_WBITS + 16 if packed else None,
        text=encoding not in {"raw", "gz", "gzip"},
        size=_sizes(path, fields.get("sizes", "")),
        warnings=warnings,
    )


def _sizes(path: Path, text: str) -> tuple[int, ...]:
    """The lengths of the axes."""
    if not re.fullmatch(r"\d{1,18}(\s+\d{1,18})*", text):
        raise InputError(path, f"the header's sizes are {text[:40]!r}; whole numbers expected", _AGAIN)
    return tuple(int(n) for n in text.split())


def _beside(path: Path, name: str) -> Path:
    """The data file that a header names, in the header's own folder.

    Raises:
        InputError: elsewhere, or not there.
    """
    other = path.parent / name
    if Path(name).name != name or "\\" in name:
        raise InputError(path, "its data file lies in another folder and is not opened", "keep both files together")
    try:
        check_regular(other)
    except InputError as err:
        raise InputError(path, f"its data file {name}: {err.problem}", "keep both files together") from err
    return other
