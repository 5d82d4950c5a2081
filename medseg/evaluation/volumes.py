"""Size, place and number of pieces of each label of a segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LabelStatistics:
    """Measurements of one label.

    Attributes:
        value: the label's value in the label map.
        name: the label's name.
        voxels: number of voxels.
        volume_ml: volume in millilitres.
        centroid_mm: mean position of the voxels' centres (x, y, z) in RAS millimetres; None when there is no voxel.
        bounding_box: first and last voxel index, both inclusive, of each axis of the array:
            ((x0, x1), (y0, y1), (z0, z1)); None when there is no voxel.
        components: number of connected pieces; voxels that share a face, an edge or a corner are connected.
    """

    value: int
    name: str
    voxels: int
    volume_ml: float
    centroid_mm: tuple[float, float, float] | None
    bounding_box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None
    components: int


def voxel_volume_ml(affine: NDArray[np.float64]) -> float:
    """Volume of one voxel in millilitres; exact for oblique and sheared grids too."""
    return float(abs(np.linalg.det(np.asarray(affine, dtype=np.float64)[:3, :3]))) / 1000.0


def label_boxes(labels: NDArray[np.integer], *, highest: int = 0) -> dict[int, tuple[slice, slice, slice]]:
    """Bounding box of each label that a map holds, in one pass.

    Args:
        labels: label map (X, Y, Z) of an integer type, no negative values.
        highest: look only at values up to this one; at all when 0.
    """
    from scipy import ndimage  # a quarter of a second that only a measurement pays

    native = labels.astype(labels.dtype.newbyteorder("="), copy=False)  # scipy reads no foreign byte order
    boxes: list[tuple[slice, ...] | None] = list(ndimage.find_objects(native, max_label=highest))
    return {value: (box[0], box[1], box[2]) for value, box in enumerate(boxes, 1) if box is not None}


def label_statistics(
    labels: NDArray[np.integer], affine: NDArray[np.float64], names: Mapping[int, str]
) -> list[LabelStatistics]:
    """Measure the labels of a table.

    Args:
        labels: label map (X, Y, Z) of an integer type.
        affine: voxel index to RAS millimetres, (4, 4).
        names: name of each value to measure; 0 is background and is left out. Values of the map that are not in the
            table are not measured.

    Returns:
        One entry for each label of the table, by increasing value. A label that the map does not hold has no voxels,
        no components, and neither centroid nor bounding box.

    Raises:
        ValueError: `labels` is not three-dimensional or not of an integer type, or a value of `names` is negative.
    """
    from scipy import ndimage

    if labels.ndim != 3 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers (X, Y, Z), got {labels.dtype} {labels.shape}")
    values = sorted(value for value in names if value != 0)
    if not values:
        return []
    if values[0] < 0:
        raise ValueError(f"label values must not be negative, got {values[0]}")
    affine = np.asarray(affine, dtype=np.float64)
    voxel_ml = voxel_volume_ml(affine)
    boxes = label_boxes(labels, highest=values[-1])
    structure = np.ones((3, 3, 3), dtype=bool)
    result: list[LabelStatistics] = []
    for value in values:
        box = boxes.get(value)
        if box is None:
            result.append(LabelStatistics(value, names[value], 0, 0.0, None, None, 0))
            continue
        mask = labels[box] == value
        voxels = int(np.count_nonzero(mask))
        centre = np.array([_mean_index(mask, axis) + box[axis].start for axis in range(3)])
        x, y, z = (float(c) for c in affine[:3, :3] @ centre + affine[:3, 3])
        bx, by, bz = ((int(s.start), int(s.stop) - 1) for s in box)
        components: int = ndimage.label(mask, structure=structure)[1]
        result.append(
            LabelStatistics(value, names[value], voxels, voxels * voxel_ml, (x, y, z), (bx, by, bz), components)
        )
    return result


def _mean_index(mask: NDArray[np.bool_], axis: int) -> float:
    """Mean index of the true voxels of a mask (X, Y, Z) along one axis."""
    others = tuple(a for a in range(3) if a != axis)
    counts = np.count_nonzero(mask, axis=others).astype(np.float64)
    return float(counts @ np.arange(counts.size) / counts.sum())
