"""The split file: which cases belong to which part of a data set."""

from __future__ import annotations

import json
from pathlib import Path

from medseg.errors import InputError, UsageError
from medseg.io.files import VOLUME_SUFFIXES, split_suffix

_EXAMPLE = 'write {"train": ["case_1", ...], "val": [...]}'


def read_split(path: Path) -> dict[str, list[str]]:
    """Case names of each part, from a JSON object such as ``{"train": [...], "val": [...]}``.

    A name may carry the suffix of its file (``case_1.nii.gz``).

    Raises:
        InputError: not such an object, or a case stands in it twice.
    """
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(path, "no such file", "check the path") from None
    except OSError as err:
        raise InputError(path, f"cannot be read ({err.strerror or err})", "check the path") from err
    except ValueError as err:
        raise InputError(path, f"not JSON ({err})", _EXAMPLE) from err
    if not isinstance(parts, dict):
        raise InputError(path, "a split is a JSON object of parts", _EXAMPLE)
    for part, names in parts.items():
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise InputError(path, f"part {part!r} is not a list of case names", _EXAMPLE)
    split = {part: [_without_suffix(name) for name in names] for part, names in parts.items()}
    seen: dict[str, str] = {}
    for part, names in split.items():
        for name in names:
            if name in seen:
                where = (
                    f"twice in part {part!r}" if seen[name] == part else f"in two parts, {seen[name]!r} and {part!r}"
                )
                raise InputError(path, f"case {name} stands {where}", "name each case once")
            seen[name] = part
    return split


def read_part(path: Path, part: str) -> list[str]:
    """Case names of one part of a split file.

    Raises:
        InputError: as `read_split`, or the part is empty.
        UsageError: there is no such part.
    """
    split = read_split(path)
    if part not in split:
        raise UsageError(path, f"no part {part!r}; it has {', '.join(split) or 'none'}", "choose with --part")
    if not split[part]:
        raise InputError(path, f"part {part!r} names no case", "choose another with --part")
    return split[part]


def _without_suffix(name: str) -> str:
    stem, suffix = split_suffix(name)
    return stem if suffix.lower() in VOLUME_SUFFIXES else name
