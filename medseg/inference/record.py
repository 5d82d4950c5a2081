"""The record of a run: what came in, what was done, what came out. Its JSON schema is docs/record.schema.json."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputRecord(_Strict):
    """The scan. Files are named without their folder, and nothing of the header's text is kept."""

    files: tuple[str, ...] = Field(description="File names as given, without folders.")
    sha256: str = Field(description="SHA-256 of the files' bytes, in order.")
    format: str = Field(description="nifti or itk.")
    shape: tuple[int, int, int] = Field(description="Voxels (X, Y, Z).")
    spacing_mm: tuple[float, float, float] = Field(description="Voxel size along the array's axes.")
    orientation: str = Field(description="Directions of the array's axes, e.g. RAS.")


class BundleRecord(_Strict):
    """The bundle whose network made the segmentation."""

    name: str
    version: str
    weights_sha256: str
    network: str
    training_cases: int | None = Field(None, description="How many cases the weights were trained on, if stated.")

    @property
    def summary(self) -> str:
        """Name and version, and how small the training data were."""
        trained = f", trained on {self.training_cases} cases" if self.training_cases else ""
        return f"{self.name} {self.version}{trained}"


class ParameterRecord(_Strict):
    """What decided the result beside bundle and scan."""

    overlap: float
    roi_size: tuple[int, int, int]
    blend: str
    tta: bool
    flips: int = Field(description="Passes over the volume; 1 without test-time augmentation.")
    forced: bool = Field(description="Whether an unsuitable scan was allowed.")


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


class Record(_Strict):
    """Everything that a segmentation's JSON file says."""

    schema_version: Literal[1] = 1
    medseg: str = Field(description="Version of medseg.")
    created: str = Field(description="UTC, ISO 8601.")
    disclaimer: str = "Research use only; not a medical device."
    input: InputRecord
    bundle: BundleRecord
    parameters: ParameterRecord
    device: str
    torch: str = Field(description="Version of torch.")
    threads: int
    windows: int = Field(description="Windows that the network saw, flips included.")
    seconds: dict[str, float] = Field(description="Wall time of each stage.")
    warnings: tuple[str, ...]
    labels: tuple[LabelRecord, ...]
    outputs: dict[str, str] = Field(default_factory=dict, description="What was written: kind to file name.")
