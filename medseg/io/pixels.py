"""Stored values of DICOM images: plain ones by pydicom, compressed ones by SimpleITK, which needs no plug-ins."""

from __future__ import annotations

import functools
import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.io.discreet import discreet

_LAYOUT = (
    *("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
)
_SECONDARY_CAPTURE = ("1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.7.3")


class PixelError(Exception):
    """Pixels that cannot be had; the text says why and names no file."""


def stored_values(raw: bytes, *, invert: bool = False) -> NDArray[np.integer]:
    """Decode the pixels of a DICOM file, before any rescaling.

    Args:
        raw: the file.
        invert: exchange small and large values within the range of the stored bits.

    Returns:
        Stored values (frames, rows, columns).

    Raises:
        PixelError: no pixels, damaged or truncated ones, or a compression that cannot be decoded.
    """
    import pydicom

    with discreet():
        try:
            header = pydicom.dcmread(
                io.BytesIO(raw), specific_tags=[*_LAYOUT, "PixelData", "FloatPixelData", "ModalityLUTSequence"]
            )
            syntax = header.file_meta.TransferSyntaxUID
            problem = _unsupported(header)
            if problem:
                raise PixelError(problem)
            values = _by_gdcm(header) if syntax.is_compressed and syntax.is_encapsulated else _plain(header)
            expected = (int(header.get("NumberOfFrames") or 1), int(header.Rows), int(header.Columns))
            if values.size != np.prod(expected):
                raise ValueError("size")
        except (PixelError, MemoryError):
            raise
        except Exception as err:  # pydicom and SimpleITK raise whatever the bytes lead them to
            raise PixelError(f"its pixels are damaged, truncated or of a kind unknown ({_syntax_name(raw)})") from err
    values = values.reshape(expected)
    if invert:
        top = -1 if int(header.PixelRepresentation) else (1 << int(header.BitsStored)) - 1
        values = top - values.astype(np.int64)
    return values


@functools.lru_cache(maxsize=4)
def _digests(path: Path) -> tuple[str, ...]:
    """SHA-256 of the stored values of each frame of a file."""
    return tuple(hashlib.sha256(frame.tobytes()).hexdigest() for frame in stored_values(path.read_bytes()))


def pixel_digest(path: Path, number: int) -> str:
    """SHA-256 of the stored values of one frame, for comparison.

    Raises:
        PixelError: as `stored_values`.
    """
    return _digests(path)[number]


def _unsupported(header: Any) -> str:
    """What about the pixels medseg does not read; "" when all is well."""
    if "FloatPixelData" in header:
        return "floating point pixels"
    if "PixelData" not in header:
        return "no pixel data (7FE0,0010)"
    if header.get("ModalityLUTSequence"):
        return "values are given by a lookup table (0028,3000), which is not supported"
    bits, stored = int(header.BitsAllocated), int(header.BitsStored)
    if bits not in {8, 16, 32} or not 1 <= stored <= bits:
        return f"{stored} of {bits} bits a pixel; 8, 16 and 32 are read"
    return ""


def _plain(header: Any) -> NDArray[np.integer]:
    """Uncompressed values; bits beside the stored ones, where old scanners kept overlays, are cleared."""
    values: NDArray[np.integer] = header.pixel_array
    allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
    high = int(header.get("HighBit", stored - 1))
    if stored == allocated or not stored - 1 <= high < allocated:
        return values
    return (values << (allocated - 1 - high)) >> (allocated - stored)  # arithmetic for signed types


def _by_gdcm(header: Any) -> NDArray[np.integer]:
    """Compressed values, decoded by SimpleITK.

    The file handed over holds pixels and nothing of the patient, and no rescaling, which GDCM treats differently
    from class to class.
    """
    import pydicom
    import SimpleITK
    from pydicom.uid import generate_uid

    plain = pydicom.Dataset()
    for name in (*_LAYOUT, "PixelData"):
        if name in header:
            plain[name] = header[name]
    plain.PhotometricInterpretation = "MONOCHROME2"
    plain.SOPClassUID = _SECONDARY_CAPTURE[int(header.get("NumberOfFrames") or 1) > 1]
    plain.SOPInstanceUID = generate_uid()
    plain.file_meta = pydicom.dataset.FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = header.file_meta.TransferSyntaxUID
    sitk: Any = SimpleITK
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # noqa: FBT003
    with tempfile.TemporaryDirectory(prefix="medseg-") as folder:
        file = Path(folder) / "pixels.dcm"
        plain.save_as(file, enforce_file_format=True)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(file))
        values: NDArray[np.integer] = sitk.GetArrayFromImage(reader.Execute())
    return values


def _syntax_name(raw: bytes) -> str:
    """The name of a file's transfer syntax, as far as it can be told."""
    import pydicom

    try:
        return str(pydicom.dcmread(io.BytesIO(raw), specific_tags=["Rows"]).file_meta.TransferSyntaxUID.name)
    except Exception:  # the file is damaged, and the message says so already
        return "transfer syntax unknown"
