"""Two segmentations of one case side by side: versions, drafts, models, the reference."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError
from medseg.io.files import sha256_of
from medseg.report.palette import label_colours
from medseg.review.derived import HEAVY_WORK, made_once
from medseg.review.masks import Overlap, compare, read_mask, screen_values, to_screen, write_mask
from medseg.review.store.models import Case, Label, Mask, Prediction
from medseg.review.store.repo import Store

REFERENCE = "reference"
"""`Segmentation.id` of a case's reference label map."""

ONLY_FIRST, ONLY_SECOND, BOTH, OTHER_LABEL = 1, 2, 3, 4
"""Values of a difference: labelled in one only, alike in both, labelled differently."""


@dataclass(frozen=True)
class Segmentation:
    """A label map of a case, whoever made it.

    Attributes:
        id: of the mask or the prediction, or `REFERENCE`.
        case_id: the case.
        kind: "version", "draft", "prediction" or "reference".
        title: for people.
        path: stored path, see `Store.file`.
        names: value to name where a model said so; empty: the case's label table holds.
    """

    id: str
    case_id: str
    kind: str
    title: str
    path: str
    names: Mapping[int, str]


def segmentations(store: Store, case_id: str) -> list[Segmentation]:
    """All label maps of a case: versions from the newest on, open drafts, predictions, the reference.

    Raises:
        InputError: no such case.
    """
    case = store.case(case_id)
    people = {user.id: user.display_name for user in store.users()}
    found = [_of_mask(mask, people.get(mask.author_id, "")) for mask in reversed(store.versions(case_id))]
    found += [_of_mask(mask, people.get(mask.author_id, "")) for mask in store.drafts(case_id)]
    found += [_of_prediction(prediction) for prediction in store.predictions(case_id)]
    return [*found, *_of_case(case)]


def segmentation(store: Store, case_id: str, name: str) -> Segmentation:
    """One label map of a case.

    Args:
        store: the store.
        case_id: the case.
        name: see `Segmentation.id`.

    Raises:
        InputError: no such case, or it has no such label map.
    """
    if name == REFERENCE:
        found = _of_case(store.case(case_id))
        if found:
            return found[0]
    else:
        try:
            mask = store.mask(name)
            if mask.case_id == case_id:
                return _of_mask(mask, store.user(mask.author_id).display_name)
        except InputError:
            prediction = store.prediction(name)
            if prediction.case_id == case_id:
                return _of_prediction(prediction)
    raise InputError("segmentation", "no such segmentation of this case", "reload the case")


def read_segmentation(store: Store, found: Segmentation) -> tuple[NDArray[np.integer], dict[int, str]]:
    """Labels (X, Y, Z) on the image's grid, and the name of each value that they hold or may hold.

    Raises:
        InputError: the file cannot be read.
    """
    labels, _ = read_mask(store.file(found.path), store.case(found.case_id).shape)
    names = _table(store, found)
    if found.kind == REFERENCE:
        for value in np.unique(labels[labels > 0]):
            names.setdefault(int(value), f"label {value}")
    return labels, names


def legend(store: Store, case_id: str, names: Mapping[int, str]) -> list[Label]:
    """How the labels of a table are drawn beside the case's own: one name has one colour and one value on the screen.

    Args:
        store: the store.
        case_id: the case.
        names: value to name.

    Returns:
        A row for each value.

    Raises:
        UsageError: more labels than the viewer can draw.
    """
    own = {row.name.casefold(): row for row in store.labels(case_id)}
    new = [value for value, name in sorted(names.items()) if value and name.casefold() not in own]
    taken = {row.screen_value for row in own.values()}
    free = [place for place in screen_values(range(1, len(own) + len(new) + 1)) if place not in taken]
    colours = label_colours(len(own) + len(new))[len(own) :]
    rows = []
    for value, name in sorted(names.items()):
        if value == 0:
            continue
        if name.casefold() in own:
            row = own[name.casefold()]
            red, green, blue, shown = row.r, row.g, row.b, row.screen_value
        else:
            (red, green, blue), shown = colours[new.index(value)], free[new.index(value)]
        rows.append(Label(case_id=case_id, value=value, name=name, r=red, g=green, b=blue, screen_value=shown))
    return rows


def shown_labels(store: Store, found: Segmentation) -> Path:
    """The file of a label map in the values that the viewer draws: see `legend`.

    Raises:
        InputError: it cannot be read. UsageError: too many labels. OutputError: it cannot be written.
    """
    case = store.case(found.case_id)
    path = store.file(found.path)
    names = read_segmentation(store, found)[1] if found.kind == REFERENCE else _table(store, found)
    screen = {row.value: row.screen_value for row in legend(store, found.case_id, names)}
    if all(value == shown for value, shown in screen.items()):
        return path

    def make(aside: Path) -> None:
        labels, _ = read_mask(path, case.shape)
        write_mask(aside, to_screen(labels, screen), store.file(case.grid_path), screen.values())

    return made_once(path.with_name(f"screen_{_digest(path.name, sorted(screen.items()))}.nii.gz"), make)


