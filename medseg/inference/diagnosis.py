"""From a preprocessed multi-phase scan to a diagnosis: segment, cut out the organ, classify the patient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from scipy.ndimage import label as connected_parts
from torch import Tensor, nn

from medseg.bundles.diagnosis import patient_classes
from medseg.bundles.load import Bundle
from medseg.bundles.spec import BundleSpec
from medseg.evaluation.findings import LESION_ML
from medseg.networks.mdpformer import UNKNOWN_SEX, MDPFormer

ORGAN, LESION = 1, 2
"""Values of the segmentation beside 0, the background."""


@dataclass(frozen=True)
class PatientData:
    """What is known of a patient beside the scan.

    Attributes:
        age: years, NaN unknown.
        sex: 0 male, 1 female, 2 unknown.
        phases: whether each phase of the bundle is there; empty: all are.
    """

    age: float = math.nan
    sex: int = UNKNOWN_SEX
    phases: tuple[bool, ...] = ()


@dataclass(frozen=True)
class PatientDiagnosis:
    """What the network says of a patient.

    Attributes:
        probabilities: (classes,) with all that is known.
        without_metadata: (classes,) with age and sex unknown, which shows what they changed.
        labels: (X', Y', Z') uint8 on the model grid: 0 background, 1 organ, 2 lesion.
        lesion: (X', Y', Z') float32, the probability of a lesion in each voxel.
        organ_ml: volume of the organ, lesion not included.
        lesion_ml: volume of the lesion.
        centre: voxel (x, y, z) around which the patient was classified.
        flags: reasons for a second look: ``organ_not_found``; ``disagreement`` between segmentation and class.
    """

    probabilities: NDArray[np.float32]
    without_metadata: NDArray[np.float32]
    labels: NDArray[np.uint8]
    lesion: NDArray[np.float32]
    organ_ml: float
    lesion_ml: float
    centre: tuple[int, int, int]
    flags: tuple[str, ...]


class Classified(NamedTuple):
    """What the C-path says of a patient.

    Attributes:
        known: (classes,) probabilities with all that is known.
        blind: (classes,) probabilities with age and sex unknown.
        evidence: (classes, D, H, W) float32, 0 to 1: where in the region each class sees its evidence, with all that is
            known. Its voxels divide the region evenly.
    """

    known: NDArray[np.float32]
    blind: NDArray[np.float32]
    evidence: NDArray[np.float32]


@torch.inference_mode()
def diagnose(
    image: Tensor, network: MDPFormer, spec: BundleSpec, patient: PatientData, device: torch.device
) -> PatientDiagnosis:
    """Segment a scan by sliding window, then classify the patient from the region around the organ.

    Neither answer is changed to fit the other; `PatientDiagnosis.flags` says where they differ.

    Args:
        image: (C, X', Y', Z') as `medseg.inference.preprocess.preprocess` gives it, one channel for each phase; what
            an absent phase holds has no effect.
        network: in eval mode, on `device`.
        spec: of its bundle; the window is also the region that is classified.
        patient: age, sex, phases.
        device: where the network lives.

    Raises:
        ValueError: no phase is there, or as many as the bundle has are not given.
    """
    there = torch.tensor(patient.phases or (True,) * len(image), dtype=torch.float32)
    if len(there) != len(image) or not bool(there.any()):
        raise ValueError(f"phases {patient.phases} of a scan with {len(image)}; at least one must be there")
    image = torch.where(there[:, None, None, None] > 0, image, 0.0)
    # The scan at a few millimetres is small: MONAI's window on the whole volume does, with the engine's own rules.
    logits = sliding_window_inference(
        image[None],
        spec.roi_size,
        spec.sw_batch_size,
        lambda windows: network.s_path(windows)[0],
        overlap=spec.overlap,
        mode=spec.blend,
        padding_mode=spec.padding,
        cval=spec.padding_value,
        sw_device=device,
        device="cpu",
    )[0]
    chances = torch.as_tensor(logits).softmax(dim=0)
    labels = chances.argmax(dim=0).to(torch.uint8).numpy()
    centre = centre_of(labels > 0)
    flags = [] if centre else ["organ_not_found"]
    centre = centre or centre_of(np.ones(labels.shape, dtype=bool)) or (0, 0, 0)

    told = replace(patient, phases=tuple((there > 0).tolist()))
    known, blind, _ = classify(image, centre, network, spec, told, device)
    voxel_ml = math.prod(spec.spacing or (1.0, 1.0, 1.0)) / 1000
    organ_ml, lesion_ml = (voxel_ml * int((labels == value).sum()) for value in (ORGAN, LESION))
    if disagree(known, lesion_ml):
        flags.append("disagreement")
    lesion = chances[LESION].numpy()
    return PatientDiagnosis(known, blind, labels, lesion, organ_ml, lesion_ml, centre, tuple(flags))


@torch.inference_mode()
def classify(
    image: Tensor,
    centre: Sequence[int],
    network: MDPFormer,
    spec: BundleSpec,
    patient: PatientData,
    device: torch.device,
) -> Classified:
    """Classify a patient twice: with all that is known, and with age and sex unknown.

    Args:
        image: (C, X', Y', Z'), preprocessed; what an absent phase holds has no effect.
        centre: voxel (x, y, z) in the middle of the region that is looked at.
        network: in eval mode, on `device`.
        spec: its window is the region.
        patient: age, sex, phases.
        device: where the network lives.
    """
    there = torch.tensor(patient.phases or (True,) * len(image), dtype=torch.float32)
    region = roi_at(image, centre, spec.roi_size, spec.padding_value).to(device)
    ages, sexes = torch.tensor([patient.age, math.nan]), torch.tensor([patient.sex, UNKNOWN_SEX])
    found = network(region.expand(2, -1, -1, -1, -1), ages.to(device), sexes.to(device), there.expand(2, -1).to(device))
    known, blind = found.class_logits.float().softmax(dim=1).cpu().numpy()
    evidence: NDArray[np.float32] = found.mask_logits[0].float().sigmoid().cpu().numpy()
    return Classified(known, blind, evidence)


def disagree(probabilities: NDArray[np.floating], lesion_ml: float) -> bool:
    """Whether segmentation and class contradict each other: a lesion in the healthy, or none in the ill."""
    healthy = int(probabilities.argmax()) == 0
    return (healthy and lesion_ml >= LESION_ML) or (not healthy and lesion_ml == 0)


def classes_of(bundle: Bundle) -> dict[str, str]:
    """The classes of patients that a bundle tells apart, code to name, the one without a lesion first.

    Empty for a bundle that segments only.
    """
    return patient_classes(bundle.spec, bundle.metadata)


def typed_labels(spec: BundleSpec, codes: Sequence[str]) -> dict[int, str]:
    """Names of the values of a label map whose lesions have the patient's class: class number + 1, the organ is 1."""
    names = {0: spec.labels[0], ORGAN: spec.labels[ORGAN]}
    return names | {number + 1: f"{spec.labels[LESION]} {code}" for number, code in enumerate(codes) if number}


class SegmentingPath(nn.Module):
    """The S-path of a network by itself, which windows of a whole scan are for.

    Args:
        network: whose S-path it is.

    Shape:
        (B, C, D, H, W) -> logits (B, K, D, H, W).
    """

    def __init__(self, network: MDPFormer) -> None:
        super().__init__()
        self.s_path = network.s_path

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the segmentation."""
        logits: Tensor = self.s_path(image)[0]
        return logits


def centre_of(mask: NDArray[np.bool_]) -> tuple[int, int, int] | None:
    """The voxel nearest to the centre of mass of a mask's largest connected part; None of an empty mask."""
    parts, count = connected_parts(mask)
    if not count:
        return None
    largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    x, y, z = (round(float(axis.mean())) for axis in np.nonzero(parts == largest))
    return x, y, z


def roi_at(image: Tensor, centre: Sequence[int], roi_size: Sequence[int], value: float) -> Tensor:
    """A region of fixed size around a voxel, (C, *roi_size); `value` fills what lies outside the image (C, X, Y, Z)."""
    region = image.new_full((len(image), *roi_size), value)
    inside, outside = [slice(None)], [slice(None)]
    for middle, wanted, size in zip(centre, roi_size, image.shape[1:], strict=True):
        first = middle - wanted // 2
        begin, end = max(first, 0), min(first + wanted, size)
        if begin >= end:
            return region
        inside.append(slice(begin, end))
        outside.append(slice(begin - first, end - first))
    region[tuple(outside)] = image[tuple(inside)]
    return region
