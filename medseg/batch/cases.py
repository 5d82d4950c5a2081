"""Which scans a batch is made of: folders, patterns, files and manifests become cases with one name each."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medseg.batch.manifest import read_manifest
from medseg.errors import InputError, UsageError
from medseg.io.files import VOLUME_SUFFIXES, case_name, split_suffix
from medseg.io.series import is_dicom

SCAN_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".hdr.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".zip")
"""Suffixes, in lower case, that a folder or a pattern is searched for."""

_CHANNEL = re.compile(r"(.+)_(\d{4})")
_RESULT = re.compile("_seg(_rtstruct)?$")
_RESULTS = ("_seg", "_seg_probabilities", "_seg_uncertainty", "_seg_uncertainty_mi", "_seg_evidence")
_LABEL = "_label"
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One scan on its way.

    Attributes:
        name: unique in the batch; the outputs are ``OUT_DIR/name_seg.nii.gz`` and so on; may hold subfolders ("a/ct").
        scans: absolute paths: one volume or DICOM folder, or one for each channel.
        problem: why it cannot be computed, as far as the names tell; empty when nothing is wrong.
    """

    name: str
    scans: tuple[Path, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """The cases of a batch.

    Attributes:
        cases: in the order given; the files of a folder by name.
        notes: what was left out, one sentence each.
    """

    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()


def find_cases(
    inputs: Sequence[str | Path],
    *,
    channels: int = 1,
    partial: bool = False,
    recursive: bool = False,
    output: Path | None = None,
) -> Found:
    """Find the cases that the inputs name.

    Args:
        inputs: folders, patterns (``"data/*/ct.nii.gz"``), volumes, DICOM folders and CSV manifests.
        channels: of the bundle; with several, files ``CASE_0000``, ``CASE_0001`` ... are one case.
        partial: some of a case's channels may be missing.
        recursive: also search the folders' subfolders; the names keep them.
        output: the batch's folder, which is not searched when it lies inside an input.

    Raises:
        InputError: an input does not exist, or there is no scan at all.
        UsageError: two different scans would get one name, or a manifest is not one.
    """
    avoid = output.resolve() if output is not None else None
    cases: list[Case] = []
    files: list[_File] = []
    left_out = 0
    for given in inputs:
        path = Path(given)
        if path.suffix.lower() == ".csv" and path.is_file():
            cases += [
                Case(
                    row.case or case_name(row.images[0]),
                    row.images,
                    _channel_count(len(row.images), channels, partial=partial),
                )
                for row in read_manifest(path)
            ]
            continue
        found = _expand(path, str(given), recursive=recursive, avoid=avoid)
        named = path.is_file()
        kept = [file for file in found if named or not _is_output(file.path)]
        left_out += len(found) - len(kept)
        files += kept
    # A shell expands *.nii.gz to scans, their segmentations and their label maps alike.
    scans = {(file.path.parent, stem) for file in files for stem in _stems(file.path)}
    plain = [file for file in files if _scan_of(file.path) not in scans]
    left_out += len(files) - len(plain)
    cases += _grouped(plain, channels, partial=partial) if channels > 1 else [_single(file) for file in plain]
    if not cases:
        seen = ", ".join(str(one) for one in inputs[:_NAMED])
        more = f" ({left_out} files *_seg and *_label are results, not scans)" if left_out else ""
        raise InputError(
            seen, f"no scan found ({', '.join(SCAN_SUFFIXES)}, DICOM){more}", "check the path, or add --recursive"
        )
    cases, notes = _without_repeats(cases)
    _check_names(cases)
    if left_out:
        files_named = f"{left_out} file{'s' if left_out > 1 else ''} named *_seg or *_label"
        notes.append(f"{files_named} left out: results, not scans")
    return Found(tuple(cases), tuple(notes))


def identity(path: Path) -> tuple[int, int] | str:
    """What two names of one file share: device and inode, or the absolute path of a file that does not exist."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return str(path)
    return found.st_dev, found.st_ino


@dataclass(frozen=True, slots=True)
class _File:
    """A volume, and the folder that its name is relative to."""

    path: Path
    base: Path

    def name(self, stem: str) -> str:
        """The case's name for a file name without suffix."""
        return (PurePosixPath(self.path.parent.relative_to(self.base)) / stem).as_posix()


def _expand(path: Path, text: str, *, recursive: bool, avoid: Path | None) -> list[_File]:
    """The volumes that one input names, sorted."""
    absolute = path.absolute()  # links are kept: their names may be better than those of what they lead to
    if path.is_dir():
        files = [_File(one, absolute) for one in _walk(absolute, recursive=recursive, avoid=avoid) if _is_scan(one)]
        series = [
            _File(one, absolute.parent if one == absolute else absolute)
            for one in _dicom_folders(absolute, recursive=recursive, avoid=avoid)
        ]
        return sorted(files + series, key=lambda file: file.path)
    if path.exists() or path.is_symlink():
        return [_File(absolute, absolute.parent)]
    if not glob.has_magic(text):
        raise InputError(path, "no such file or folder", "check the path")
    parts = Path(text).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:fixed]).absolute()
    matches = sorted(base.glob(str(Path(*parts[fixed:]))))
    kept = [one for one in matches if not _inside(one, base, avoid) and (_is_scan_file(one) or _holds_dicom(one))]
    if not kept:
        raise InputError(text, f"no scan fits this pattern; {len(matches)} other files do", "check the pattern")
    return [_File(one, base) for one in kept]


