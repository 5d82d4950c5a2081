"""Cached cases and the endless, restartable stream of training batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from medseg.bundles.spec import BundleSpec, SliceSpec
from medseg.errors import InputError
from medseg.inference.preprocess import model_grid, preprocess, to_model_grid
from medseg.inference.resample import resample_linear
from medseg.inference.slices import cubic_zoom_matrix, nearest_zoom_index
from medseg.inference.sliding_window import pad_to_window
from medseg.io.read import read_labels, read_volume
from medseg.io.volume import Volume
from medseg.training.augment import crop_size, foreground_indices, seeds
from medseg.training.dataset import GRID_TOLERANCE, CaseFiles, grid_shift
from medseg.training.losses import IGNORE
from medseg.training.rank import ALONE, Rank

_ROUNDING = 0.01  # of probabilities that were stored in 16 bits


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case in memory.

    Attributes:
        name: the case's name.
        image: (C, X', Y', Z') float32 on the model grid, not padded.
        label: (X', Y', Z') uint8 on the model grid, `IGNORE` where nothing was annotated.
        soft: (K - 1, X', Y', Z') float16 on the model grid, the probability of each label above 0 that the network
            shall learn instead of the label map; None: it learns the label map.
    """

    name: str
    image: Tensor
    label: Tensor
    soft: Tensor | None = None


@dataclass(frozen=True)
class SoftLabels:
    """Probability maps of the training cases, see `TrainingConfig.soft_labels`.

    Attributes:
        folder: holds CASE_seg_probabilities.nii.gz of each case.
        share: of the maps in the target, 0 to 1; the label map has the rest.
    """

    folder: Path
    share: float

    def of(self, case: CaseFiles) -> Path:
        """The maps of a case."""
        return self.folder / f"{case.name}_seg_probabilities.nii.gz"

    def check(self, cases: Sequence[CaseFiles]) -> None:
        """Look whether each case has its maps.

        Raises:
            InputError: the first that has none.
        """
        for case in cases:
            if not self.of(case).is_file():
                remedy = "medseg batch --probabilities writes it; or --soft-labels none"
                raise InputError(self.of(case), "no such file", remedy)


def cache_case(
    case: CaseFiles, spec: BundleSpec, ignore: int | None = None, soft: SoftLabels | None = None
) -> CachedCase:
    """Read and preprocess one case exactly as inference does.

    Args:
        case: the files.
        spec: preprocessing and labels.
        ignore: label value of voxels that were not annotated; they become `IGNORE`.
        soft: probability maps to learn beside the label map.

    Raises:
        InputError: unreadable, grids that differ, a label value that dataset.json does not name, or maps that hold
            no probabilities of the labels.
    """
    volume = read_volume(case.images if len(case.images) > 1 else case.images[0], channels=spec.in_channels)
    labels, affine = read_labels(case.label)
    if labels.shape != volume.shape:
        raise InputError(case.label, f"grid {labels.shape} differs from its image's {volume.shape}", "resample it")
    if (shift := grid_shift(volume.shape, volume.affine, affine)) > GRID_TOLERANCE:
        raise InputError(case.label, f"its grid lies {shift:.2g} voxels off its image", "resample it")
    values = [*spec.labels, *([] if ignore is None else [ignore])]
    unknown = sorted(set(np.unique(labels).tolist()) - set(values))
    if unknown:
        raise InputError(case.label, f"label values {unknown} are not in dataset.json", "name them there")
    numbers = np.searchsorted(values, labels)
    numbered = to_model_grid(numbers, volume.affine, replace(spec, labels=dict.fromkeys(range(len(values)), "")))
    kept = torch.tensor([*spec.labels, *([] if ignore is None else [IGNORE])], dtype=torch.uint8)
    label = kept[numbered.long()]
    target = None
    if soft is not None:
        mixed = _mixed(labels, list(spec.labels)[1:], volume, soft.of(case), soft.share)
        grid = model_grid(volume.shape, volume.affine, spec)
        target = resample_linear(grid.order.apply(mixed), grid.shape, grid.step).masked_fill(label == IGNORE, 0).half()
    return CachedCase(case.name, preprocess(volume, spec).image, label, target)


def _mixed(
    labels: NDArray[np.integer], values: Sequence[int], volume: Volume, path: Path, share: float
) -> NDArray[np.float32]:
    """Probability (K - 1, X, Y, Z) of each label above 0, on the scan's grid: the label map's and that of the maps."""
    maps = read_volume(path, channels=len(values) + 1)
    if maps.shape != volume.shape or grid_shift(volume.shape, volume.affine, maps.affine) > GRID_TOLERANCE:
        raise InputError(path, "lies on another grid than its case", "write it with medseg batch --probabilities")
    if maps.data.min() < -_ROUNDING or abs(maps.data.sum(axis=0) - 1).max() > _ROUNDING:
        raise InputError(path, "holds no probabilities: they do not sum to 1", "medseg batch --probabilities writes it")
    drawn = np.stack([labels == value for value in values]).astype(np.float32)
    return share * maps.data[1:] + (1 - share) * drawn


