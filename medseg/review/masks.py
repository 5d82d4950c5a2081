"""Masks: from the browser's bytes to a NIfTI file on the image's grid, and what is measured on them."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, UsageError
from medseg.evaluation.dice import dice, volume_error_percent
from medseg.evaluation.volumes import label_boxes, voxel_volume_ml
from medseg.io.files import sha256_of
from medseg.io.geometry import AxisOrder, spacing, world
from medseg.io.read import read_labels
from medseg.io.volume import Source, Volume
from medseg.io.write import OutputSet, write_labels

SCREEN_VALUES = 255
"""How many labels a drawing of the viewer can hold."""

MOST_LESIONS = 500
"""How many pieces of a label are measured: the largest ones."""

_GZIP = 31


@dataclass(frozen=True, slots=True)
class Lesion:
    """A connected piece of a label; voxels that share a face, an edge or a corner are connected.

    Attributes:
        number: from 1, the largest piece of the lowest label first.
        value: the label.
        name: the label's name.
        voxels: how many.
        volume_ml: volume in millilitres.
        centroid_mm: mean of the voxels' centres, RAS mm.
        voxel: index (i, j, k) of the piece's voxel nearest to the centroid, in the file's order.
        axial_diameter_mm: longest distance between the centres of two of its voxels in one axial slice; 0 for one.
        max_uncertainty: largest value of the uncertainty map in it, None without a map.
    """

    number: int
    value: int
    name: str
    voxels: int
    volume_ml: float
    centroid_mm: tuple[float, float, float]
    voxel: tuple[int, int, int]
    axial_diameter_mm: float
    max_uncertainty: float | None


@dataclass(frozen=True, slots=True)
class Overlap:
    """One label in two masks.

    Attributes:
        dice: None when neither mask holds the label.
        difference_percent: of the second's volume, None when the second is empty.
    """

    value: int
    name: str
    dice: float | None
    first_ml: float
    second_ml: float
    difference_percent: float | None


def screen_values(values: Iterable[int]) -> dict[int, int]:
    """Value on the screen of each label: its own where all fit a drawing, else 1, 2, 3, ... in their order.

    Raises:
        UsageError: more labels than a drawing can hold.
    """
    ordered = sorted(set(values) - {0})
    if not ordered or ordered[-1] <= SCREEN_VALUES:
        return {value: value for value in ordered}
    if len(ordered) > SCREEN_VALUES:
        raise UsageError("labels", f"{len(ordered)} of them; {SCREEN_VALUES} can be edited", "show them read-only")
    return {value: place for place, value in enumerate(ordered, start=1)}


def decode(body: bytes, shape: Sequence[int], screen: Mapping[int, int]) -> NDArray[np.integer]:
    """Labels of a drawing that the browser sent.

    Args:
        body: gzip of one byte a voxel, x fastest, in the image file's order of axes.
        shape: (X, Y, Z) of the image.
        screen: label value to value on the screen, background left out.

    Returns:
        (X, Y, Z) of the smallest unsigned type that holds all labels of the table.

    Raises:
        InputError: not gzip, damaged, more or fewer voxels than the image has, or a label outside the table.
    """
    wanted = math.prod(shape)
    packed = zlib.decompressobj(_GZIP)
    try:
        raw = packed.decompress(body, wanted + 1)
    except zlib.error as err:
        raise InputError("mask", "not gzip, or damaged on the way", "save it again") from err
    if len(raw) != wanted or not packed.eof or packed.unused_data:
        found = "more" if len(raw) > wanted else f"{len(raw)}"
        raise InputError("mask", f"{found} of {wanted} voxels", "reload the case, then save it again")
    table = np.full(256, -1, dtype=np.int64)
    table[0] = 0
    for value, shown in screen.items():
        table[shown] = value
    drawn = np.frombuffer(raw, dtype=np.uint8)
    unknown = np.flatnonzero((np.bincount(drawn, minlength=256) > 0) & (table < 0))
    if unknown.size:
        listed = ", ".join(str(value) for value in unknown[:5])
        raise InputError("mask", f"labels outside the case's table ({listed})", "use the labels of the table")
    kind = np.min_scalar_type(max(screen, default=0))
    return table.astype(kind)[drawn].reshape(tuple(shape), order="F")


def encode(labels: NDArray[np.integer], screen: Mapping[int, int]) -> bytes:
    """The gzip of a drawing: what `decode` takes; labels outside the table become background."""
    return gzip.compress(to_screen(labels, screen).tobytes(order="F"), compresslevel=1, mtime=0)


def to_screen(labels: NDArray[np.integer], screen: Mapping[int, int]) -> NDArray[np.uint8]:
    """Labels (X, Y, Z) with the values that the viewer draws."""
    highest = int(labels.max(initial=0))
    table = np.zeros(max(highest, *screen, 0) + 1 if screen else highest + 1, dtype=np.uint8)
    for value, shown in screen.items():
        table[value] = shown
    drawn: NDArray[np.uint8] = table[labels]
    return drawn


def write_grid(path: Path, image: Volume) -> Path:
    """Write an empty label map on an image's grid: the header that all masks of the case copy, quick to read."""
    return write_labels(path, np.zeros(image.shape, dtype=np.uint8), image)


