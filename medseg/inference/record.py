"""The record of a run: what came in, what was done, what came out. Its JSON schema is docs/record.schema.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medseg.phantom import SYNTHETIC

DISCLAIMER = "Research use only; not a medical device."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputRecord(_Strict):
    """The scan. Files are named without their folder, and nothing of the header's text is kept."""

    files: tuple[str, ...] = Field(description="File names as given, without folders.")
    sha256: str = Field(
        description="SHA-256 of the files' bytes, in order; for DICOM, of the images' sorted hexadecimal SHA-256."
    )
    format: str = Field(description="nifti, itk or dicom.")
    shape: tuple[int, int, int] = Field(description="Voxels (X, Y, Z).")
    spacing_mm: tuple[float, float, float] = Field(description="Voxel size along the array's axes.")
    orientation: str = Field(description="Directions of the array's axes, e.g. RAS.")


class MemberRecord(_Strict):
    """A bundle of an ensemble."""

    name: str
    version: str
    weights_sha256: str
    network: str
    weight: float = Field(description="Share in the mean; those of all members add up to 1.")
    temperature: float
    overlap: float
    roi_size: tuple[int, int, int]
    blend: str
    flips: int = Field(description="Passes over the volume; 1 without test-time augmentation.")


class BundleRecord(_Strict):
    """The bundle whose network made the segmentation, or the ensemble."""

    name: str
    version: str = Field(description="Empty for bundles that were put together for this run.")
    weights_sha256: str = Field(
        description="Of the weights file; of an ensemble, SHA-256 of its members' SHA-256 and shares."
    )
    network: str = Field(description="The architecture, or ensemble.")
    training_cases: int | None = Field(None, description="How many cases the weights were trained on, if stated.")
    own_code: str = Field("", description="Why code of a trusted bundle ran (--trust); empty where none did.")
    temperature: float = Field(1.0, description="Logits were divided by it; of an ensemble, beside its members' own.")
    members: tuple[MemberRecord, ...] = Field((), description="Of an ensemble; empty for a bundle alone.")

    @property
    def summary(self) -> str:
        """Name and version, and how small the training data were."""
        trained = f", trained on {self.training_cases} cases" if self.training_cases else ""
        return f"{self.name} {self.version}".rstrip() + trained


class ParameterRecord(_Strict):
    """What decided the result beside bundle and scan."""

    overlap: float | None = Field(description="None for an ensemble, whose members each have their own.")
    roi_size: tuple[int, int, int] | None = Field(description="None for an ensemble.")
    blend: str | None = Field(description="None for an ensemble.")
    tta: bool
    flips: int = Field(description="Passes over the volume, of all members; 1 without test-time augmentation.")
    forced: bool = Field(description="Whether an unsuitable scan was allowed.")


class BackendRecord(_Strict):
    """What computed one network."""

    name: str = Field(description="eager (PyTorch), onnxruntime or openvino.")
    precision: str = Field(description="fp32, bf16, or what PyTorch chose on a CUDA device.")
    accuracy: Literal["exact", "fast", "reduced"] = Field(
        description="How far logits may lie from PyTorch's in float32: rounding; ten times as far; as bfloat16 does."
    )


class PredictedDice(_Strict):
    """The mean Dice that cases with such a score had, by the line that was fitted to the bundle."""

    mean: float
    lower: float = Field(description="Of an interval that holds nine of ten cases like those of the fit.")
    upper: float
    cases: int = Field(description="How many cases the line was fitted to.")


class LabelUncertainty(_Strict):
    """One label of the bundle's table, background left out."""

    value: int
    name: str
    mean_entropy: float | None = Field(description="Over the label's voxels; None where there is none.")


class UncertaintyRecord(_Strict):
    """How sure the segmentation is; entropies lie between 0 (sure) and 1 (all classes equally likely)."""

    score: float = Field(description="The Dice that the probabilities themselves lead to expect, 0 to 1.")
    predicted_dice: PredictedDice | None = Field(
        description="None where the bundle carries no fit, or it does not hold: --tta, another overlap, nothing found."
    )
    mean_entropy: float | None = Field(description="Over the voxels of any label; None where there is none.")
    uncertain_share: float | None = Field(description="Share of the voxels of any label with an entropy above 0.5.")
    mutual_information: float | None = Field(
        description="Mean over the voxels of any label, of the passes' disagreement; None for a single pass."
    )
    labels: tuple[LabelUncertainty, ...]


class LabelRecord(_Strict):
    """One label of the bundle's table, background left out."""

    value: int
    name: str
    voxels: int
    volume_ml: float
    centroid_mm: tuple[float, float, float] | None = Field(description="Mean voxel centre, RAS mm.")
    bounding_box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = Field(
        description="First and last voxel index along each array axis, both inclusive."
    )
    components: int = Field(description="Connected pieces (26 neighbours).")


