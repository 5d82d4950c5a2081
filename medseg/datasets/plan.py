"""What a data set will hold, decided from the names in its source before anything is copied."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medseg.datasets.source import Source
from medseg.errors import InputError


@dataclass(frozen=True)
class About:
    """A data set as its site describes it.

    Attributes:
        name: what `medseg data prepare` calls it.
        title: its name.
        modality: "CT", "MRI" or both.
        cases: labelled cases that the site hands out, for training and, where labels are public, for testing.
        site: where it comes from, by name.
        licence: the terms, as the site states them.
        size: of the download, roughly.
        split: the published split that split.json holds, or why there is none.
        bundles: bundles whose recipe it is for.
    """

    name: str
    title: str
    modality: str
    cases: str
    site: str
    licence: str
    size: str
    split: str
    bundles: tuple[str, ...] = ()


@dataclass(frozen=True)
class CasePlan:
    """One case to be made.

    Attributes:
        name: its name in the folder that is made.
        images: names in the source, one for each channel, or one file of all channels.
        label: the label map's name in the source.
    """

    name: str
    images: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Plan:
    """A data set to be made.

    Attributes:
        title: its name in dataset.json.
        channels: name of each channel.
        labels: value to name, 0 (background) included.
        cases: by name.
        licence: for dataset.json.
        reference: credit, for dataset.json.
        remap: value in the source to value in the folder, all others become 0; None leaves the values as they are.
        parts: the published split; empty where none is published.
        expected: how many cases the site hands out.
    """

    title: str
    channels: tuple[str, ...]
    labels: Mapping[int, str]
    cases: tuple[CasePlan, ...]
    licence: str
    reference: str
    remap: Mapping[int, int] | None = None
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    expected: int | None = None


def match(source: Source, pattern: str) -> dict[tuple[str, ...], str]:
    """Files whose whole name matches: what the groups hold, to the name.

    Raises:
        InputError: two files match with the same groups.
    """
    found: dict[tuple[str, ...], str] = {}
    for name in sorted(source.sizes):
        if hit := re.fullmatch(pattern, name):
            groups = tuple(hit.groups())
            if groups in found:
                raise InputError(source.path, f"{found[groups]} and {name} are the same case", "give one copy alone")
            found[groups] = name
    return found


def complete(source: Source, cases: Sequence[CasePlan | tuple[str, list[str]]]) -> tuple[CasePlan, ...]:
    """The cases, if none lacks a file.

    Args:
        source: named in errors.
        cases: plans, and in their place (case, missing files) where one cannot be made.

    Raises:
        InputError: there is no case at all, or files are missing.
    """
    missing = [entry for entry in cases if not isinstance(entry, CasePlan)]
    if missing:
        name, files = missing[0]
        more = f", and {len(missing) - 1} more cases lack files" if len(missing) > 1 else ""
        raise InputError(source.path, f"case {name} lacks {', '.join(files)}{more}", "complete the download")
    if not cases:
        raise InputError(
            source.path, "holds no labelled case of this data set", "see medseg data list and docs/data.md"
        )
    plans = [entry for entry in cases if isinstance(entry, CasePlan)]
    return tuple(sorted(plans, key=lambda plan: plan.name))