def write_mask(path: Path, labels: NDArray[np.integer], grid: Path, values: Iterable[int]) -> str:
    """Write a mask beside a grid file, never over another one.

    Args:
        path: a name that does not exist yet.
        labels: (X, Y, Z).
        grid: from `write_grid`: affine, qform, sform and their codes are copied from it field by field.
        values: of the label table, so that the integer type is the same for all versions.

    Returns:
        SHA-256 of the file's bytes.

    Raises:
        OutputError: it exists or cannot be written; nothing is left behind.
        InputError: the grid cannot be read.
    """
    write_labels(path, labels, _grid_volume(grid), names=dict.fromkeys(values, ""))
    return sha256_of(path)


def write_map(path: Path, values: NDArray[np.floating], grid: Path) -> Path:
    """Write a map (X, Y, Z) of values in [0, 1], such as an uncertainty, beside a grid file, never over another one.

    Raises:
        OutputError: it exists or cannot be written; nothing is left behind.
        InputError: the grid cannot be read.
    """
    with OutputSet() as files:
        return files.add_fractions(path, values, _grid_volume(grid))


def changed_voxels(before: NDArray[np.integer] | None, after: NDArray[np.integer]) -> int:
    """How many voxels differ; without a mask before, how many are labelled."""
    return int(np.count_nonzero(after if before is None else before != after))


def lesions(
    labels: NDArray[np.integer],
    affine: NDArray[np.float64],
    names: Mapping[int, str],
    *,
    uncertainty: NDArray[np.floating] | None = None,
) -> list[Lesion]:
    """Measure the connected pieces of each label, the largest of a label first.

    Args:
        labels: (X, Y, Z).
        affine: voxel index to RAS mm, (4, 4).
        names: value to name of the labels to measure.
        uncertainty: map (X, Y, Z).
    """
    from scipy import ndimage

    order = AxisOrder.to_canonical(affine)
    sizes = spacing(order.affine(affine, labels.shape))
    voxel_ml = voxel_volume_ml(affine)
    found: list[Lesion] = []
    for value, box in sorted(label_boxes(labels).items()):
        if value not in names:
            continue
        pieces, count = ndimage.label(labels[box] == value, structure=np.ones((3, 3, 3), dtype=bool))
        voxels = np.bincount(pieces.ravel(), minlength=count + 1)
        places = ndimage.find_objects(pieces)
        start = np.array([axis.start for axis in box])
        for piece in sorted(range(1, count + 1), key=lambda one: -int(voxels[one]))[:MOST_LESIONS]:
            place = places[piece - 1]
            mask = pieces[place] == piece
            index = np.argwhere(mask) + start + [axis.start for axis in place]
            centre = index.mean(axis=0)
            nearest = index[np.argmin((((index - centre) * spacing(affine)) ** 2).sum(axis=1))]
            x, y, z = (float(mm) for mm in world(affine, centre))
            i, j, k = (int(one) for one in nearest)
            found.append(
                Lesion(
                    number=len(found) + 1,
                    value=value,
                    name=names[value],
                    voxels=int(voxels[piece]),
                    volume_ml=int(voxels[piece]) * voxel_ml,
                    centroid_mm=(x, y, z),
                    voxel=(i, j, k),
                    axial_diameter_mm=_axial_diameter(order.apply(mask), sizes),
                    max_uncertainty=None if uncertainty is None else float(uncertainty[tuple(index.T)].max()),
                )
            )
    return found


