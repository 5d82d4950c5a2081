"""What the training data look like, and the preprocessing that follows from it (as nnU-Net's fingerprint does)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.bundles.spec import (
    IntensityStep,
    NormalizeIntensity,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
    Suitability,
)
from medseg.errors import InputError
from medseg.io import geometry
from medseg.io.read import read_labels, read_volume
from medseg.training.dataset import CaseFiles, Dataset

_ROI_MULTIPLE = 32
_ROI_LIMIT = 128
_FOREGROUND_SAMPLES = 10_000


@dataclass(frozen=True)
class Fingerprint:
    """Geometry and intensity of a set of cases, on canonical (RAS) axes.

    Attributes:
        spacing: (cases, 3) mm.
        shape: (cases, 3) voxels.
        minimum: smallest value of each case after a z-score, for the padding value.
        foreground: sampled intensities inside the labels, in the scans' units.
    """

    spacing: np.ndarray
    shape: np.ndarray
    minimum: np.ndarray
    foreground: np.ndarray

    @property
    def extent(self) -> np.ndarray:
        """Field of view of each case, (cases, 3) mm."""
        extent: np.ndarray = self.spacing * self.shape
        return extent


def fingerprint(
    dataset: Dataset, cases: Sequence[CaseFiles], progress: Callable[[int, int], None] | None = None
) -> Fingerprint:
    """Read every case once and measure it.

    Raises:
        InputError: a case cannot be read, its image and label map have different shapes, or nothing is labelled.
    """
    spacings, shapes, minima, foreground = [], [], [], []
    random = np.random.default_rng(0)
    for done, case in enumerate(cases, start=1):
        volume = read_volume(case.images if len(case.images) > 1 else case.images[0], channels=len(dataset.channels))
        labels, _ = read_labels(case.label)
        if labels.shape != volume.shape:
            raise InputError(case.label, f"grid {labels.shape} differs from its image's {volume.shape}", "resample it")
        order = geometry.AxisOrder.to_canonical(volume.affine)
        spacings.append(geometry.spacing(order.affine(volume.affine, volume.shape)))
        shapes.append(order.shape(volume.shape))
        deviation = volume.data.std(dtype=np.float64) or 1.0
        minima.append((volume.data.min() - volume.data.mean(dtype=np.float64)) / deviation)
        inside = volume.data[0][(labels > 0) & (labels != (-1 if dataset.ignore is None else dataset.ignore))]
        if inside.size:
            foreground.append(random.choice(inside, min(inside.size, _FOREGROUND_SAMPLES), replace=False))
        if progress is not None:
            progress(done, len(cases))
    if not foreground:
        raise InputError(dataset.root, "no voxel of the training cases has a label", "check labelsTr/")
    return Fingerprint(np.array(spacings), np.array(shapes), np.array(minima), np.concatenate(foreground))


def derive_spacing(found: Fingerprint) -> tuple[float, float, float]:
    """Voxel size of the model grid: the median; for thick slices the 10th percentile of that axis (nnU-Net's rule)."""
    spacing = np.median(found.spacing, axis=0)
    coarse = int(np.argmax(spacing))
    if spacing[coarse] > 3 * np.delete(spacing, coarse).max():
        spacing[coarse] = np.percentile(found.spacing[:, coarse], 10)
    x, y, z = (round(float(value), 4) for value in spacing)
    return x, y, z


def derive_roi(found: Fingerprint, spacing: Sequence[float]) -> tuple[int, int, int]:
    """Sliding window: the median size on the model grid to the nearest multiple of 32, from 32 to 128 voxels.

    Networks with five halvings need one axis of 64 or more; where all are 32, the longest becomes 64.
    """
    median = np.median(found.extent / np.asarray(spacing), axis=0)
    roi = np.clip(np.round(median / _ROI_MULTIPLE), 1, _ROI_LIMIT // _ROI_MULTIPLE).astype(int) * _ROI_MULTIPLE
    if (roi == _ROI_MULTIPLE).all():
        roi[int(np.argmax(median))] = 2 * _ROI_MULTIPLE
    x, y, z = (int(value) for value in roi)
    return x, y, z


def derive_intensity(
    found: Fingerprint, modality: str, wanted: str | None = None
) -> tuple[tuple[IntensityStep, ...], float]:
    """Intensity steps and the padding value that goes with them.

    CT has a scale of its own (HU): clipped to the 0.5 and 99.5 percentiles inside the labels and mapped to
    [0, 1]; padding is the lower bound. Anything else: z-score over the volume; padding is the median of the
    cases' smallest values, so that a padded border looks like the darkest tissue or air.

    Args:
        found: the training cases.
        modality: "CT" or another.
        wanted: instead of the rule: ``zscore``, ``range:LOW,HIGH`` (the scan's units) or ``percentiles:LOW,HIGH``.

    Raises:
        ValueError: `wanted` is none of these.
    """
    if wanted is None:
        low, high = (float(value) for value in np.percentile(found.foreground, [0.5, 99.5]).round(1))
        wanted = f"range:{low},{high}" if modality == "CT" else "zscore"
    padding = round(float(np.median(found.minimum)), 3) if wanted == "zscore" else 0.0
    return read_intensity(wanted), padding


def read_intensity(wanted: str) -> tuple[IntensityStep, ...]:
    """The intensity steps that a setting names; see `derive_intensity`.

    Raises:
        ValueError: it names none.
    """
    kind, _, bounds = wanted.partition(":")
    if wanted == "zscore":
        return (NormalizeIntensity(),)
    try:
        low, high = (float(value) for value in bounds.split(","))
    except ValueError:
        raise ValueError(f"{wanted!r} is not understood") from None
    if not low < high:
        raise ValueError(f"{wanted!r}: the first number must be below the second")
    if kind == "range":
        return (ScaleIntensityRange(low, high),)
    if kind == "percentiles" and low >= 0 and high <= 100:
        return (ScaleIntensityRangePercentiles(low, high),)
    raise ValueError(f"{wanted!r} is not understood")


def derive_suitability(found: Fingerprint, modality: str) -> Suitability:
    """The ranges that a scan is compared with before inference."""

    def bounds(values: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        low, high = values.min(axis=0).round(3).tolist(), values.max(axis=0).round(3).tolist()
        return (low[0], low[1], low[2]), (high[0], high[1], high[2])

    return Suitability(modality=modality, extent_mm=bounds(found.extent), spacing_mm=bounds(found.spacing))