def disclaimer_of(metadata: Mapping[str, Any]) -> str:
    """What every result of a bundle says of itself."""
    if SYNTHETIC in str(metadata.get("data_source", "")):
        return f"Trained on synthetic data, not for clinical use. {DISCLAIMER}"
    return DISCLAIMER


class PhaseRecord(_Strict):
    """One phase of contrast that was there."""

    name: str = Field(description="The bundle's channel.")
    file: str = Field(description="Without its folder.")
    known_by: str = Field(
        description="named (--phase), number or name of the file, description of the DICOM series, order, or assumed."
    )
    reference: bool = Field(description="All phases and the label map lie on its grid.")
    resampled: bool
    covered: float = Field(description="Share of the reference's field of view that it covers.")
    shift_mm: tuple[float, float, float] | None = Field(
        description="Found by --register: what moves the middle of the field of view from the reference to this phase, "
        "RAS mm; None where it was not asked for."
    )
    rotation_degrees: float | None = Field(description="Angle of that motion's rotation.")


class DiameterRecord(_Strict):
    """A lesion in one plane: its longest diameter, and the longest one at a right angle to it in the same slice."""

    plane: str = Field(description="axial, coronal or sagittal.")
    slice_index: int = Field(description="Along the scan's array axis, counted from 0.")
    longest_mm: float
    short_mm: float
    longest_ends_mm: tuple[tuple[float, float, float], tuple[float, float, float]] = Field(description="RAS mm.")
    short_ends_mm: tuple[tuple[float, float, float], tuple[float, float, float]] = Field(description="RAS mm.")


class FindingRecord(_Strict):
    """One connected lesion; its type is that of the patient's class."""

    type: str = Field(description="Code of the most probable class that has a lesion.")
    voxels: int
    volume_ml: float
    centroid_mm: tuple[float, float, float] = Field(description="Mean voxel centre, RAS mm.")
    peak_voxel: tuple[int, int, int] = Field(description="Where the lesion is surest.")
    confidence: float = Field(description="Probability of a lesion there.")
    diameters: tuple[DiameterRecord, ...]
    place: float | None = Field(
        description="Along the straight axis of the organ: 0 its right end, 1 its left end; None without an organ."
    )
    part: str = Field(description="head (place below 0.35), body (below 0.7), tail, or unknown.")
    contrast_hu: dict[str, float] = Field(description="Mean of the lesion less mean of the organ in each phase.")


class EvidenceRecord(_Strict):
    """The evidence map: where in the scan the network sees what speaks for a class, 0 to 1."""

    stands_for: str = Field(description="Code of the class, the most probable one.")
    highest: float = Field(description="Largest value of the map.")
    peak_voxel: tuple[int, int, int] = Field(description="Where it is.")


class DiagnosisRecord(_Strict):
    """The class of the patient, and what it rests on."""

    named: str = Field(description="Code of the most probable class.")
    classes: dict[str, str] = Field(description="Code to name; the first one is without a lesion.")
    probabilities: dict[str, float] = Field(description="Of each class, with all that is known.")
    probabilities_without_metadata: dict[str, float] = Field(description="With age and sex unknown.")
    phases: tuple[PhaseRecord, ...]
    missing: tuple[str, ...] = Field(description="Phases that are absent, and age and sex where they are unknown.")
    from_header: tuple[str, ...] = Field((), description="Of age and sex, what the DICOM header told.")
    organ_ml: float = Field(description="The lesion not included.")
    lesion_ml: float
    findings: tuple[FindingRecord, ...] = Field(description="Of 0.3 ml or more, the largest first.")
    flags: tuple[Literal["organ_not_found", "disagreement"], ...] = Field(
        description="Reasons for a second look; disagreement: a lesion in a patient named healthy, or none in another."
    )
    evidence: EvidenceRecord | None = Field(None, description="When asked for; outputs.evidence names the file.")


class Record(_Strict):
    """Everything that a segmentation's JSON file says."""

    schema_version: Literal[1] = 1
    medseg: str = Field(description="Version of medseg.")
    created: str = Field(description="UTC, ISO 8601.")
    disclaimer: str = DISCLAIMER
    input: InputRecord
    bundle: BundleRecord
    parameters: ParameterRecord
    device: str
    backends: tuple[BackendRecord, ...] = Field((), description="Of the network, or of each member's.")
    torch: str = Field(description="Version of torch.")
    threads: int
    windows: int = Field(description="Windows that the network saw, flips included.")
    seconds: dict[str, float] = Field(description="Wall time of each stage.")
    warnings: tuple[str, ...]
    labels: tuple[LabelRecord, ...]
    uncertainty: UncertaintyRecord | None = Field(None, description="When asked for.")
    diagnosis: DiagnosisRecord | None = Field(None, description="Of a bundle that diagnoses patients.")
    outputs: dict[str, str] = Field(default_factory=dict, description="What was written: kind to file name.")
