"""The answer for one patient: the class, the lesions one by one, and what was missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.bundles.load import Bundle
from medseg.bundles.spec import BundleSpec
from medseg.errors import BundleError
from medseg.evaluation.detection import components
from medseg.evaluation.findings import LESION_ML, Finding, measure_lesions
from medseg.evaluation.volumes import voxel_volume_ml
from medseg.inference.diagnosis import (
    LESION,
    ORGAN,
    PatientData,
    SegmentingPath,
    classes_of,
    classify,
    disagree,
    typed_labels,
)
from medseg.inference.phases import PhaseVolume
from medseg.inference.preprocess import Case
from medseg.inference.record import DiagnosisRecord, DiameterRecord, FindingRecord, PhaseRecord
from medseg.io.geometry import Affine, world
from medseg.io.patients import PatientFacts
from medseg.networks.mdpformer import UNKNOWN_SEX, MDPFormer


@dataclass(frozen=True)
class Answer:
    """What is said of one patient.

    Attributes:
        record: classes, findings, what was missing.
        labels: (X, Y, Z) with a lesion's voxels labelled by its type: class number + 1.
        names: of the label values.
        warnings: one sentence each.
    """

    record: DiagnosisRecord
    labels: NDArray[np.integer]
    names: Mapping[int, str]
    warnings: list[str]


@dataclass(frozen=True)
class Diagnosing:
    """A bundle's network, which segments and diagnoses.

    Attributes:
        network: the whole of it, in eval mode.
        segmenting: the part that windows of the scan are for.
        spec: of the bundle.
        classes: code to name.
    """

    network: MDPFormer
    segmenting: SegmentingPath
    spec: BundleSpec
    classes: Mapping[str, str]

    @classmethod
    def of(cls, bundle: Bundle) -> Diagnosing:
        """Load it.

        Raises:
            BundleError: as `Bundle.network`.
        """
        network = bundle.network()
        if not isinstance(network, MDPFormer):
            raise BundleError(bundle.name, "does not diagnose patients", "train one, see docs/pancreas.md")
        return cls(network, SegmentingPath(network).eval(), bundle.spec, classes_of(bundle))

    def answer(
        self,
        volume: PhaseVolume,
        case: Case,
        labels: NDArray[np.integer],
        probabilities: NDArray[np.float32],
        patient: PatientFacts,
        device: torch.device,
    ) -> Answer:
        """Classify the patient from the region around the organ, and measure the lesions.

        Neither the class nor the segmentation is changed to fit the other; flags say where they differ.

        Args:
            volume: the phases on one grid.
            case: the same, preprocessed.
            labels: (X, Y, Z): 0 background, 1 organ, 2 lesion.
            probabilities: (3, X, Y, Z).
            patient: age and sex.
            device: where the network is.
        """
        flags: list[Any] = []
        centre = largest_centre(labels > 0, volume.affine, case.grid.affine)
        if centre is None:
            flags.append("organ_not_found")
            centre = [size // 2 for size in case.image.shape[1:]]
        told = PatientData(patient.age, patient.sex, volume.present)
        network = self.network.to(device)
        known, blind = classify(case.image, centre, network, self.spec, told, device)
        codes = list(self.classes)
        kind = 1 + int(known[1:].argmax())
        names = typed_labels(self.spec, codes)
        organ, lesion = labels == ORGAN, labels == LESION
        typed: NDArray[np.integer] = labels.astype(np.uint8 if len(codes) < 256 else np.uint16)
        typed[lesion] = kind + 1
        shown = {
            name: volume.data[channel]
            for channel, name in enumerate(volume.names)
            if volume.phases[channel] is not None
        }
        findings = measure_lesions(lesion, organ, probabilities[LESION], shown, volume.affine, least_ml=LESION_ML)
        voxel_ml = voxel_volume_ml(volume.affine)
        organ_ml, lesion_ml = (voxel_ml * int(np.count_nonzero(mask)) for mask in (organ, lesion))
        if disagree(known, lesion_ml):
            flags.append("disagreement")
        named = codes[int(known.argmax())]
        record = DiagnosisRecord(
            named=named,
            classes=dict(self.classes),
            probabilities=_by_class(known, codes),
            probabilities_without_metadata=_by_class(blind, codes),
            phases=tuple(_phase_records(volume)),
            missing=tuple(_missing(volume, patient)),
            organ_ml=round(organ_ml, 3),
            lesion_ml=round(lesion_ml, 3),
            findings=tuple(_finding_record(one, codes[kind]) for one in findings),
            flags=tuple(flags),
        )
        return Answer(record, typed, names, [*patient.remarks, *_warnings(record, self.spec.labels[ORGAN])])


def without_absent(case: Case, present: Sequence[bool]) -> Case:
    """The case with zeros in the channels of absent phases, as in training."""
    there = torch.tensor(present)[:, None, None, None]
    return replace(case, image=torch.where(there, case.image, 0.0))


def largest_centre(mask: NDArray[np.bool_], affine: Affine, model: Affine) -> list[int] | None:
    """The voxel of the model grid nearest to the centre of a mask's largest connected part; None of an empty mask.

    Args:
        mask: (X, Y, Z) on the scan's grid.
        affine: of the scan's grid.
        model: affine of the model grid.
    """
    parts, count = components(mask)
    if not count:
        return None
    largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    middle = world(affine, np.argwhere(parts == largest).mean(axis=0))
    return [round(float(index)) for index in world(np.asarray(np.linalg.inv(model), dtype=np.float64), middle)]


def _by_class(values: NDArray[np.float32], codes: Sequence[str]) -> dict[str, float]:
    return {code: round(float(value), 4) for code, value in zip(codes, values, strict=True)}


def _phase_records(volume: PhaseVolume) -> list[PhaseRecord]:
    found = []
    for channel, phase in enumerate(volume.phases):
        if phase is None:
            continue
        motion = phase.motion
        x, y, z = (round(value, 2) for value in motion.shift_mm) if motion is not None else (0.0, 0.0, 0.0)
        found.append(
            PhaseRecord(
                name=volume.names[channel],
                file=phase.file,
                known_by=phase.how,
                reference=channel == volume.reference,
                resampled=phase.resampled,
                covered=phase.covered,
                shift_mm=None if motion is None else (x, y, z),
                rotation_degrees=None if motion is None else round(motion.degrees, 2),
            )
        )
    return found


def _missing(volume: PhaseVolume, patient: PatientFacts) -> list[str]:
    """What the network was told is unknown."""
    absent = [f"phase {volume.names[channel]}" for channel, phase in enumerate(volume.phases) if phase is None]
    return [*absent, *(["age"] if math.isnan(patient.age) else []), *(["sex"] if patient.sex == UNKNOWN_SEX else [])]


def _finding_record(finding: Finding, kind: str) -> FindingRecord:
    diameters = tuple(
        DiameterRecord(**asdict(one) | {"longest_mm": round(one.longest_mm, 1), "short_mm": round(one.short_mm, 1)})
        for one in finding.diameters
    )
    return FindingRecord(
        type=kind,
        voxels=finding.voxels,
        volume_ml=round(finding.volume_ml, 3),
        centroid_mm=finding.centroid_mm,
        peak_voxel=finding.peak_voxel,
        confidence=round(finding.confidence, 4),
        diameters=diameters,
        place=None if finding.place is None else round(finding.place, 3),
        part=finding.part,
        contrast_hu={name: round(value, 1) for name, value in finding.contrast_hu.items()},
    )


def _warnings(record: DiagnosisRecord, organ: str) -> list[str]:
    """The flags in words."""
    found = []
    if "organ_not_found" in record.flags:
        found.append(f"no {organ} was found; the middle of the scan was classified")
    if "disagreement" in record.flags and record.lesion_ml:
        found.append(f"class {record.named}, but a lesion of {record.lesion_ml:.1f} ml was segmented: look again")
    elif "disagreement" in record.flags:
        found.append(f"class {record.named}, but no lesion was segmented: look again")
    return found