def compare(
    first: NDArray[np.integer], second: NDArray[np.integer], affine: NDArray[np.float64], names: Mapping[int, str]
) -> list[Overlap]:
    """Dice and volumes of each label of a table in two masks on one grid.

    Raises:
        InputError: the masks have different shapes.
    """
    if first.shape != second.shape:
        raise InputError("masks", f"shapes {first.shape} and {second.shape}", "compare masks of one image")
    voxel_ml = voxel_volume_ml(affine)
    boxes = [label_boxes(labels) for labels in (first, second)]
    result = []
    for value in sorted(names):
        if value == 0:
            continue
        own = [box[value] for box in boxes if value in box]
        if not own:
            result.append(Overlap(value, names[value], None, 0.0, 0.0, None))
            continue
        region = tuple(slice(min(a.start for a in axis), max(a.stop for a in axis)) for axis in zip(*own, strict=True))
        a, b = first[region] == value, second[region] == value
        a_ml, b_ml = (voxel_ml * int(np.count_nonzero(one)) for one in (a, b))
        percent = volume_error_percent(a_ml, b_ml) if b_ml else None
        result.append(Overlap(value, names[value], dice(a, b), a_ml, b_ml, percent))
    return result


def read_mask(path: Path, shape: Sequence[int]) -> tuple[NDArray[np.integer], NDArray[np.float64]]:
    """A mask (X, Y, Z) of a case and its affine.

    Raises:
        InputError: it cannot be read, or is not of the image's shape.
    """
    labels, affine = read_labels(path)
    if labels.shape != tuple(shape):
        raise InputError(path.name, f"shape {labels.shape}, but the image has {tuple(shape)}", "use its own mask")
    return labels, affine


def _grid_volume(grid: Path) -> Volume:
    """A volume with a grid file's header, and voxels that take no memory."""
    import nibabel as nib

    try:
        image: Any = nib.load(grid)
    except (OSError, nib.filebasedimages.ImageFileError) as err:
        raise InputError(grid.name, "the case's grid cannot be read", "import the case again") from err
    x, y, z = image.shape
    nothing = np.broadcast_to(np.float32(0), (1, x, y, z))
    return Volume(nothing, np.asarray(image.affine, np.float64), Source(grid, "nifti", image.header))


def _axial_diameter(mask: NDArray[np.bool_], sizes: NDArray[np.float64]) -> float:
    """Longest distance (mm) between voxel centres of a canonical mask (X, Y, Z) within one slice of Z."""
    longest = 0.0
    for level in range(mask.shape[2]):
        columns = np.flatnonzero(mask[:, :, level].any(axis=1))
        if not columns.size:
            continue
        plane = mask[columns, :, level]
        # The two ends of each column hold the farthest pair: a voxel between them is nearer to everything.
        low, high = plane.argmax(axis=1), plane.shape[1] - 1 - plane[:, ::-1].argmax(axis=1)
        x = columns * sizes[0]
        dx = x[:, None] - x[None, :]
        dy = np.maximum(np.abs(high[:, None] - low[None, :]), np.abs(low[:, None] - high[None, :])) * sizes[1]
        longest = max(longest, float(np.sqrt(dx**2 + dy**2).max()))
    return longest
