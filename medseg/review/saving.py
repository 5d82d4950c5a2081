"""Saving a version: the file first, then its row; whoever comes second keeps a draft."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, UsageError
from medseg.io.write import write_bytes
from medseg.review.masks import changed_voxels, decode, read_mask, write_mask
from medseg.review.store.models import User, new_id
from medseg.review.store.repo import Conflict, NewMask, Saved, Store

LARGEST_SCREEN = 8192
"""Pixels along the longer side of a picture of the viewer."""


def save_drawing(
    store: Store, case_id: str, body: bytes, *, base_revision: int, by: User, draft_id: str | None = None
) -> Saved | Conflict:
    """Save what the browser sent as a new version.

    Args:
        store: the store.
        case_id: the case.
        body: see `medseg.review.masks.decode`.
        base_revision: the version that was edited; 0 for none.
        by: the author.
        draft_id: the open draft that this settles.

    Raises:
        InputError: no such case or version, or a body that is not a mask of it. PermissionError: a reader may not.
        OutputError: the file cannot be written.
    """
    case = store.case(case_id)
    screen = {row.value: row.screen_value for row in store.labels(case_id)}
    labels = decode(body, case.shape, screen)
    return save_labels(store, case_id, labels, base_revision=base_revision, by=by, draft_id=draft_id)


def save_labels(
    store: Store,
    case_id: str,
    labels: NDArray[np.integer],
    *,
    base_revision: int,
    by: User,
    prediction_id: str | None = None,
    restored_from: int | None = None,
    draft_id: str | None = None,
) -> Saved | Conflict:
    """Save a label map (X, Y, Z) as a new version; see `Store.add_version`."""
    case = store.case(case_id)
    values = [row.value for row in store.labels(case_id)]
    before = None
    if base_revision > 0:
        before, _ = read_mask(store.file(store.version(case_id, base_revision).path), case.shape)
    mask_id = new_id()
    path = store.folder / case_id / f"mask_r{base_revision + 1:04}_{mask_id}.nii.gz"
    sha256 = write_mask(path, labels, store.file(case.grid_path), values)
    mask = NewMask(mask_id, path, sha256, changed_voxels(before, labels))
    try:
        return store.add_version(
            case_id,
            mask,
            base_revision=base_revision,
            by=by,
            prediction_id=prediction_id,
            restored_from=restored_from,
            draft_id=draft_id,
        )
    except (PermissionError, ValueError):
        _forget(path)
        raise


def restore(store: Store, case_id: str, revision: int, *, base_revision: int, by: User) -> Saved | Conflict:
    """Bring back an older version as a new one.

    Raises:
        InputError: no such version. PermissionError: a reader may not.
    """
    old, _ = read_mask(store.file(store.version(case_id, revision).path), store.case(case_id).shape)
    return save_labels(store, case_id, old, base_revision=base_revision, by=by, restored_from=revision)


def save_draft(store: Store, draft_id: str, *, base_revision: int, by: User) -> Saved | Conflict:
    """Make a draft a version on top of the current one.

    Raises:
        InputError: no such draft. PermissionError: a reader may not.
    """
    draft = store.mask(draft_id)
    labels, _ = read_mask(store.file(draft.path), store.case(draft.case_id).shape)
    return save_labels(store, draft.case_id, labels, base_revision=base_revision, by=by, draft_id=draft_id)


def adopt(store: Store, prediction_id: str, *, base_revision: int, by: User) -> Saved | Conflict:
    """Make a model's prediction the current version.

    Raises:
        UsageError: its labels are not those of the case's table.
        InputError: no such prediction. PermissionError: a reader may not.
    """
    made = store.prediction(prediction_id)
    table = {str(row.value): row.name for row in store.labels(made.case_id)}
    if {value: name for value, name in made.labels.items() if value != "0"} != table:
        raise UsageError(made.model, "has other labels than the case's table", "compare it instead")
    labels, _ = read_mask(store.file(made.mask_path), store.case(made.case_id).shape)
    return save_labels(store, made.case_id, labels, base_revision=base_revision, by=by, prediction_id=prediction_id)


def save_screenshot(store: Store, case_id: str, body: bytes, *, by: User) -> Path:
    """Keep a picture of the viewer; reports on the version that is current now show it.

    Args:
        store: the store.
        case_id: the case.
        body: a PNG file.
        by: who took it.

    Returns:
        Where it lies, see `screenshots`.

    Raises:
        InputError: no such case, or no PNG of a screen's size. OutputError: it cannot be written.
    """
    from PIL import Image, UnidentifiedImageError

    case = store.case(case_id)
    try:
        with Image.open(io.BytesIO(body), formats=["PNG"]) as picture:
            if max(picture.size) > LARGEST_SCREEN:
                problem = f"{picture.size[0]} x {picture.size[1]} pixels, at most {LARGEST_SCREEN} a side"
                raise InputError("picture", problem, "make the window smaller")
            drawn = picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as err:
        raise InputError("picture", "not a PNG file, or damaged", "take it again") from err
    packed = io.BytesIO()
    drawn.save(packed, format="PNG")  # pixels only: no text that came with them
    content = packed.getvalue()
    path = store.folder / case_id / f"screenshot_r{case.revision:04}_{new_id()}.png"
    write_bytes(path, content)
    detail = {"revision": case.revision, "sha256": hashlib.sha256(content).hexdigest()}
    store.note(by, "screenshot", case_id=case_id, detail=detail)
    return path


def screenshots(store: Store, case_id: str, revision: int) -> list[Path]:
    """The pictures that were taken of a version, oldest first."""
    found = (store.folder / case_id).glob(f"screenshot_r{revision:04}_*.png")
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _forget(path: Path) -> None:
    """Remove a file that no row will name."""
    path.unlink(missing_ok=True)
