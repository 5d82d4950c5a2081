"""How well a network diagnoses the patients of a data set: classes, lesions, boundaries, with and without metadata."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from medseg.bundles.load import Bundle
from medseg.errors import BundleError
from medseg.evaluation.classification import Estimate, accuracy_gain, score_classification
from medseg.evaluation.detection import Detections, detect, froc
from medseg.evaluation.dice import dice
from medseg.inference.diagnosis import LESION, LESION_ML, ORGAN, PatientData, PatientDiagnosis, diagnose
from medseg.networks.mdpformer import MDPFormer
from medseg.training.dataset import CaseFiles
from medseg.training.diagnosis import cache_patient
from medseg.training.patients import Patient

FALSE_POSITIVES = (0.125, 0.25, 0.5, 1.0, 2.0)
"""False candidates for each case at which the sensitivity is stated."""

_COLUMNS = ("case", "class", "named", "named_without_metadata", "organ_dice", "lesion_dice", "lesion_ml", "flags")


@dataclass(frozen=True)
class Assessed:
    """One patient.

    Attributes:
        case: the case's name.
        patient: the truth.
        found: the network's answer.
        organ_dice: NaN where neither map holds the organ.
        lesion_dice: NaN where neither map holds a lesion.
        lesion_there: the patient has a lesion.
        detections: lesions one by one.
    """

    case: str
    patient: Patient
    found: PatientDiagnosis
    organ_dice: float
    lesion_dice: float
    lesion_there: bool
    detections: Detections


def diagnosing_network(bundle: Bundle) -> tuple[MDPFormer, dict[str, str]]:
    """The network of a bundle and its classes, code to name.

    Raises:
        BundleError: it segments and does not diagnose, or its weights cannot be read.
    """
    described = bundle.metadata.get("diagnosis")
    classes = described.get("classes") if isinstance(described, dict) else None
    network = bundle.network()
    if not isinstance(network, MDPFormer) or not isinstance(classes, dict) or len(classes) != network.patient_classes:
        raise BundleError(bundle.name, "does not diagnose patients", "train one, see docs/pancreas.md")
    return network, {str(code): str(name) for code, name in classes.items()}


def assess(
    bundle: Bundle,
    network: MDPFormer,
    cases: Sequence[CaseFiles],
    patients: Mapping[str, Patient],
    device: torch.device,
    *,
    phases: tuple[bool, ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Assessed]:
    """Diagnose each patient of a data set as `diagnose` does for one.

    Args:
        bundle: where the network is from.
        network: in eval mode, on `device`.
        cases: the patients' files.
        patients: the truth, by case.
        device: where the network lives.
        phases: whether each phase is shown to the network; empty: all are.
        progress: called with (done, all).
    """
    found = []
    for done, case in enumerate(cases, start=1):
        cached = cache_patient(case, patients[case.name], bundle.spec)
        told = PatientData(cached.patient.age, cached.patient.sex, phases)
        answer, truth = diagnose(cached.image.float(), network, bundle.spec, told, device), cached.label.numpy()
        found.append(
            Assessed(
                case.name,
                cached.patient,
                answer,
                dice(answer.labels == ORGAN, truth == ORGAN),
                dice(answer.labels == LESION, truth == LESION),
                bool((truth == LESION).any()),
                detect(answer.lesion, truth == LESION, threshold=0.1),
            )
        )
        if progress is not None:
            progress(done, len(cases))
    return found


def summarise(patients: Sequence[Assessed], classes: Sequence[str]) -> dict[str, Any]:
    """The figures of a set of patients, for JSON; values that are not defined are None."""
    target = np.array([one.patient.target for one in patients])
    known = np.stack([one.found.probabilities for one in patients])
    blind = np.stack([one.found.without_metadata for one in patients])
    scores, without = score_classification(target, known), score_classification(target, blind)
    called = np.array([one.found.lesion_ml > LESION_ML for one in patients])
    ill = np.array([one.lesion_there for one in patients])
    curve = froc([one.detections for one in patients])
    return {
        "patients": len(patients),
        "accuracy": _estimate(scores.accuracy),
        "balanced_accuracy": _estimate(scores.balanced_accuracy),
        "mean_auc": _estimate(scores.mean_auc),
        "auc": {code: _estimate(value) for code, value in zip(classes, scores.auc, strict=True)},
        "confusion": {"classes": list(classes), "rows_truth_columns_named": scores.confusion.tolist()},
        "without_metadata": {
            "accuracy": _estimate(without.accuracy),
            "balanced_accuracy": _estimate(without.balanced_accuracy),
            "mean_auc": _estimate(without.mean_auc),
        },
        "gain_from_metadata": _estimate(accuracy_gain(target, blind, known)),
        "dice": {
            "organ": _mean([one.organ_dice for one in patients]),
            "lesion": _mean([one.lesion_dice for one in patients if one.lesion_there]),
        },
        "lesion": {
            "sensitivity": _mean(called[ill].astype(float)),
            "specificity": _mean(1.0 - called[~ill]),
            "at_least_ml": LESION_ML,
            "sensitivity_at_false_positives": {str(rate): _number(curve.at(rate)) for rate in FALSE_POSITIVES},
        },
        "flags": {
            flag: sum(flag in one.found.flags for one in patients) for flag in ("organ_not_found", "disagreement")
        },
    }


def patient_table(patients: Sequence[Assessed], classes: Sequence[str]) -> bytes:
    """One row for each patient as CSV."""
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow((*_COLUMNS, *(f"p_{code}" for code in classes)))
    for one in patients:
        found = one.found
        rows.writerow(
            (
                one.case,
                classes[one.patient.target],
                classes[int(found.probabilities.argmax())],
                classes[int(found.without_metadata.argmax())],
                f"{one.organ_dice:.4f}",
                f"{one.lesion_dice:.4f}",
                f"{found.lesion_ml:.2f}",
                " ".join(found.flags),
                *(f"{value:.4f}" for value in found.probabilities),
            )
        )
    return table.getvalue().encode()


def patient_json(found: PatientDiagnosis, classes: Sequence[str], bundle: Bundle, told: PatientData) -> bytes:
    """The report of one patient, without anything that names the patient."""
    phases = told.phases or (True,) * bundle.spec.in_channels
    report = {
        "class": classes[int(found.probabilities.argmax())],
        "probabilities": _by_class(found.probabilities, classes),
        "probabilities_without_metadata": _by_class(found.without_metadata, classes),
        "lesion_volume_ml": round(found.lesion_ml, 2),
        "organ_volume_ml": round(found.organ_ml, 2),
        "phases_used": [name for name, there in zip(bundle.spec.channels, phases, strict=True) if there],
        "metadata_used": {"age": not math.isnan(told.age), "sex": told.sex in (0, 1)},
        "flags": list(found.flags),
        "model": {"name": bundle.name, "version": bundle.version, "sha256": bundle.sha256},
        "trained_on": str(bundle.metadata.get("data_source", "")),
        "disclaimer": "Research use only, not for diagnosis",
    }
    return (json.dumps(report, indent=2) + "\n").encode()


def _by_class(values: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    return {code: round(float(value), 4) for code, value in zip(classes, values, strict=True)}


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {key: _number(value) for key, value in asdict(estimate).items()}


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    known = [float(value) for value in values if not math.isnan(value)]
    return _number(sum(known) / len(known)) if known else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)
