"""A cohort of diagnosed patients against the truth, from the records and label maps that medseg infer or batch wrote.

A record of a bundle that segments only has no class; there the class is that of the largest lesion's label, which is
what a segmentation network alone can say of a patient.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, MedsegError
from medseg.evaluation.classification import Estimate, accuracy_gain, score_classification
from medseg.evaluation.detection import Detections, components, detect, froc
from medseg.evaluation.dice import dice
from medseg.evaluation.findings import LESION_ML
from medseg.evaluation.pairing import Failure
from medseg.evaluation.volumes import voxel_volume_ml
from medseg.io.geometry import Affine
from medseg.io.patients import PATIENTS, read_classes, read_patients
from medseg.io.read import read_labels

FALSE_POSITIVES = (0.125, 0.25, 0.5, 1.0, 2.0)
"""False lesions for each patient at which the sensitivity is stated."""

ORGAN = 1
"""Label of the organ; a higher one is a lesion, the class's number + 1."""

_ENDING = "_seg.json"
_FOLDERS = ("labelsTr", "labelsTs", "labels")
_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
_MIN_IOU = 0.1

Floats = NDArray[np.float64]
Labels = NDArray[np.integer]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Judged:
    """One patient.

    Attributes:
        case: the case's name.
        target: number of the true class.
        probabilities: (classes,) with all that was known; of a bundle that segments only, the shares of the classes
            in the largest lesion.
        without: (classes,) with age and sex unknown; None of a bundle that segments only.
        lesion_ml: volume of all lesions that were found.
        lesion_there: a lesion is in the reference's label map; None without a label map.
        organ_dice: NaN where neither map holds the organ, or without a label map.
        lesion_dice: the same of the lesions, whatever their type.
        detections: lesions one by one; None without a label map.
        flags: of the record.
        missing: what the record names as missing.
    """

    case: str
    target: int
    probabilities: Floats
    without: Floats | None
    lesion_ml: float
    lesion_there: bool | None = None
    organ_dice: float = math.nan
    lesion_dice: float = math.nan
    detections: Detections | None = None
    flags: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cohort:
    """Patients with their results.

    Attributes:
        classes: code to name; the first one is without a lesion.
        patients: those that could be judged.
        missing: cases without a record.
        failed: cases whose files cannot be read or do not fit together.
        disclaimers: what the records say of themselves.
    """

    classes: Mapping[str, str]
    patients: tuple[Judged, ...]
    missing: tuple[str, ...] = ()
    failed: tuple[Failure, ...] = ()
    disclaimers: tuple[str, ...] = ()


def judge_cohort(
    prediction: Path, reference: Path, *, cases: Collection[str] | None = None, progress: Progress | None = None
) -> Cohort:
    """Hold a folder of records against a data set.

    Args:
        prediction: folder with CASE_seg.json and CASE_seg.nii.gz.
        reference: folder of the data set: patients.csv with the column class, dataset.json with ``classes``, and label
            maps in labelsTr or labelsTs where there are any.
        cases: only these; None: all of patients.csv.
        progress: called before each case with the number done, the number of all, and the case's name.

    Raises:
        InputError: a folder or table is not there or cannot be read, or a class that dataset.json does not name.
    """
    if not prediction.is_dir():
        raise InputError(prediction, "no such folder", "give the folder that medseg batch wrote")
    classes = read_classes(reference)
    table = read_patients(reference / PATIENTS, classes=True)
    wanted = list(table) if cases is None else [case for case in table if case in set(cases)]
    if not wanted:
        raise InputError(reference / PATIENTS, "none of the cases has a row", "check the names")
    files = {path.relative_to(prediction).as_posix()[: -len(_ENDING)]: path for path in prediction.rglob(f"*{_ENDING}")}
    codes = list(classes)
    patients, missing, failed = [], [], []
    said: dict[str, None] = {}
    for done, case in enumerate(wanted):
        if progress is not None:
            progress(done, len(wanted), case)
        if table[case].code not in classes:
            known = f"dataset.json names {', '.join(classes)}"
            raise InputError(reference / PATIENTS, f"class {table[case].code!r} of {case}", known)
        if case not in files:
            missing.append(case)
            continue
        try:
            record = _read_record(files[case])
            found, affine = read_labels(files[case].with_name(files[case].name.replace(".json", ".nii.gz")))
            truth = _reference_labels(reference, case)
            patients.append(judge(case, codes.index(table[case].code), codes, record, found, affine, truth))
            said[str(record.get("disclaimer", ""))] = None
        except MedsegError as err:
            failed.append(Failure(case, str(err)))
    return Cohort(classes, tuple(patients), tuple(missing), tuple(failed), tuple(said))


