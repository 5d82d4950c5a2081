"""Compare predicted label maps with references: scores for each case and label, and their summary."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, MedsegError
from medseg.evaluation.dice import dice, volume_error_percent
from medseg.evaluation.pairing import Failure, Pair, label_names, pair_cases
from medseg.evaluation.surface import hausdorff_95, surface_dice
from medseg.evaluation.volumes import label_boxes, voxel_volume_ml

Presence = Literal["both", "reference", "prediction", "neither"]
Metric = Literal["dice", "hd95_mm", "nsd", "volume_error_ml", "volume_error_percent"]
METRICS: tuple[Metric, ...] = ("dice", "hd95_mm", "nsd", "volume_error_ml", "volume_error_percent")
ReadLabels = Callable[[Path], tuple[NDArray[np.integer], NDArray[np.float64]]]

# Beyond this a file is taken for a scan given by mistake: no label map needs more values than 16 bits.
_MAX_LABEL = 65535


@dataclass(frozen=True, slots=True)
class LabelScores:
    """Scores of one label in one case; None where a score does not apply.

    Attributes:
        value: the label's value.
        name: the label's name.
        presence: which of the two label maps hold the label.
        dice: 0 to 1; None when neither map holds the label.
        hd95_mm: millimetres; infinite when just one map holds the label, None when neither does.
        nsd: 0 to 1; None when neither map holds the label.
        prediction_ml: predicted volume in millilitres.
        reference_ml: the reference's volume in millilitres.
        volume_error_ml: prediction minus reference, in millilitres.
        volume_error_percent: the same in percent of the reference; None when the reference does not hold the label.
    """

    value: int
    name: str
    presence: Presence
    dice: float | None
    hd95_mm: float | None
    nsd: float | None
    prediction_ml: float
    reference_ml: float
    volume_error_ml: float
    volume_error_percent: float | None


@dataclass(frozen=True, slots=True)
class CaseScores:
    """Scores of one case, one entry for each label of the evaluation."""

    case: str
    prediction: Path
    reference: Path
    labels: tuple[LabelScores, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """One metric of one label over all evaluated cases.

    Attributes:
        value: the label's value; None for the mean over labels within each case.
        name: the label's name, or "all labels".
        metric: which score.
        count: finite values that mean, median and std are taken of.
        infinite: cases left out of them because only one map holds the label (HD95 only).
        mean: arithmetic mean; None without a value.
        median: median; None without a value.
        std: sample standard deviation (n - 1); None with fewer than two values.
        worst: lowest Dice or NSD, largest HD95 (infinite counts), volume error of the largest magnitude.
        worst_case: the case it belongs to.
    """

    value: int | None
    name: str
    metric: Metric
    count: int
    infinite: int
    mean: float | None
    median: float | None
    std: float | None
    worst: float | None
    worst_case: str | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a folder of predictions.

    Attributes:
        prediction: folder or file of the predictions.
        reference: folder or file of the references.
        tolerance_mm: tolerance of NSD in millimetres.
        labels: value to name of the evaluated labels.
        cases: scores of the evaluated cases, by name.
        summary: for each label and metric; also over all labels when there is more than one.
        missing: cases without a prediction; they are in no mean.
        extra: predictions without a reference.
        failed: cases that could not be evaluated for another reason.
    """

    prediction: Path
    reference: Path
    tolerance_mm: float
    labels: dict[int, str]
    cases: tuple[CaseScores, ...]
    summary: tuple[Summary, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    failed: tuple[Failure, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """Everything as values for JSON; an infinite distance is null, `presence` or `infinite` tells it apart."""
        return {
            "prediction": str(self.prediction),
            "reference": str(self.reference),
            "tolerance_mm": self.tolerance_mm,
            "labels": [{"value": value, "name": name} for value, name in self.labels.items()],
            "cases": [
                {
                    "case": case.case,
                    "prediction": str(case.prediction),
                    "reference": str(case.reference),
                    "labels": [_finite(_fields(scores)) for scores in case.labels],
                }
                for case in self.cases
            ],
            "summary": [_finite(_fields(summary)) for summary in self.summary],
            "missing": list(self.missing),
            "extra": list(self.extra),
            "failed": [_fields(failure) for failure in self.failed],
        }

    def to_csv(self) -> str:
        """One row for each case and label; a score that does not apply is empty, an infinite distance is ``inf``."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = list(LabelScores.__dataclass_fields__)
        writer.writerow(["case", *columns])
        for case in self.cases:
            for scores in case.labels:
                writer.writerow([case.case, *(_cell(getattr(scores, column)) for column in columns)])
        return text.getvalue()


def evaluate(
    prediction: Path,
    reference: Path,
    *,
    read: ReadLabels,
    labels: Sequence[int] | None = None,
    tolerance_mm: float = 1.0,
    cases: Collection[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Score predicted label maps against references.

    Args:
        prediction: folder of predictions, or one file.
        reference: folder of references, or one file.
        read: reader of a label map: path to labels (X, Y, Z) and affine, as `medseg.io.read.read_labels`.
        labels: values to evaluate; all that occur in a file or in the data set's ``dataset.json`` when None. Its
            highest label, if it is called "ignore", marks voxels that are left out.
        tolerance_mm: tolerance of NSD in millimetres.
        cases: with folders, only these cases.
        progress: called before each case with the number done, the number of all, and the case's name.

    Returns:
        The scores. A case that cannot be read, or whose two grids differ, is an entry of `failed`.

    Raises:
        InputError: a path does not exist, or the reference folder holds no volume.
        UsageError: the two paths are not of one kind, or are the same.
        ValueError: the tolerance is negative or not finite, or a label is not positive.
    """
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise ValueError(f"tolerance_mm must be a finite number, 0 or more, got {tolerance_mm}")
    if labels is not None and any(value < 1 for value in labels):
        raise ValueError(f"labels must be 1 or more, got {list(labels)}")
    pairing = pair_cases(prediction, reference, cases=cases)
    table = label_names(reference)
    ignore = next((value for value, name in table.items() if name.lower() == "ignore" and value == max(table)), None)
    table = {value: name for value, name in table.items() if value != ignore}
    scored: list[tuple[Pair, dict[int, LabelScores]]] = []
    failed = list(pairing.failed)
    for done, pair in enumerate(pairing.pairs):
        if progress is not None:
            progress(done, len(pairing.pairs), pair.case)
        try:
            scored.append((pair, _score_pair(pair, read, labels, table, tolerance_mm, ignore)))
        except MedsegError as err:
            failed.append(Failure(pair.case, str(err)))
    values = set(labels) if labels is not None else set(table).union(*(scores for _, scores in scored))
    names = {value: _name(value, table) for value in sorted(values)}
    case_scores = tuple(
        CaseScores(
            pair.case,
            pair.prediction,
            pair.reference,
            tuple(scores.get(value) or _absent(value, name) for value, name in names.items()),
        )
        for pair, scores in scored
    )
    return Evaluation(
        prediction,
        reference,
        tolerance_mm,
        names,
        case_scores,
        tuple(summarise(case_scores)),
        pairing.missing,
        pairing.extra,
        tuple(sorted(failed, key=lambda failure: failure.case)),
    )


def compare_labels(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    affine: NDArray[np.float64],
    *,
    labels: Collection[int] | None = None,
    names: Mapping[int, str] | None = None,
    tolerance_mm: float = 1.0,
) -> dict[int, LabelScores]:
    """Score one label map against another on the same grid.

    Args:
        prediction: label map (X, Y, Z), values 0 to 65535.
        reference: label map (X, Y, Z), values 0 to 65535.
        affine: the grid's voxel index to RAS millimetres, (4, 4).
        labels: values to score; all when None.
        names: name of each value; ``label V`` where there is none.
        tolerance_mm: tolerance of NSD in millimetres.

    Returns:
        Scores by value, of the labels that at least one of the maps holds.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"label maps must have one shape, got {prediction.shape} and {reference.shape}")
    spacing = tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
    voxel_ml = voxel_volume_ml(affine)
    boxes = [label_boxes(array) for array in (prediction, reference)]
    found = sorted(set(boxes[0]) | set(boxes[1]))
    result: dict[int, LabelScores] = {}
    for value in found:
        if labels is not None and value not in labels:
            continue
        region = _around([box[value] for box in boxes if value in box])
        p, r = prediction[region] == value, reference[region] == value
        prediction_ml, reference_ml = (voxel_ml * int(np.count_nonzero(mask)) for mask in (p, r))
        presence: Presence = "both" if value in boxes[0] and value in boxes[1] else "reference"
        if value not in boxes[1]:
            presence = "prediction"
        result[value] = LabelScores(
            value,
            _name(value, names or {}),
            presence,
            dice(p, r),
            hausdorff_95(p, r, spacing),
            surface_dice(p, r, spacing, tolerance_mm=tolerance_mm),
            prediction_ml,
            reference_ml,
            prediction_ml - reference_ml,
            volume_error_percent(prediction_ml, reference_ml) if reference_ml > 0 else None,
        )
    return result


def summarise(cases: Sequence[CaseScores]) -> Iterator[Summary]:
    """Mean, median, spread and worst case of each metric: for each label, then over all labels.

    The mean over labels is taken within each case first, over the labels that apply to it; a case in which one label's
    HD95 is infinite is infinite.
    """
    if not cases:
        return
    for index, label in enumerate(cases[0].labels):
        for metric in METRICS:
            scores = [(case.case, _score(case.labels[index], metric)) for case in cases]
            yield _summary(label.value, label.name, metric, scores)
    if len(cases[0].labels) > 1:
        for metric in METRICS[:3]:
            scores = [(case.case, _case_mean(case, metric)) for case in cases]
            yield _summary(None, "all labels", metric, scores)


def _summary(value: int | None, name: str, metric: Metric, scores: Sequence[tuple[str, float | None]]) -> Summary:
    """Summarise (case, score) of one label and metric."""
    known = [(case, score) for case, score in scores if score is not None]
    finite = [score for _, score in known if math.isfinite(score)]
    worst_case, worst = None, None
    if known:
        higher_is_better = metric in ("dice", "nsd")
        worst_case, worst = max(known, key=lambda entry: -entry[1] if higher_is_better else abs(entry[1]))
    return Summary(
        value,
        name,
        metric,
        len(finite),
        len(known) - len(finite),
        statistics.fmean(finite) if finite else None,
        statistics.median(finite) if finite else None,
        statistics.stdev(finite) if len(finite) > 1 else None,
        worst,
        worst_case,
    )


def _score(scores: LabelScores, metric: Metric) -> float | None:
    """One score of a label; the volume error of a label that neither map holds says nothing and is left out."""
    if scores.presence == "neither":
        return None
    value: float | None = getattr(scores, metric)
    return value


def _case_mean(case: CaseScores, metric: Metric) -> float | None:
    """Mean of a metric over the labels of a case to which it applies."""
    values = [value for scores in case.labels if (value := _score(scores, metric)) is not None]
    return statistics.fmean(values) if values else None


def _score_pair(
    pair: Pair,
    read: ReadLabels,
    labels: Sequence[int] | None,
    names: Mapping[int, str],
    tolerance_mm: float,
    ignore: int | None,
) -> dict[int, LabelScores]:
    """Read and score one case; an InputError names what cannot be compared.

    Where the reference holds the value to be ignored, nothing is known, and both maps count as background.
    """
    prediction, prediction_affine = read(pair.prediction)
    reference, affine = read(pair.reference)
    for path, array in ((pair.prediction, prediction), (pair.reference, reference)):
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        if low < 0 or high > _MAX_LABEL:
            raise InputError(path, f"values from {low} to {high}; a label map is expected", "is this the scan?")
    _check_grids(pair, prediction.shape, prediction_affine, reference.shape, affine)
    if ignore is not None:
        known = reference != ignore
        prediction, reference = prediction * known, reference * known
    return compare_labels(prediction, reference, affine, labels=labels, names=names, tolerance_mm=tolerance_mm)


def _check_grids(
    pair: Pair,
    prediction_shape: tuple[int, ...],
    prediction_affine: NDArray[np.float64],
    reference_shape: tuple[int, ...],
    reference_affine: NDArray[np.float64],
) -> None:
    """Refuse two grids that are not the same one.

    Headers store affines as float32, and tools rewrite them through a quaternion; a corner may move by a tenth of a
    voxel and at most by 0.1 mm before the voxels stop being the same.
    """
    if prediction_shape != reference_shape:
        raise InputError(
            pair.prediction,
            f"shape {prediction_shape} differs from the reference's {reference_shape}",
            "segment on the reference's grid, or resample",
        )
    corners = np.array(np.meshgrid(*((0, n - 1) for n in reference_shape), [1])).reshape(4, -1)
    shift = float(np.linalg.norm(((prediction_affine - reference_affine) @ corners)[:3], axis=0).max())
    spacing = np.linalg.norm(reference_affine[:3, :3], axis=0)
    if not shift <= min(0.1, 0.1 * float(spacing.min())):
        raise InputError(
            pair.prediction,
            f"its voxels lie up to {shift:.3g} mm away from the reference's",
            "segment on the reference's grid, or resample",
        )


def _around(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box around boxes."""
    return tuple(
        slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in range(3)
    )


def _absent(value: int, name: str) -> LabelScores:
    """Scores of a label that neither map of a case holds."""
    return LabelScores(value, name, "neither", None, None, None, 0.0, 0.0, 0.0, None)


def _name(value: int, names: Mapping[int, str]) -> str:
    """A label's name."""
    return names.get(value, f"label {value}")


def _fields(record: LabelScores | Summary | Failure) -> dict[str, Any]:
    """Fields of a record by name."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _cell(value: object) -> object:
    """A value as a CSV cell: millionths are noise, nothing is an empty cell."""
    if isinstance(value, float):
        return round(value, 6)
    return "" if value is None else value


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with None for infinity, which JSON does not know."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
