"""CSV manifests: a table that names the cases of a batch and their files."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import InputError, UsageError

_COLUMNS = "columns are case, image; or case, image_0, image_1 ... for several channels"


@dataclass(frozen=True, slots=True)
class Row:
    """One case of a manifest.

    Attributes:
        case: its name, "" when the manifest has no such column.
        images: absolute paths, one for each channel.
    """

    case: str
    images: tuple[Path, ...]


def read_manifest(path: Path) -> list[Row]:
    """Read a manifest; relative paths start at its own folder.

    Args:
        path: CSV, UTF-8, with a header: ``case`` (may be left out) and ``image``, or ``image_0``, ``image_1`` ...;
            other columns are ignored.

    Raises:
        InputError: it cannot be read. UsageError: columns, names or cells that make no case.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as err:
        raise InputError(path, f"cannot be read ({err.strerror or err})", "check the path") from err
    except UnicodeDecodeError as err:
        raise InputError(path, "not UTF-8 text", "save it as CSV in UTF-8") from err
    try:
        lines = list(csv.reader(text.splitlines(), strict=True))
    except csv.Error as err:
        raise UsageError(path, f"not a CSV table ({err})", _COLUMNS) from err
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    images = (
        ["image"]
        if "image" in header
        else sorted((cell for cell in header if re.fullmatch(r"image_\d+", cell)), key=lambda cell: int(cell[6:]))
    )
    if not images or len(set(header)) < len(header):
        separator = "; it is separated by semicolons" if any(";" in cell for cell in header) else ""
        raise UsageError(path, f"its header is {', '.join(header)[:80]!r}{separator}", _COLUMNS)
    places = [header.index(name) for name in images]
    named = header.index("case") if "case" in header else None
    folder = path.absolute().parent
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in line):
            continue
        if len(line) != len(header):
            raise UsageError(f"{path}, line {number}", f"{len(line)} cells, the header has {len(header)}", "correct it")
        cells = [line[place].strip() for place in places]
        if not all(cells):
            raise UsageError(f"{path}, line {number}", "an image is missing", "correct it")
        case = line[named].strip() if named is not None else ""
        if named is not None and (not case or case.startswith(".") or re.search(r"[/\\\x00-\x1f]", case)):
            raise UsageError(f"{path}, line {number}", f"{case!r} cannot be a file's name", "correct the case")
        rows.append(Row(case, tuple(folder / cell for cell in cells)))
    if not rows:
        raise UsageError(path, "no case in it", "add a line for each case")
    return rows