def judge(
    case: str,
    target: int,
    codes: Sequence[str],
    record: Mapping[str, Any],
    found: Labels,
    affine: Affine,
    truth: tuple[Labels, Affine] | None,
) -> Judged:
    """Hold one patient's record and label map against the truth.

    Args:
        case: the case's name.
        target: number of the true class.
        codes: of the classes.
        record: as JSON.
        found: label map (X, Y, Z).
        affine: of its grid.
        truth: the reference's label map and affine; None: there is none.

    Raises:
        InputError: the record names other classes, or the grids differ.
    """
    voxel_ml = voxel_volume_ml(affine)
    lesion = found > ORGAN
    diagnosis = record.get("diagnosis")
    without: Floats | None = None
    if diagnosis is None:
        chances, scores = shares_of_largest(found, len(codes), voxel_ml), None
    else:
        if list(diagnosis["classes"]) != list(codes):
            raise InputError(case, f"its record has the classes {', '.join(diagnosis['classes'])}", "use one data set")
        chances = np.array([diagnosis["probabilities"][code] for code in codes])
        without = np.array([diagnosis["probabilities_without_metadata"][code] for code in codes])
        scores = {tuple(one["peak_voxel"]): float(one["confidence"]) for one in diagnosis["findings"]}
    judged: dict[str, Any] = {}
    if truth is not None:
        wanted, placed = truth
        if wanted.shape != found.shape or not np.allclose(placed, affine, atol=1e-2):
            raise InputError(case, f"grid {found.shape} differs from its reference's {wanted.shape}", "resample it")
        judged = {
            "lesion_there": bool((wanted > ORGAN).any()),
            "organ_dice": dice(found == ORGAN, wanted == ORGAN),
            "lesion_dice": dice(lesion, wanted > ORGAN),
            "detections": detect(_scored(lesion, voxel_ml, scores), wanted > ORGAN, threshold=0.0, min_iou=_MIN_IOU),
        }
    return Judged(
        case,
        target,
        chances,
        without,
        voxel_ml * int(np.count_nonzero(lesion)),
        flags=tuple(diagnosis["flags"]) if diagnosis is not None else (),
        missing=tuple(diagnosis["missing"]) if diagnosis is not None else (),
        **judged,
    )


def shares_of_largest(labels: Labels, classes: int, voxel_ml: float) -> Floats:
    """The class that a segmentation of typed lesions says: shares (classes,) of the types in its largest lesion.

    Lesions are connected parts of any type; without one of 0.3 ml or more the patient counts as healthy.

    Args:
        labels: (X, Y, Z), a lesion's label being its class's number + 1.
        classes: how many, the healthy one included.
        voxel_ml: volume of a voxel.
    """
    shares = np.zeros(classes)
    parts, count = components(labels > ORGAN, min_voxels=max(1, math.ceil(LESION_ML / voxel_ml)))
    if not count:
        shares[0] = 1.0
        return shares
    largest = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    kinds = np.bincount(labels[largest].astype(np.int64) - 1, minlength=classes)[:classes]
    return np.asarray(kinds / kinds.sum(), dtype=np.float64)


def summarise(patients: Sequence[Judged], codes: Sequence[str], *, resamples: int = 1000) -> dict[str, Any]:
    """The figures of a cohort, for JSON; values that are not defined are None.

    Raises:
        ValueError: no patients.
    """
    target = np.array([one.target for one in patients])
    known = np.stack([one.probabilities for one in patients])
    scores = score_classification(target, known, resamples=resamples)
    rows = scores.confusion.sum(axis=1)
    figures: dict[str, Any] = {
        "patients": len(patients),
        "accuracy": _estimate(scores.accuracy),
        "balanced_accuracy": _estimate(scores.balanced_accuracy),
        "mean_auc": _estimate(scores.mean_auc),
        "auc": {code: _estimate(value) for code, value in zip(codes, scores.auc, strict=True)},
        "recall": {
            code: _number(scores.confusion[number, number] / rows[number]) if rows[number] else None
            for number, code in enumerate(codes)
        },
        "confusion": {"classes": list(codes), "rows_truth_columns_named": scores.confusion.tolist()},
        "without_metadata": None,
        "gain_from_metadata": None,
    }
    blind = [one.without for one in patients if one.without is not None]
    if len(blind) == len(patients):
        unknown = np.stack(blind)
        without = score_classification(target, unknown, resamples=resamples)
        figures["without_metadata"] = {
            "accuracy": _estimate(without.accuracy),
            "balanced_accuracy": _estimate(without.balanced_accuracy),
            "mean_auc": _estimate(without.mean_auc),
        }
        figures["gain_from_metadata"] = _estimate(accuracy_gain(target, unknown, known, resamples=resamples))
    figures["dice"] = {
        "organ": _mean([one.organ_dice for one in patients]),
        "lesion": _mean([one.lesion_dice for one in patients if one.lesion_there]),
    }
    figures["lesion"] = _lesions(patients, known)
    figures["flags"] = {
        flag: sum(flag in one.flags for one in patients) for flag in ("organ_not_found", "disagreement")
    }
    absent = dict.fromkeys(what for one in patients for what in one.missing)
    figures["missing"] = {what: sum(what in one.missing for one in patients) for what in absent}
    return figures


