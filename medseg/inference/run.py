"""The straight line from a scan to a segmentation; every entry point of medseg goes through `infer`."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import medseg
from medseg.bundles.load import Bundle, load_bundle
from medseg.bundles.locate import DEFAULT_BUNDLE
from medseg.bundles.spec import BundleSpec
from medseg.errors import BundleError, MemoryBudgetError, UsageError
from medseg.evaluation.volumes import LabelStatistics, label_statistics
from medseg.inference.device import available_memory, choose_device
from medseg.inference.export import NotFiniteError
from medseg.inference.memory import memory_plan
from medseg.inference.preprocess import model_grid, preprocess
from medseg.inference.record import BundleRecord, InputRecord, LabelRecord, ParameterRecord, Record
from medseg.inference.segment import segment
from medseg.inference.suitability import unsuitable
from medseg.io import geometry
from medseg.io.read import read_volume
from medseg.io.volume import Volume
from medseg.io.write import reserve, write_labels

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, all); stages in order: bundle, read, preprocess, network, restore, measure."""


@dataclass(frozen=True)
class Result:
    """A segmentation on the scan's own grid.

    Attributes:
        label_map: (X, Y, Z), smallest sufficient unsigned integer type.
        affine: the scan's, (4, 4) float64.
        labels: value to name, background included.
        statistics: measurements of each label but the background.
        probabilities: (K, X, Y, Z) float32 when asked for, else None.
        record: how the result came about.
        volume: the scan.
    """

    label_map: NDArray[np.integer]
    affine: NDArray[np.float64]
    labels: Mapping[int, str]
    statistics: tuple[LabelStatistics, ...]
    probabilities: NDArray[np.float32] | None
    record: Record
    volume: Volume

    def with_outputs(self, written: Mapping[str, str]) -> Result:
        """The same result, its record naming the files that were written: kind to file name."""
        return replace(self, record=self.record.model_copy(update={"outputs": dict(written)}))

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the label map as NIfTI, whole or not at all.

        Raises:
            OutputError: it cannot be written, or exists. UsageError: the name does not end in .nii or .nii.gz.
        """
        target = reserve(Path(path), overwrite=overwrite, inputs=[self.volume.source.path])
        write_labels(target, self.label_map, self.volume, names=self.labels)
        return target.path


def infer(
    scan: str | Path | Sequence[str | Path],
    *,
    bundle: str | Path | Bundle = DEFAULT_BUNDLE,
    device: str = "auto",
    overlap: float | None = None,
    tta: bool = False,
    probabilities: bool = False,
    force: bool = False,
    volume_index: int | None = None,
    volume: Volume | None = None,
    progress: Progress | None = None,
) -> Result:
    """Segment one scan.

    Args:
        scan: a volume, or one file for each channel of the bundle.
        bundle: a bundle's name or folder, or a bundle from `load_bundle`.
        device: auto, cpu, cuda or cuda:N.
        overlap: share that neighbouring windows have in common, 0 to below 1; None takes the bundle's.
        tta: average over flips along the axes that the bundle allows.
        probabilities: keep the probability of each class on the scan's grid.
        force: go on with a scan that is not what the bundle was trained on; the record keeps the warning.
        volume_index: which volume of a 4D file, for a bundle of one channel.
        volume: what `read_volume` made of `scan`, when that is already done.
        progress: called as the work goes on.

    Returns:
        The segmentation with its measurements and its record.

    Raises:
        UsageError, InputError, BundleError, MemoryBudgetError, DeviceError: see `medseg.errors`.
    """
    report = progress or (lambda _stage, _done, _all: None)
    clock = _Clock(report)
    target = choose_device(device)
    with clock("bundle"):
        loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        spec = _spec(loaded, overlap, tta=tta)
        network = loaded.network().to(target)
    with clock("read"):
        if volume is None:
            volume = read_volume(scan, channels=spec.in_channels, volume_index=volume_index)
        warnings = list(volume.source.warnings)
        outside = unsuitable(volume, spec)
        if outside and not force:
            raise BundleError(
                volume.source.path,
                f"not what {loaded.name} was trained on: {'; '.join(outside)}",
                "use --force to go on",
            )
        warnings += outside
        flips = _flips(spec.mirror_axes if tta else ())
        _check_memory(volume, spec, flips=len(flips), keep=probabilities)
    with clock("preprocess"):
        case = preprocess(volume, spec)
    try:
        with clock("network"):
            found = segment(
                case,
                network,
                spec,
                target,
                flips=flips,
                probabilities=probabilities,
                progress=lambda done, windows: report("network", done, windows),
            )
    except NotFiniteError:
        raise BundleError(loaded.name, "produced NaN", "report it with the scan's intensity range") from None
    clock.split("network", found.network_s, "restore")
    labels = found.labels
    with clock("measure"):
        statistics = tuple(label_statistics(labels, volume.affine, spec.labels))
    if not any(entry.voxels for entry in statistics):
        warnings.append("no structure was found")
    record = Record(
        medseg=medseg.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        input=_input_record(scan, volume),
        bundle=BundleRecord(
            name=loaded.name,
            version=loaded.version,
            weights_sha256=loaded.sha256,
            network=spec.network,
            training_cases=loaded.metadata.get("medseg", {}).get("training_cases"),
        ),
        parameters=ParameterRecord(
            overlap=spec.overlap,
            roi_size=spec.roi_size,
            blend=spec.blend,
            tta=tta,
            flips=len(flips),
            forced=bool(outside),
        ),
        device=str(target),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        windows=found.windows,
        seconds=clock.seconds,
        warnings=tuple(warnings),
        labels=tuple(
            LabelRecord(**{key: getattr(entry, key) for key in LabelRecord.model_fields}) for entry in statistics
        ),
    )
    return Result(labels, volume.affine, spec.labels, statistics, found.probabilities, record, volume)


class _Clock:
    """Wall time of each stage."""

    def __init__(self, report: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._report = report

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._report(stage, 0, 1)
        begin = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - begin, 3)
        log.info("%s: %.3f s", stage, self.seconds[stage])
        self._report(stage, 1, 1)

    def split(self, stage: str, seconds: float, rest: str) -> None:
        """Give what a stage took beyond `seconds` to another one that ran at the same time."""
        self.seconds[rest] = round(max(self.seconds[stage] - seconds, 0.0), 3)
        self.seconds[stage] = round(seconds, 3)
        self._report(rest, 0, 1)
        self._report(rest, 1, 1)


def _spec(bundle: Bundle, overlap: float | None, *, tta: bool) -> BundleSpec:
    if tta and not bundle.spec.mirror_axes:
        raise UsageError("--tta", f"{bundle.name} allows no flips", "run it without --tta")
    if overlap is None:
        return bundle.spec
    if not 0 <= overlap < 1:
        raise UsageError("--overlap", f"{overlap} is not in [0, 1)", "0.5 is usual")
    return replace(bundle.spec, overlap=overlap)


def _flips(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every subset of the axes, the empty one first."""
    return [subset for size in range(len(axes) + 1) for subset in itertools.combinations(axes, size)]


def _check_memory(volume: Volume, spec: BundleSpec, *, flips: int, keep: bool) -> None:
    """Refuse a scan whose arrays cannot fit, before the first of them is made."""
    need = memory_plan(volume.shape, volume.affine, spec, flips=flips, probabilities=keep).total
    free = available_memory()
    log.debug("memory: %.2f GiB planned, %.2f GiB free", need / 2**30, free / 2**30)
    if need > free:
        grid = model_grid(volume.shape, volume.affine, spec)
        raise MemoryBudgetError(
            volume.source.path,
            f"needs about {need / 2**30:.1f} GiB on the model grid {grid.shape}, {free / 2**30:.1f} GiB are free",
            "crop the scan, or use a machine with more memory",
        )


def _input_record(scan: str | Path | Sequence[str | Path], volume: Volume) -> InputRecord:
    paths = [scan] if isinstance(scan, str | Path) else scan
    x, y, z = (round(float(value), 6) for value in geometry.spacing(volume.affine))
    return InputRecord(
        files=tuple(Path(path).name for path in paths),
        sha256=volume.source.sha256,
        format=volume.source.format,
        shape=volume.shape,
        spacing_mm=(x, y, z),
        orientation=geometry.orientation(volume.affine),
    )
