"""The settings of a training run, as they stand in a run's and a bundle's train.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medseg.bundles.spec import Resize


class Augmentation(BaseModel):
    """Random changes of a training crop; each `*_probability` is the chance for one crop.

    Rotation is in radians about each axis, scale and translation are fractions of the size, and intensity
    changes are in units of the preprocessed image. `elastic_probability` is the chance that rotation, scaling and shift
    come with a smooth random warp, whose standard deviation is about `elastic_voxels`. Flips are along each of
    `TrainingConfig.mirror_axes`, quarter turns (`rot90`) in the plane of slices, or of the first two axes; its window
    must be a square.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    affine_probability: float = Field(0.7, ge=0, le=1)
    rotation: float = Field(0.25, ge=0)
    scale: float = Field(0.17, ge=0, lt=1)
    translation: float = Field(0.06, ge=0, lt=1)
    elastic_probability: float = Field(0.0, ge=0, le=1)
    elastic_voxels: float = Field(1.0, gt=0)
    noise_probability: float = Field(0.2, ge=0, le=1)
    noise_deviation: float = Field(0.1, ge=0)
    blur_probability: float = Field(0.15, ge=0, le=1)
    gain_probability: float = Field(0.4, ge=0, le=1)
    gain: float = Field(0.2, ge=0, lt=1)
    offset: float = Field(0.2, ge=0)
    gamma_probability: float = Field(0.25, ge=0, le=1)
    low_resolution_probability: float = Field(0.1, ge=0, le=1)
    flip_probability: float = Field(0.5, ge=0, le=1)
    rot90_probability: float = Field(0.0, ge=0, le=1)


class Loss(BaseModel):
    """What the Dice of the loss counts, and how several outputs weigh.

    Attributes:
        include_background: the background is a class like any other.
        squared: squared probabilities in the denominator.
        batch: one Dice over the batch instead of the mean over its crops; None: for slices only, of which most lack a
            label, and a Dice of nothing has no slope.
        output_weights: weight of each output of a network with several, full resolution first; None halves each.
        factor: of the whole; matters where the optimiser's step follows the size of the gradient (SGD).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_background: bool = False
    squared: bool = False
    batch: bool | None = None
    output_weights: tuple[float, ...] | None = None
    factor: float = Field(1.0, gt=0)


class TrainingConfig(BaseModel):
    """Everything that decides a training run, apart from the data.

    The run ends after `steps`, or after `max_minutes` of training time, whichever comes first; the learning rate
    follows the same clock (warm-up, then cosine or polynomial to 0), or reaches 0 only at `decay_steps`. `bundle`
    is a bundle whose network and preprocessing are taken instead of derived from the data; `network`, `roi_size`,
    `spacing` and `intensity` then replace its own. `weights` is a bundle's name or a file (a published checkpoint,
    another run's models/model.pt) to start from, as far as it fits; what it gave to the encoder stays as it is for
    the first `freeze_encoder` steps. `slice_axis`, `neighbours`, `neighbour_step` and `resize` are for 2D networks,
    see `medseg.bundles.spec.SliceSpec`; without `slice_axis` slices are cut along the axis of the thickest voxels,
    or along the first one where voxels are about equally thick. `soft_labels` is a folder of probability maps,
    CASE_seg_probabilities.nii.gz as `medseg batch --probabilities` writes them: each training target is then the
    label map's share 1 - `soft_share` and theirs. Where they come from networks that did not see the case, they say
    which of its voxels an annotator might have drawn otherwise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    bundle: str | None = None
    network: dict[str, Any] = Field(default_factory=dict)
    roi_size: tuple[int, int, int] | None = None
    slice_axis: Literal[0, 1, 2] | None = None
    neighbours: int = Field(0, ge=0)
    neighbour_step: int = Field(1, ge=1)
    resize: Resize = "none"
    spacing: tuple[float, float, float] | None = None
    intensity: str | None = None
    weights: str | None = None
    freeze_encoder: int = Field(0, ge=0)
    soft_labels: str | None = None
    soft_share: float = Field(0.5, ge=0, le=1)
    steps: int | None = Field(None, gt=0)
    max_minutes: float | None = Field(None, gt=0)
    batch_size: int = Field(4, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(6e-4, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["cosine", "polynomial"] = "cosine"
    decay_steps: int | None = Field(None, gt=0)
    loss: Loss = Loss()  # type: ignore[call-arg]
    gradient_clip: float | None = Field(1.0, gt=0)
    ema_decay: float = Field(0.995, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    foreground_share: float = Field(0.67, ge=0, le=1)
    mirror_axes: tuple[int, ...] = ()
    augmentation: Augmentation = Augmentation()  # type: ignore[call-arg]
    holdout: float = Field(0.1, ge=0, lt=1)
    validate_minutes: float = Field(5.0, gt=0)
    workers: int = Field(0, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainingConfig:
        if self.steps is None and self.max_minutes is None:
            raise ValueError("a run needs steps or max_minutes")
        return self