def _lesions(patients: Sequence[Judged], known: Floats) -> dict[str, Any] | None:
    """Whether patients with and without a lesion are told apart, and lesions one by one; None without label maps."""
    if any(one.detections is None for one in patients):
        return None
    curve = froc([one.detections for one in patients if one.detections is not None])
    ill = np.array([bool(one.lesion_there) for one in patients])
    called = np.array([one.lesion_ml >= LESION_ML for one in patients])
    named = known.argmax(axis=1) > 0
    return {
        "patients_with_a_lesion": int(ill.sum()),
        "at_least_ml": LESION_ML,
        "sensitivity": _mean(called[ill].astype(float)),
        "specificity": _mean(1.0 - called[~ill]),
        "sensitivity_of_the_class": _mean(named[ill].astype(float)),
        "specificity_of_the_class": _mean(1.0 - named[~ill]),
        "min_iou": _MIN_IOU,
        "sensitivity_at_false_positives": {str(rate): _number(curve.at(rate)) for rate in FALSE_POSITIVES},
    }


def patient_table(patients: Sequence[Judged], codes: Sequence[str]) -> str:
    """One row for each patient as CSV."""
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    columns = ("case", "class", "named", "named_without_metadata", "organ_dice", "lesion_dice", "lesion_ml", "flags")
    rows.writerow((*columns, "missing", *(f"p_{code}" for code in codes)))
    for one in patients:
        rows.writerow(
            (
                one.case,
                codes[one.target],
                codes[int(one.probabilities.argmax())],
                "" if one.without is None else codes[int(one.without.argmax())],
                *("" if math.isnan(value) else f"{value:.4f}" for value in (one.organ_dice, one.lesion_dice)),
                f"{one.lesion_ml:.2f}",
                " ".join(one.flags),
                "; ".join(one.missing),
                *(f"{value:.4f}" for value in one.probabilities),
            )
        )
    return table.getvalue()


def _scored(lesion: NDArray[np.bool_], voxel_ml: float, scores: Mapping[Any, float] | None) -> Floats:
    """A map (X, Y, Z) that holds each lesion's score: the confidence in the record, else 1; small ones are left out."""
    parts, count = components(lesion, min_voxels=max(1, math.ceil(LESION_ML / voxel_ml)))
    values = np.ones(count + 1)
    values[0] = 0.0
    for peak, confidence in (scores or {}).items():
        if all(0 <= index < size for index, size in zip(peak, parts.shape, strict=True)) and parts[peak]:
            values[parts[peak]] = confidence
    return np.asarray(values[parts], dtype=np.float64)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise InputError(path, f"cannot be read as JSON ({err})", "compute the case again") from err
    if not isinstance(record, dict) or "labels" not in record:
        raise InputError(path, "not a record of medseg", "compute the case again")
    return record


def _reference_labels(root: Path, case: str) -> tuple[Labels, Affine] | None:
    """The label map of a case and its affine; None where there is none."""
    for folder in _FOLDERS:
        for suffix in _SUFFIXES:
            if (path := root / folder / f"{case}{suffix}").is_file():
                return read_labels(path)
    return None


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {key: _number(value) for key, value in asdict(estimate).items()}


def _mean(values: Sequence[float] | Floats) -> float | None:
    known = [float(value) for value in values if not math.isnan(value)]
    return _number(sum(known) / len(known)) if known else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)
