"""Files that follow from others: made when first asked for, complete or not there, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import OutputError
from medseg.io.geometry import Affine
from medseg.io.read import read_volume
from medseg.io.volume import Volume
from medseg.review.masks import read_mask
from medseg.review.store.models import Case, Prediction, new_id
from medseg.review.store.repo import Store

REDUCED = "reduced.nii.gz"
"""Name of the reduced image in a case's folder."""

LARGE_VOXELS = 12_000_000
"""Scans of more voxels get their reduced image when they are imported, so that nobody waits for it."""

HEAVY_WORK = threading.RLock()
"""Held while a whole scan is in memory, so that ten people who open cases do not need ten times the memory."""


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """A file that follows from others.

    Args:
        path: its name, which says what it was made from.
        make: writes it under the name that it is given, which ends as `path` does.

    Returns:
        `path`.

    Raises:
        OutputError: it cannot be written.
    """
    if path.exists():
        return path
    with HEAVY_WORK:
        if path.exists():
            return path
        aside = path.with_name(f".{new_id()}.{path.name}")
        try:
            make(aside)
            aside.replace(path)
        except OSError as err:
            raise OutputError(path.name, f"cannot be written ({err.strerror or err})", "check the data folder") from err
        finally:
            aside.unlink(missing_ok=True)
    return path


def reduced_image(store: Store, case: Case) -> Path:
    """A case's image, averaged by 2 along each axis: to look at while the full one is on its way.

    Raises:
        InputError, MemoryBudgetError: the image cannot be read. OutputError: it cannot be written.
    """
    path = store.folder / case.id / REDUCED
    return made_once(path, lambda aside: write_reduced(aside, read_volume(store.file(case.image_path))))


def write_reduced(path: Path, image: Volume) -> None:
    """Write the first channel of a scan, averaged by 2 along each axis."""
    data, affine = halved(image.data[0], image.affine)
    write_image(path, data, affine, whole=np.dtype(image.source.dtype or "f4").kind in "iu")


def write_image(path: Path, data: NDArray[np.float32], affine: Affine, *, whole: bool) -> None:
    """Write an image (X, Y, Z) to look at; with `whole` in whole numbers, as the scanner's are: half the size."""
    import nibabel

    nib: Any = nibabel
    fits = whole and np.abs(data).max() <= np.iinfo(np.int16).max
    nib.save(nib.Nifti1Image(np.rint(data).astype(np.int16) if fits else data, affine), path)


def pictured(case: Case, prediction: Prediction | None) -> str:
    """Stored path of the image that is looked at and measured: of several phases of a diagnosis the reference.

    Args:
        case: the case.
        prediction: that what is shown was made from; None without one.
    """
    if prediction is None or not prediction.phase_paths:
        return case.image_path
    name = next(phase["name"] for phase in prediction.record["diagnosis"]["phases"] if phase["reference"])
    return str(prediction.phase_paths[name])


def poster(store: Store, case: Case) -> Path:
    """A picture (PNG) of three planes of a case with its current version.

    Raises:
        InputError, MemoryBudgetError: image or mask cannot be read. OutputError: it cannot be written.
    """
    from medseg.report.preview import render_preview

    def make(path: Path) -> None:
        prediction = store.origin(case.id, case.revision) if case.revision else None
        volume = read_volume(store.file(pictured(case, prediction)))
        stored = store.version(case.id, case.revision).path if case.revision else case.grid_path
        labels, _ = read_mask(store.file(stored), case.shape)
        names = {row.value: row.name for row in store.labels(case.id)}
        path.write_bytes(render_preview(volume.data[0], labels, volume.affine, names, title=case.name))

    return made_once(store.folder / case.id / f"poster_r{case.revision:04}.png", make)


def halved(data: NDArray[np.float32], affine: Affine) -> tuple[NDArray[np.float32], Affine]:
    """Means of blocks of 2 x 2 x 2 voxels.

    Args:
        data: (X, Y, Z); a block at the end of an odd axis repeats the last voxel, an axis of one voxel stays.
        affine: voxel index to RAS mm.

    Returns:
        The means, ((X + 1) // 2, ...), and the affine that places each at the centre of its block.
    """
    steps = [min(2, size) for size in data.shape]
    total = np.zeros([-(-size // step) for size, step in zip(data.shape, steps, strict=True)], dtype=np.float32)
    for offset in product(*(range(step) for step in steps)):
        places = [
            np.minimum(np.arange(0, size, step) + shift, size - 1)
            for size, step, shift in zip(data.shape, steps, offset, strict=True)
        ]
        total += data[np.ix_(*places)]
    to_full = np.diag([*map(float, steps), 1.0])
    to_full[:3, 3] = [(step - 1) / 2 for step in steps]
    return total / np.float32(np.prod(steps)), affine @ to_full