def overlaps(store: Store, case_id: str, first: str, second: str) -> list[Overlap]:
    """Dice and volumes of each label in two label maps of a case; labels are matched by their names.

    Args:
        store: the store.
        case_id: the case.
        first: see `Segmentation.id`.
        second: the other one.

    Raises:
        InputError: no such case or label map, or a file cannot be read.
    """
    case = store.case(case_id)
    with HEAVY_WORK:
        one, other, names = _aligned(store, case_id, first, second)
        _, affine = read_mask(store.file(case.grid_path), case.shape)
        return compare(one, other, affine, names)


def difference(
    first: NDArray[np.integer], second: NDArray[np.integer], *, value: int | None = None
) -> NDArray[np.uint8]:
    """Where two label maps of one shape differ.

    Args:
        first: labels (X, Y, Z).
        second: labels of the same meaning.
        value: look at this label alone.

    Returns:
        (X, Y, Z) of 0, `ONLY_FIRST`, `ONLY_SECOND`, `BOTH` and, without `value`, `OTHER_LABEL`.
    """
    one, other = (first > 0, second > 0) if value is None else (first == value, second == value)
    result = one.astype(np.uint8) * np.uint8(ONLY_FIRST) + other.astype(np.uint8) * np.uint8(ONLY_SECOND)
    if value is None:
        result[one & other & (first != second)] = OTHER_LABEL
    return result


def difference_file(store: Store, case_id: str, first: str, second: str, *, value: int | None = None) -> Path:
    """The difference of two label maps of a case as NIfTI (uint8) on its grid, made once.

    Args:
        store: the store.
        case_id: the case.
        first: see `Segmentation.id`.
        second: the other one.
        value: look at this label of the first one's table alone.

    Raises:
        InputError: no such case or label map, or a file cannot be read. OutputError: it cannot be written.
    """
    files = [store.file(segmentation(store, case_id, name).path) for name in (first, second)]
    name = f"difference_{_digest(*(sha256_of(file) for file in files), value)}.nii.gz"

    def make(path: Path) -> None:
        one, other, _ = _aligned(store, case_id, first, second)
        write_mask(path, difference(one, other, value=value), store.file(store.case(case_id).grid_path), (1, 2, 3, 4))

    return made_once(store.folder / case_id / name, make)


def _aligned(
    store: Store, case_id: str, first: str, second: str
) -> tuple[NDArray[np.integer], NDArray[np.integer], dict[int, str]]:
    """Two label maps in the values of the first one's table, to which names that only the second has are added."""
    one, names = read_segmentation(store, segmentation(store, case_id, first))
    other, theirs = read_segmentation(store, segmentation(store, case_id, second))
    if {value: name for value, name in theirs.items() if value} == {
        value: name for value, name in names.items() if value
    }:
        return one, other, names
    values = {name.casefold(): value for value, name in names.items()}
    table = np.zeros(max([0, *theirs, int(other.max())]) + 1, dtype=np.uint32)
    for value, name in theirs.items():
        if value == 0:
            continue
        if name.casefold() not in values:
            values[name.casefold()] = max([0, *names]) + 1
            names[values[name.casefold()]] = name
        table[value] = values[name.casefold()]
    return one, table.astype(np.min_scalar_type(max([0, *names])))[other], names


def _table(store: Store, found: Segmentation) -> dict[int, str]:
    """Value to name, as far as somebody gave them names."""
    return dict(found.names) or {row.value: row.name for row in store.labels(found.case_id)}


def _of_mask(mask: Mask, author: str) -> Segmentation:
    at = mask.created_at.isoformat(" ", "minutes")
    if mask.kind == "draft":
        return Segmentation(mask.id, mask.case_id, "draft", f"draft of {author}, {at}", mask.path, {})
    return Segmentation(mask.id, mask.case_id, "version", f"version {mask.revision}, {author}, {at}", mask.path, {})


def _of_prediction(made: Prediction) -> Segmentation:
    names = {int(value): str(name) for value, name in made.labels.items() if value != "0"}
    title = f"{made.model} {made.bundle_version}, {made.created_at.isoformat(' ', 'minutes')}"
    return Segmentation(made.id, made.case_id, "prediction", " ".join(title.split()), made.mask_path, names)


def _of_case(case: Case) -> list[Segmentation]:
    if not case.reference_path:
        return []
    return [Segmentation(REFERENCE, case.id, REFERENCE, "reference", case.reference_path, {})]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