def _inside(path: Path, base: Path, avoid: Path | None) -> bool:
    """Whether a file lies in the folder to avoid; never when that is the searched folder itself."""
    return avoid is not None and avoid != base.resolve() and path.resolve().is_relative_to(avoid)


def _walk(root: Path, *, recursive: bool, avoid: Path | None) -> Iterator[Path]:
    """Files of a folder; links to folders are followed, each folder once."""
    seen = {identity(root)}
    for folder, folders, files in os.walk(root, followlinks=True):
        here = Path(folder)
        yield from (here / name for name in files)
        inner = []
        for name in sorted(folders) if recursive else ():
            mark = identity(here / name)
            if not name.startswith(".") and mark not in seen and (here / name).resolve() != avoid:
                seen.add(mark)
                inner.append(name)
        folders[:] = inner


def _dicom_folders(root: Path, *, recursive: bool, avoid: Path | None) -> list[Path]:
    """The folders that are a DICOM case each, with all below them.

    The root itself when DICOM files lie in it; else those of its subfolders that hold DICOM anywhere, or, in a
    recursive search, the topmost folders in which DICOM files lie.
    """
    if _holds_dicom(root, below=False):
        return [root]
    if not recursive:
        inner = sorted(one for one in root.iterdir() if one.is_dir() and not one.name.startswith("."))
        return [one for one in inner if one.resolve() != avoid and _holds_dicom(one)]
    found: list[Path] = []
    for file in _walk(root, recursive=True, avoid=avoid):
        folder = file.parent
        if not any(folder.is_relative_to(one) for one in found[-1:]) and _is_image(file):
            found.append(folder)
    return found


def _holds_dicom(folder: Path, *, below: bool = True) -> bool:
    """Whether a folder has a DICOM image, in itself or anywhere below."""
    return folder.is_dir() and any(_is_image(file) for file in _walk(folder, recursive=below, avoid=None))


def _is_image(path: Path) -> bool:
    """Whether a file is DICOM, and neither hidden nor a result of medseg."""
    stem, suffix = split_suffix(path)
    # Closing any handle of a SQLite file drops the locks of this process on it, and another one may then remove what
    # was not yet written back: a database is not even looked into.
    if ".sqlite" in path.name:
        return False
    if path.name.startswith(".") or _is_scan(path) or (suffix.lower() == ".dcm" and _RESULT.search(stem)):
        return False
    return path.is_file() and is_dicom(path)


def _is_scan_file(path: Path) -> bool:
    """Whether a pattern means this file: a volume, or a DICOM file named so."""
    return path.is_file() and (_is_scan(path) or (path.suffix.lower() == ".dcm" and _is_image(path)))


def _is_scan(path: Path) -> bool:
    return split_suffix(path)[1].lower() in SCAN_SUFFIXES and not path.name.startswith(".")


