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
from medseg.inference.record import DiagnosisRecord, DiameterRecord, EvidenceRecord, FindingRecord, PhaseRecord
from medseg.inference.register import resample_to
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
        evidence: (X, Y, Z) float32 when asked for, else None: where the most probable class sees its evidence, 0 to 1,
            and 0 outside of the region that was classified.
    """

    record: DiagnosisRecord
    labels: NDArray[np.integer]
    names: Mapping[int, str]
    warnings: list[str]
    evidence: NDArray[np.float32] | None = None


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
        *,
        evidence: bool = False,
    ) -> Answer:
        """Classify the patient from the region around the organ, and measure the lesions.

        Neither the class nor the segmentation is changed to fit the other; flags say where they differ.

        Args:
            volume: the phases on one grid.
            case: the same, preprocessed.
            labels: (X, Y, Z): 0 background, 1 organ, 2 lesion.
            probabilities: (3, X, Y, Z).
            patient: age and sex as the user knows them; the scan's header tells what is unknown there.
            device: where the network is.
            evidence: also make the evidence map.
        """
        flags: list[Any] = []
        centre = largest_centre(labels > 0, volume.affine, case.grid.affine)
        if centre is None:
            flags.append("organ_not_found")
            centre = [size // 2 for size in case.image.shape[1:]]
        facts = patient.completed(volume.patient)
        told = PatientData(facts.age, facts.sex, volume.present)
        network = self.network.to(device)
        known, blind, seen = classify(case.image, centre, network, self.spec, told, device)
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
        number = int(known.argmax())
        shown_there = None
        if evidence:
            shown_there = on_grid(seen[number], centre, self.spec.roi_size, case.grid.affine, volume)
        record = DiagnosisRecord(
            named=codes[number],
            classes=dict(self.classes),
            probabilities=_by_class(known, codes),
            probabilities_without_metadata=_by_class(blind, codes),
            phases=tuple(_phase_records(volume)),
            missing=tuple(_missing(volume, facts)),
            from_header=tuple(_from_header(patient, facts)),
            organ_ml=round(organ_ml, 3),
            lesion_ml=round(lesion_ml, 3),
            findings=tuple(_finding_record(one, codes[kind]) for one in findings),
            flags=tuple(flags),
            evidence=None if shown_there is None else _evidence_record(shown_there, codes[number]),
        )
        warnings = [*patient.remarks, *_warnings(record, self.spec.labels[ORGAN], healthy=codes[0])]
        return Answer(record, typed, names, warnings, shown_there)


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


def on_grid(
    evidence: NDArray[np.float32],
    centre: Sequence[int],
    roi_size: Sequence[int],
    model: Affine,
    volume: PhaseVolume,
) -> NDArray[np.float32]:
    """The evidence of a class on the scan's own grid, linear between the middles of the region's coarse voxels.

    Args:
        evidence: (D, H, W), 0 to 1, on the region that was classified.
        centre: voxel of the model grid in its middle.
        roi_size: its voxels of the model grid.
        model: affine of the model grid.
        volume: the scan.

    Returns:
        (X, Y, Z) float32, 0 outside of the region.
    """
    size = np.array(roi_size)
    step = size / np.array(evidence.shape)
    coarse = np.diag([*step, 1.0])
    coarse[:3, 3] = np.array(centre) - size // 2 + (step - 1) / 2
    found = resample_to(evidence, model @ coarse, volume.shape, volume.affine, outside=0.0)
    return found.clip(0.0, 1.0)


def _evidence_record(evidence: NDArray[np.float32], code: str) -> EvidenceRecord:
    x, y, z = (int(index) for index in np.unravel_index(int(evidence.argmax()), evidence.shape))
    return EvidenceRecord(stands_for=code, highest=round(float(evidence[x, y, z]), 4), peak_voxel=(x, y, z))


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


def _from_header(said: PatientFacts, known: PatientFacts) -> list[str]:
    """What of age and sex the user did not say and the scan's header told."""
    age = math.isnan(said.age) and not math.isnan(known.age)
    sex = said.sex == UNKNOWN_SEX and known.sex != UNKNOWN_SEX
    return [*(["age"] if age else []), *(["sex"] if sex else [])]


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


def _warnings(record: DiagnosisRecord, organ: str, *, healthy: str) -> list[str]:
    """The flags in words, and what the evidence map cannot show."""
    found = []
    if "organ_not_found" in record.flags:
        found.append(f"no {organ} was found; the middle of the scan was classified")
    if "disagreement" in record.flags and record.lesion_ml:
        found.append(f"class {record.named}, but a lesion of {record.lesion_ml:.1f} ml was segmented: look again")
    elif "disagreement" in record.flags:
        found.append(f"class {record.named}, but no lesion was segmented: look again")
    if record.evidence is not None and record.named == healthy:
        found.append(
            f"the evidence map stands for {healthy}, which has no lesion: it was not trained and shows nothing"
        )
    return found