class CropStream(Dataset[dict[str, Any]]):
    """Training crops by number: crop n is the same crop in every run with the same seed.

    Cases come in a new random order each epoch; the random state of each crop follows from its number, so
    a run that was stopped goes on as if it had not been, with any number of workers.
    """

    def __init__(self, cases: Sequence[CachedCase], spec: BundleSpec, transform: Compose, seed: int) -> None:
        self._items = [self._padded(case, spec) for case in cases]
        self._transform, self._seed = transform, seed
        self._target = torch.int64 if cases[0].soft is None else torch.float32

    @staticmethod
    def _padded(case: CachedCase, spec: BundleSpec) -> dict[str, Any]:
        image, label = case.image, case.label[None]
        if case.soft is not None:
            label = torch.cat((label, case.soft))
        if spec.slices is not None:
            image, label = _beyond_the_ends(*_stretched(image, label, spec), spec.slices)
        image, _ = pad_to_window(image, crop_size(spec), spec.padding, spec.padding_value)
        label, _ = pad_to_window(label, crop_size(spec), "constant", 0)
        label, soft = label[:1], label[1:].float()
        foreground, background = foreground_indices(label.numpy())
        if case.soft is not None:
            label = torch.cat(((label != IGNORE) * (1 - soft.sum(dim=0, keepdim=True)), soft))
        return {"image": image, "label": label, "fg": foreground, "bg": background}

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, position = divmod(number, len(self._items))
        order = np.random.default_rng([self._seed, 1, epoch]).permutation(len(self._items))
        self._transform.set_random_state(seed=seeds(self._seed, [number])[0])
        crop = self._transform(dict(self._items[int(order[position])]))
        crop = crop[0] if isinstance(crop, list) else crop
        image, label = (torch.as_tensor(np.asarray(crop[key])) for key in ("image", "label"))
        return {"image": image.to(torch.float32), "label": label.to(self._target)}


def _stretched(image: Tensor, label: Tensor, spec: BundleSpec) -> tuple[Tensor, Tensor]:
    """Whole slices at the window's size, as inference stretches them; image (C, X, Y, Z) and label (1, X, Y, Z)."""
    if spec.slices is None or spec.slices.resize == "none":
        return image, label
    for axis, size in enumerate(spec.roi_size, start=1):
        have = image.shape[axis]
        if axis == spec.slices.axis + 1 or have == size:
            continue
        matrix = cubic_zoom_matrix(have, size, zero_past_end=spec.slices.resize == "published").to(torch.float32)
        image = torch.tensordot(image, matrix, dims=([axis], [1])).movedim(-1, axis)
        index = nearest_zoom_index(have, size)
        taken = label.index_select(axis, index.clamp(min=0))
        view = [-1 if dim == axis else 1 for dim in range(4)]
        label = taken.masked_fill((index < 0).reshape(view), 0)
    return image.contiguous(), label.contiguous()


def _beyond_the_ends(image: Tensor, label: Tensor, slices: SliceSpec) -> tuple[Tensor, Tensor]:
    """Room for the neighbours of the outermost slices, which are repeated; nothing is labelled there."""
    reach, axis = slices.reach, slices.axis + 1
    if not reach:
        return image, label
    index = torch.arange(-reach, image.shape[axis] + reach)
    inside = index.clamp(0, image.shape[axis] - 1)
    view = [-1 if dim == axis else 1 for dim in range(4)]
    outside = (index != inside).reshape(view)
    return image.index_select(axis, inside), label.index_select(axis, inside).masked_fill(outside, 0)


class _Share(Sampler[int]):
    """The numbers of one rank's crops: of each global batch of `size` crops its part, from step `first` on."""

    def __init__(self, first: int, size: int, rank: Rank) -> None:
        self._first, self._size, self._rank = first, size, rank

    def __iter__(self) -> Iterator[int]:
        part = self._size // self._rank.count
        for step in count(self._first):
            begin = step * self._size + self._rank.number * part
            yield from range(begin, begin + part)


def batches(
    stream: CropStream, batch_size: int, *, first_step: int, workers: int, rank: Rank = ALONE
) -> Iterator[dict[str, Tensor]]:
    """Batches from step `first_step` on: ``image`` (B, C, *size) float32 and ``label`` (B, 1, *size) int64.

    The size is that of the network: (D, H, W), or (h, w) of slices.

    Args:
        stream: the crops by number.
        batch_size: crops of a step, over all ranks.
        first_step: steps that were done before.
        workers: processes that prepare crops.
        rank: whose part of each batch is wanted.
    """
    loader: DataLoader[dict[str, Any]] = DataLoader(
        stream,
        batch_size=batch_size // rank.count,
        sampler=_Share(first_step, batch_size, rank),
        num_workers=workers,
        persistent_workers=False,
    )
    return iter(loader)


def cache_cases(
    cases: Sequence[CaseFiles],
    spec: BundleSpec,
    progress: Callable[[int, int], None] | None = None,
    *,
    ignore: int | None = None,
    soft: SoftLabels | None = None,
) -> list[CachedCase]:
    """`cache_case` for each, with progress (done, all)."""
    cached = []
    for done, case in enumerate(cases, start=1):
        cached.append(cache_case(case, spec, ignore, soft))
        if progress is not None:
            progress(done, len(cases))
    return cached
