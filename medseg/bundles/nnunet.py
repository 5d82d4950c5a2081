"""How nnU-Net prepares a scan and brings logits back, as far as it differs from everything else; part of a bundle.

nnU-Net crops a scan to what is not zero, normalises it at its own voxels, and resamples it so that the edges of the
grid, and not the first voxel centres, stay in place. Logits, and not probabilities, are averaged and resampled back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Normalization = Literal[
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
]

TARGET = "medseg.inference.NNUNetd"
"""The name under which a scheme stands among the preprocessing transforms of inference.json."""

# A grid counts as anisotropic where its largest voxel edge is more than so many times the smallest.
_ANISOTROPIC = 3.0
# Edges that agree to this fraction are the same; an affine gives them to about seven digits.
_SAME_EDGE = 1e-5


@dataclass(frozen=True, slots=True)
class ChannelNormalization:
    """How the values of a channel are normalised, by the name of nnU-Net's class.

    Attributes:
        scheme: z-score, clipping and z-score by numbers from training (CT), nothing, 0 to 1, or division by 255.
        inside: with the z-score, use and change only what is not zero, holes included; the rest stays.
        mean: of the foreground in training, for CT.
        std: of the foreground in training, for CT.
        lower: the 0.5 percentile of the foreground in training, for CT.
        upper: the 99.5 percentile.
    """

    scheme: Normalization
    inside: bool = False
    mean: float = 0.0
    std: float = 1.0
    lower: float = 0.0
    upper: float = 0.0

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Normalization):
            raise ValueError(f"normalization is {self.scheme!r}; medseg knows {', '.join(get_args(Normalization))}")


@dataclass(frozen=True, slots=True)
class Resampling:
    """nnU-Net's interpolation from one spacing to another.

    Attributes:
        order: of the spline: 1 (linear) or 3 (cubic).
        order_z: along an axis that is resampled apart from the others: 0 (nearest) or 1.
        separate_z: whether the axis of the largest voxel edge is resampled apart; None: where a grid is anisotropic.
    """

    order: int
    order_z: int
    separate_z: bool | None = None

    def __post_init__(self) -> None:
        if self.order not in (1, 3) or self.order_z not in (0, 1) or self.separate_z not in (None, False, True):
            raise ValueError(
                f"resampling of order {self.order}, order_z {self.order_z}, force_separate_z {self.separate_z}; "
                "medseg knows the orders 1 and 3, and 0 and 1 along z"
            )

    def axis_apart(self, current: Sequence[float], new: Sequence[float]) -> int | None:
        """The axis that is resampled apart from the others, or None.

        Args:
            current: spacing before, mm.
            new: spacing after, mm.
        """
        if self.separate_z is False:
            return None
        if self.separate_z or _anisotropic(current):
            decisive = current
        elif _anisotropic(new):
            decisive = new
        else:
            return None
        largest = [axis for axis, edge in enumerate(decisive) if edge >= max(decisive) * (1 - _SAME_EDGE)]
        return largest[0] if len(largest) == 1 else None


def _anisotropic(spacing: Sequence[float]) -> bool:
    return max(spacing) / min(spacing) > _ANISOTROPIC


@dataclass(frozen=True, slots=True)
class NNUNetScheme:
    """What a bundle made of an nnU-Net model states beside the usual.

    Attributes:
        axes: for each axis of the model grid, the axis of the scan (after `BundleSpec.orientation`) it comes from.
        spacing: voxel size of the model grid in mm along its axes; None along an axis that keeps the scan's.
        normalization: of each channel.
        resampling: of the scan.
        back: of the logits; its order is 1.
    """

    axes: tuple[int, int, int]
    spacing: tuple[float | None, float, float]
    normalization: tuple[ChannelNormalization, ...]
    resampling: Resampling
    back: Resampling

    def __post_init__(self) -> None:
        if sorted(self.axes) != [0, 1, 2]:
            raise ValueError(f"axes {self.axes} are no permutation of 0, 1, 2")
        if any(edge is not None and not edge > 0 for edge in self.spacing):
            raise ValueError(f"spacing {self.spacing} is not positive")
        if self.back.order != 1:
            raise ValueError(f"logits resampled with order {self.back.order}; medseg knows 1")

    def target(self, spacing: Sequence[float]) -> tuple[float, float, float]:
        """Spacing of the model grid in mm for a scan with this spacing (model axes)."""
        x, y, z = (own if wanted is None else wanted for wanted, own in zip(self.spacing, spacing, strict=True))
        return x, y, z


def scheme_config(scheme: NNUNetScheme) -> dict[str, Any]:
    """The transform of inference.json that stands for a scheme."""
    return {"_target_": TARGET, "keys": "image", **asdict(scheme)}


def parse_scheme(args: Mapping[str, Any]) -> NNUNetScheme:
    """The inverse of `scheme_config`, without the target and the keys.

    Raises:
        ValueError, TypeError, KeyError: something is missing, unknown, or contradictory.
    """
    known = set(NNUNetScheme.__dataclass_fields__)
    if set(args) != known:
        raise ValueError(f"arguments {sorted(args)} instead of {sorted(known)}")
    first, second, third = (int(axis) for axis in args["axes"])
    slow, row, column = args["spacing"]
    return NNUNetScheme(
        axes=(first, second, third),
        spacing=(None if slow is None else float(slow), float(row), float(column)),
        normalization=tuple(ChannelNormalization(**channel) for channel in args["normalization"]),
        resampling=Resampling(**args["resampling"]),
        back=Resampling(**args["back"]),
    )
