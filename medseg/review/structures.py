"""What stands in the tables beside the viewer: structures and lesions of a version, measured once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.evaluation.volumes import label_boxes, label_statistics
from medseg.io.files import sha256_of
from medseg.io.read import read_volume
from medseg.review.compare import Segmentation, read_segmentation
from medseg.review.derived import HEAVY_WORK, pictured
from medseg.review.masks import Lesion, lesions
from medseg.review.store.repo import Store

KEPT = 128
"""How many segmentations' measurements stay in memory."""

_known: OrderedDict[tuple[Any, ...], Measurements] = OrderedDict()


@dataclass(frozen=True, slots=True)
class Structure:
    """One label of a segmentation.

    Attributes:
        value: the label.
        name: its name.
        voxels: how many.
        volume_ml: volume in millilitres.
        mean: of the image's values in it, Hounsfield units for CT; None without a voxel.
        sd: their standard deviation.
        components: connected pieces; voxels that share a face, an edge or a corner are connected.
        centroid_mm: mean of the voxels' centres, RAS mm; None without a voxel.
        bounding_box: first and last index along each axis of the array, both inclusive; None without a voxel.
    """

    value: int
    name: str
    voxels: int
    volume_ml: float
    mean: float | None
    sd: float | None
    components: int
    centroid_mm: tuple[float, float, float] | None
    bounding_box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None


@dataclass(frozen=True, slots=True)
class Measurements:
    """Structures by value, and their pieces.

    Attributes:
        structures: a row for each label of the table, found or not.
        lesions: the largest piece of the lowest label first.
        unit: of the means: "HU" for CT, else "".
    """

    structures: tuple[Structure, ...]
    lesions: tuple[Lesion, ...]
    unit: str


def structures(
    labels: NDArray[np.integer],
    image: NDArray[np.floating],
    affine: NDArray[np.float64],
    names: Mapping[int, str],
) -> list[Structure]:
    """Measure the labels of a table.

    Args:
        labels: (X, Y, Z).
        image: the scan (X, Y, Z).
        affine: voxel index to RAS mm, (4, 4).
        names: value to name.
    """
    boxes = label_boxes(labels)
    found = []
    for row in label_statistics(labels, affine, names):
        mean = sd = None
        if row.voxels:
            box = boxes[row.value]
            values = image[box][labels[box] == row.value]
            mean, sd = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
        found.append(
            Structure(
                row.value,
                row.name,
                row.voxels,
                row.volume_ml,
                mean,
                sd,
                row.components,
                row.centroid_mm,
                row.bounding_box,
            )
        )
    return found


def measurements(store: Store, found: Segmentation) -> Measurements:
    """Measure a segmentation of a case; the second call for the same bytes costs nothing.

    The uncertainty is that of the prediction itself, or of the one that the version started from.

    Raises:
        InputError, MemoryBudgetError: image or label map cannot be read.
    """
    case = store.case(found.case_id)
    prediction = None
    if found.kind == "prediction":
        prediction = store.prediction(found.id)
    elif found.kind in {"version", "draft"}:
        mask = store.mask(found.id)
        prediction = store.origin(found.case_id, mask.revision if mask.kind == "saved" else mask.base_revision)
    uncertainty = prediction.uncertainty_path if prediction else ""
    table = tuple(found.names.items()) or tuple((row.value, row.name) for row in store.labels(found.case_id))
    image = pictured(case, prediction)
    key = (sha256_of(store.file(found.path)), case.image_sha256, image, uncertainty, table)
    with HEAVY_WORK:
        if key not in _known:
            labels, names = read_segmentation(store, found)
            volume = read_volume(store.file(image))
            unsure = read_volume(store.file(uncertainty)).data[0] if uncertainty else None
            while len(_known) >= KEPT:
                _known.popitem(last=False)
            _known[key] = Measurements(
                tuple(structures(labels, volume.data[0], volume.affine, names)),
                tuple(lesions(labels, volume.affine, names, uncertainty=unsure)),
                "HU" if case.modality == "CT" else "",
            )
        return _known[key]
