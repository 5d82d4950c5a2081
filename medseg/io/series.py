"""Which DICOM series a folder or file holds: headers only, no pixels, nothing of the patient kept.

An image becomes one `Frame` for each slice it holds; frames of one series, or of one multi-frame file, are a `Series`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.errors import InputError, UsageError
from medseg.io.discreet import discreet
from medseg.io.files import check_regular

log = logging.getLogger(__name__)

MOST_FILES = 100_000
"""Files that a folder may hold; a larger one is hardly the folder of a study."""

_ROWS_SHOWN = 12
_MAGIC_END = 132
_LIST_NUMBER_DIGITS = 4
_IMAGES = "1.2.840.10008.5.1.4.1.1."

_OTHER_OBJECTS = (
    ("1.2.840.10008.1.3.10", "directory", "directories"),
    (_IMAGES + "7", "secondary capture", "secondary captures"),
    (_IMAGES + "66.4", "segmentation", "segmentations"),
    (_IMAGES + "66.7", "segmentation", "segmentations"),
    (_IMAGES + "66", "spatial or raw data object", "spatial or raw data objects"),
    (_IMAGES + "481", "radiotherapy object", "radiotherapy objects"),
    (_IMAGES + "88", "structured report", "structured reports"),
    (_IMAGES + "11", "presentation state", "presentation states"),
    (_IMAGES + "104", "document", "documents"),
    (_IMAGES + "30", "parametric map", "parametric maps"),
)
"""Storage classes, each with the classes below it, that are no scans."""

_PLURALS = dict(entry[1:] for entry in _OTHER_OBJECTS) | {
    "localiser": "localisers",
    "colour image": "colour images",
    "object without image": "objects without image",
    "multi-frame image without positions": "multi-frame images without positions",
}

TRAITS = (
    *("TemporalPositionIdentifier", "TemporalPositionIndex", "StackID", "EchoNumbers", "EchoTime", "EffectiveEchoTime"),
    *("DiffusionBValue", "TriggerTime", "NominalCardiacTriggerDelayTime", "InversionTime", "FlipAngle", "ImageType"),
    *("FrameType", "ConvolutionKernel", "KVP", "AcquisitionNumber", "AcquisitionTime", "AcquisitionDateTime"),
)
"""What may tell images at one place apart, the most telling first."""

_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription"),
    *("Modality", "ImageType", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"),
    *("ModalityLUTSequence", "FrameOfReferenceUID", "GantryDetectorTilt"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *TRAITS,
)


@dataclass(frozen=True, slots=True)
class Frame:
    """One slice, as its header describes it.

    Attributes:
        path: the file.
        number: of the frame in its file, from 0; 0 for a file of one image.
        shape: rows and columns.
        position: centre of the first pixel, LPS mm; None when not stated.
        orientation: direction of growing column index, then of growing row index, LPS; None when not stated.
        pixel_spacing: mm from row to row and from column to column; None when not stated.
        rescale: slope and intercept from stored value to the modality's unit; None when not stated.
        frame_of_reference: UID of the space that positions are in.
        uid: SOPInstanceUID of the file, "" when empty.
        tilt_degrees: of the gantry, as stated.
        inverted: whether small values are to be shown bright (MONOCHROME1).
        traits: what is stated of `TRAITS`.
    """

    path: Path
    number: int
    shape: tuple[int, int]
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    rescale: tuple[float, float] | None
    frame_of_reference: str
    uid: str
    tilt_degrees: float
    inverted: bool
    traits: Mapping[str, str]


@dataclass(frozen=True)
class Series:
    """Images that belong together.

    Attributes:
        uid: SeriesInstanceUID, "" when empty.
        number: SeriesNumber, None when not stated.
        modality: "CT", "MR", ...
        frames: in the order of the files' names.
        multiframe: whether one file holds all of them.
        referable: whether all identifiers are there that another DICOM object needs to refer to it.
        description: SeriesDescription, which may name the patient: shown on demand only, never in messages.
        left_out: localisers that carry the same series UID.
    """

    uid: str
    number: int | None
    modality: str
    frames: tuple[Frame, ...]
    multiframe: bool
    referable: bool
    description: str = field(default="", repr=False)
    left_out: int = 0

    @property
    def summary(self) -> str:
        """Modality, images and size in pixels."""
        rows, columns = self.frames[0].shape
        return f"{self.modality or 'unknown modality'}, {len(self.frames)} images, {columns} x {rows}"


@dataclass(frozen=True)
class Contents:
    """What a folder or file holds.

    Attributes:
        volumes: series of two images and more, by series number; their place in this list, from 1, is what
            ``--series`` takes.
        others: kind of object to how many there are of it: localisers, reports, single images ...
        ignored: files that are not DICOM.
    """

    volumes: tuple[Series, ...]
    others: Mapping[str, int]
    ignored: int

    def left_out(self) -> list[str]:
        """Warnings that say what beside the volumes was left out."""
        found = [f"{count} {kind if count == 1 else _PLURALS.get(kind, kind + 's')}" for kind, count in self._sorted()]
        if self.ignored:
            found.append(f"{self.ignored} file{'s' if self.ignored > 1 else ''} that are not DICOM")
        return [f"left out: {', '.join(found)}"] if found else []

    def _sorted(self) -> list[tuple[str, int]]:
        return sorted((kind, count) for kind, count in self.others.items() if count)


@discreet()
def list_series(path: Path, shown: Path) -> Contents:
    """Read the headers of a DICOM file, or of all files below a folder.

    Args:
        path: file or folder.
        shown: what messages call it; the archive, when the folder is an unpacked one.

    Raises:
        InputError: no DICOM at all, too many files, or a damaged header.
    """
    files = _files(path, shown) if path.is_dir() else [path]
    headers: list[tuple[Path, Any]] = []
    ignored = 0
    for file in files:
        if path.is_dir() and not is_dicom(file):
            ignored += 1
            continue
        headers.append((file, _header(file, path, shown)))
    if not headers:
        problem = f"a {'folder' if shown.is_dir() else 'zip archive'} without a DICOM file ({ignored} other files)"
        raise InputError(shown, problem, "check the path")
    others: Counter[str] = Counter()
    groups: dict[tuple[str, ...], list[tuple[Path, Any]]] = {}
    localisers: Counter[str] = Counter()
    for file, header in headers:
        try:
            kind = _kind(header)
            key = _key(file, header)
        except Exception as err:  # elements are decoded when they are asked for, and then may turn out damaged
            raise _damaged(file, path, shown, err) from err
        if kind:
            others[kind] += 1
            localisers[_text(header, "SeriesInstanceUID")] += kind == "localiser"
        else:
            groups.setdefault(key, []).append((file, header))
    volumes = []
    for members in groups.values():
        try:
            series = _series(members, localisers)
        except Exception as err:
            raise _damaged(members[0][0], path, shown, err) from err
        if len(series.frames) > 1:
            volumes.append(series)
        else:
            others["single image"] += 1
    volumes.sort(key=lambda one: (one.number is None, one.number or 0, one.uid, str(one.frames[0].path)))
    log.debug("%d volumes, others: %s", len(volumes), dict(others))
    return Contents(tuple(volumes), dict(others), ignored)


def choose_series(contents: Contents, wanted: str | None, shown: Path) -> Series:
    """The one series to read.

    Args:
        contents: of the folder or file.
        wanted: number in the list, UID, or a beginning or end of a UID that only one series has; "largest" is the one
            with the most images; None when there is only one.
        shown: what messages call the folder or file.

    Raises:
        InputError: no volume, or several and none was chosen.
        UsageError: nothing, or more than one series, fits `wanted`.
    """
    volumes = contents.volumes
    if not volumes:
        if contents.others.get("single image"):
            count = contents.others["single image"]
            found = "one image" if count == 1 else f"{count} images, each alone in its series"
            raise InputError(shown, f"{found}; medseg reads volumes", "give the folder of the whole series")
        left = "; ".join(contents.left_out())
        raise InputError(shown, f"no volume ({left})", "give the folder of an image series")
    if wanted is None:
        if len(volumes) == 1:
            return volumes[0]
        rows = [f"{number}: {one.summary}" for number, one in enumerate(volumes[:_ROWS_SHOWN], start=1)]
        more = f"; {len(volumes) - _ROWS_SHOWN} more" if len(volumes) > _ROWS_SHOWN else ""
        remedy = "choose one with --series N; medseg inspect tells more"
        raise InputError(shown, f"{len(volumes)} series ({'; '.join(rows)}{more})", remedy)
    text = wanted.strip()
    if text.isdecimal() and len(text) <= _LIST_NUMBER_DIGITS and 1 <= int(text) <= len(volumes):
        return volumes[int(text) - 1]
    if text == "largest":
        most = max(len(one.frames) for one in volumes)
        largest = [one for one in volumes if len(one.frames) == most]
        if len(largest) == 1:
            return largest[0]
        problem = f"{len(largest)} series of {shown} have {most} images, and none has more"
        raise UsageError("--series", problem, "give a number or a UID; medseg inspect lists them")
    exact = [one for one in volumes if text and one.uid == text]
    partial = [one for one in volumes if text and (one.uid.startswith(text) or one.uid.endswith(text))]
    fitting = exact or partial
    if len(fitting) != 1:
        remedy = f"give a number from 1 to {len(volumes)}, or a UID; medseg inspect lists them"
        raise UsageError("--series", f"{len(fitting)} series of {shown} fit {wanted!r}", remedy)
    return fitting[0]


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does; False for what cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_MAGIC_END)[-4:] == b"DICM"
    except OSError:
        return False


@discreet()
def public_name(path: Path, root: Path, shown: Path) -> str:
    """How a message calls a file that the user did not name: exporters put patients' names into file names.

    Args:
        path: the file.
        root: the folder that was searched.
        shown: what messages call that folder; another one for an unpacked archive.

    Returns:
        The file's name; or its number by name among the folder's files when it repeats part of the identity.
    """
    if root != shown:
        return f"entry {int(path.stem) + 1}"
    if not root.is_dir():
        return "it"
    name = path.name.lower()
    try:
        header = _read(path, ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "OtherPatientIDs"))
        words = [word for element in header for word in _words(str(element.value))]
    except Exception:  # a damaged header: nothing is known of the identity
        words = [name]
    if not any(word in name for word in words):
        return path.name
    return f"file {_files(root, shown).index(path) + 1} in the order of names"


def _words(text: str) -> list[str]:
    """Parts of an identity that are long enough to mean something in a file name, in lower case."""
    parts = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return [part for part in parts if len(part) > 2]


def _files(folder: Path, shown: Path) -> list[Path]:
    """All files below a folder that are not hidden, by name."""
    found: list[Path] = []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name) for name in sorted(names) if _may_be_dicom(Path(here, name))]
        if len(found) > MOST_FILES:
            raise InputError(shown, f"more than {MOST_FILES} files", "give the folder of one study")
    return found


def _may_be_dicom(path: Path) -> bool:
    return not path.name.startswith(".") and path.is_file() and path.name.upper() != "DICOMDIR"


def _read(path: Path, tags: Sequence[str]) -> Any:
    """Some elements of a file before its pixels."""
    import pydicom

    return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))


def _header(file: Path, root: Path, shown: Path) -> Any:
    check_regular(file)
    try:
        return _read(file, _TAGS)
    except Exception as err:  # pydicom raises whatever the bytes lead it to
        raise _damaged(file, root, shown, err) from err


def _damaged(file: Path, root: Path, shown: Path, err: Exception) -> InputError:
    """The error for a header that cannot be read."""
    named = public_name(file, root, shown)
    what = "its header" if named == "it" else f"the header of {named}, or of another image of its series,"
    return InputError(shown, f"{what} is damaged ({type(err).__name__})", "copy or export it again")


def _text(header: Any, name: str) -> str:
    """An element as text, "" when absent or empty."""
    value = header.get(name)
    return "" if value is None else str(value).strip()


def _class(header: Any) -> str:
    meta = getattr(header, "file_meta", None)
    return _text(header, "SOPClassUID") or (_text(meta, "MediaStorageSOPClassUID") if meta is not None else "")


def _kind(header: Any) -> str:
    """Why a file is no part of a volume; "" for an image that may be."""
    storage = _class(header)
    for uid, kind, _ in _OTHER_OBJECTS:
        if storage == uid or storage.startswith(uid + "."):
            return kind
    if not header.get("Rows") or not header.get("Columns"):
        return "object without image"
    count = _frame_count(header)
    if count > 1 and len(header.get("PerFrameFunctionalGroupsSequence") or ()) != count:
        return "multi-frame image without positions"
    if "LOCALIZER" in _text(header, "ImageType").upper():
        return "localiser"
    if int(header.get("SamplesPerPixel") or 1) != 1:
        return "colour image"
    return (
        "" if (_text(header, "PhotometricInterpretation") or "MONOCHROME2").startswith("MONOCHROME") else "colour image"
    )


def _key(file: Path, header: Any) -> tuple[str, ...]:
    """What images of one series share."""
    if _frame_count(header) > 1:
        return ("file", str(file))
    uid = _text(header, "SeriesInstanceUID")
    if uid:
        return ("series", uid)
    geometry = [_text(header, name) for name in ("ImageOrientationPatient", "Rows", "Columns")]
    return ("unnamed", _text(header, "StudyInstanceUID"), _text(header, "SeriesNumber"), *geometry)


def _frame_count(header: Any) -> int:
    """Frames of a file, 1 for a plain image; a multi-frame object of one frame counts as 1 too."""
    return int(header.get("NumberOfFrames") or 1)


def _series(members: Sequence[tuple[Path, Any]], localisers: Mapping[str, int]) -> Series:
    first = members[0][1]
    frames = tuple(frame for file, header in members for frame in _frames(file, header))
    uid = _text(first, "SeriesInstanceUID")
    needed = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
    return Series(
        uid=uid,
        number=int(first.SeriesNumber) if _text(first, "SeriesNumber") else None,
        modality=_text(first, "Modality").upper(),
        frames=frames,
        multiframe=_frame_count(first) > 1,
        referable=all(_text(header, name) for _, header in members for name in needed),
        description=_text(first, "SeriesDescription"),
        left_out=localisers.get(uid, 0),
    )


def _frames(file: Path, header: Any) -> Iterator[Frame]:
    """The slices of a file; those of a multi-frame file by its functional groups."""
    count = _frame_count(header)
    shape = int(header.Rows), int(header.Columns)
    shared = _first(header.get("SharedFunctionalGroupsSequence"))
    each = header.get("PerFrameFunctionalGroupsSequence") or ()
    if each and len(each) != count:
        raise ValueError("as many functional groups as frames expected")
    for number in range(count):
        # What one frame says of itself comes before what all share, and that before the plain elements.
        levels = [level for level in (each[number] if each else None, shared) if level is not None]
        plain = header if count == 1 or not each else None
        yield Frame(
            path=file,
            number=number,
            shape=shape,
            position=_numbers(_find(levels, plain, "PlanePositionSequence", "ImagePositionPatient"), 3),
            orientation=_numbers(_find(levels, plain, "PlaneOrientationSequence", "ImageOrientationPatient"), 6),
            pixel_spacing=_numbers(_find(levels, plain, "PixelMeasuresSequence", "PixelSpacing"), 2),
            rescale=_rescale(levels, plain),
            frame_of_reference=_text(header, "FrameOfReferenceUID"),
            uid=_text(header, "SOPInstanceUID"),
            tilt_degrees=float(header.get("GantryDetectorTilt") or 0.0),
            inverted=_text(header, "PhotometricInterpretation") == "MONOCHROME1",
            traits=_traits(levels, header),
        )


def _first(sequence: Any) -> Any:
    return sequence[0] if sequence else None


def _find(levels: Sequence[Any], plain: Any, sequence: str, name: str) -> Any:
    """An element from the first functional group that has it, or from the header itself."""
    for level in levels:
        item = _first(level.get(sequence))
        if item is not None and item.get(name) is not None:
            return item.get(name)
    return plain.get(name) if plain is not None else None


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """That many finite numbers, or None."""
    if value is None or isinstance(value, str) or not hasattr(value, "__len__") or len(value) != count:
        return None
    found = tuple(float(one) for one in value)
    return found if all(abs(one) < float("inf") for one in found) else None


def _rescale(levels: Sequence[Any], plain: Any) -> tuple[float, float] | None:
    sequence = "PixelValueTransformationSequence"
    slope = _find(levels, plain, sequence, "RescaleSlope")
    intercept = _find(levels, plain, sequence, "RescaleIntercept")
    if slope in (None, "") and intercept in (None, ""):
        return None
    return float(1 if slope in (None, "") else slope), float(0 if intercept in (None, "") else intercept)


def _traits(levels: Sequence[Any], header: Any) -> dict[str, str]:
    """What is stated of `TRAITS`, in any functional group."""
    found = {name: _text(header, name) for name in TRAITS if _text(header, name)}
    for level in reversed(levels):
        for element in level:
            for item in element.value if element.VR == "SQ" else ():
                found |= {name: _text(item, name) for name in TRAITS if _text(item, name)}
    return found