def label_map_of(scan: Path) -> Path | None:
    """The label map beside a scan that is called as the scan, or as its case: CASE_label.nii.gz; None without one."""
    for stem in _stems(scan):
        for suffix in VOLUME_SUFFIXES:
            if (found := scan.with_name(f"{stem}{_LABEL}{suffix}")).is_file():
                return found
    return None


def _is_output(path: Path) -> bool:
    """Whether the name is one that medseg gives to its results."""
    stem, suffix = split_suffix(path)
    return suffix.lower() in {".nii", ".nii.gz"} and stem.endswith(_RESULTS)


def _scan_of(path: Path) -> tuple[Path, str] | None:
    """Folder and name of the scan that a result or a label map belongs to; None of any other file."""
    stem = split_suffix(path)[0]
    endings = (*_RESULTS, _LABEL) if _is_output(path) else (_LABEL,)
    ending = next((one for one in endings if stem.endswith(one)), None)
    return None if ending is None else (path.parent, stem.removesuffix(ending))


def _stems(scan: Path) -> list[str]:
    """What the files of a scan are called after: its name, and that of its case where it is one channel of several."""
    stem = case_name(scan)
    numbered = _CHANNEL.fullmatch(stem)
    return [stem, numbered[1]] if numbered else [stem]


def _single(file: _File) -> Case:
    return Case(file.name(case_name(file.path)), (file.path,))


def _grouped(files: Iterable[_File], channels: int, *, partial: bool) -> list[Case]:
    """Cases of files CASE_0000, CASE_0001 ...; a file without such a number holds all channels itself."""
    groups: dict[tuple[Path, str], dict[int, _File]] = {}
    cases: list[Case] = []
    for file in files:
        stem = case_name(file.path)
        if numbered := _CHANNEL.fullmatch(stem):
            group = groups.setdefault((file.path.parent, numbered[1]), {})
            other = group.setdefault(int(numbered[2]), file)
            if identity(other.path) != identity(file.path):
                raise UsageError(file.path, f"the same channel as {other.path.name}", "keep one of the two")
        else:
            cases.append(_single(file))
    for (_, stem), group in groups.items():
        numbers = sorted(group)
        missing = sorted(set(range(channels)) - set(numbers))
        problem = ""
        if missing and not partial:
            problem = f"channel {', '.join(f'_{number:04}' for number in missing)} is missing"
        elif len(numbers) > channels:
            problem = _channel_count(len(numbers), channels, partial=partial)
        cases.append(Case(group[numbers[0]].name(stem), tuple(group[number].path for number in numbers), problem))
    return sorted(cases, key=lambda case: case.name)


def _channel_count(count: int, channels: int, *, partial: bool) -> str:
    """The problem with this many files; none for one file, which may hold all channels."""
    fits = count in {1, channels} or (partial and count < channels)
    return "" if fits else f"{count} files; the bundle takes {channels}"


def _without_repeats(cases: Sequence[Case]) -> tuple[list[Case], list[str]]:
    """Each scan once; of several names for one file the one that is no link counts."""
    kept: dict[tuple[tuple[int, int] | str, ...], Case] = {}
    repeats: list[tuple[str, str]] = []
    for case in cases:
        key = tuple(identity(scan) for scan in case.scans)
        first = kept.setdefault(key, case)
        if first is case or first == case:
            continue
        if first.scans[0].is_symlink() and not case.scans[0].is_symlink():
            kept[key], first, case = case, case, first
        if first.name != case.name:
            repeats.append((case.name, first.name))
    notes = [f"{name} is the same scan as {first}; computed once" for name, first in repeats[:_NAMED]]
    if len(repeats) > _NAMED:
        notes.append(f"{len(repeats) - _NAMED} more names of scans that are computed once")
    return list(kept.values()), notes


def _check_names(cases: Sequence[Case]) -> None:
    """Refuse two different scans whose outputs would have one name."""
    first: dict[str, Case] = {}
    for case in cases:
        other = first.setdefault(case.name, case)
        if other is not case:
            raise UsageError(
                f"{case.name}_seg.nii.gz",
                f"would be made of {other.scans[0]} and of {case.scans[0]}",
                'quote the pattern ("data/*/ct.nii.gz"), or name the cases in a CSV manifest',
            )
