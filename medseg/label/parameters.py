"""What a client of the server may ask for: names that cannot climb out of a folder, numbers held within bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg.bundles.spec import BundleSpec
from medseg.errors import UsageError

SUFFIXES = (".nii.gz", ".nii", ".nrrd")
"""Of label maps that a client can ask for and hand in."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SESSION = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DTYPES = ("uint8", "uint16", "int16", "int32", "float32")


def checked_name(kind: str, value: str) -> str:
    """A name that becomes a part of a path: an image's identifier, a label's tag.

    Raises:
        UsageError: it holds anything but letters, digits, point, line and underline, two points in a row, or more
            than 64 characters.
    """
    if not _NAME.fullmatch(value) or ".." in value:
        raise UsageError(kind, "not 1 to 64 letters, digits, '.', '-' and '_', without '..'", "choose another name")
    return value


def is_session(value: str) -> bool:
    """Whether a session's identifier is one that the server gives out."""
    return _SESSION.fullmatch(value) is not None


@dataclass(frozen=True)
class InferParameters:
    """How a client wants an image segmented.

    Attributes:
        device: one of `devices`.
        overlap: share that neighbouring windows have in common, 0 to 0.9; None takes the bundle's.
        tta: average over the flips that the bundle allows.
        force: go on with an image that the bundle was not trained for.
        suffix: of the label map's file, one of `SUFFIXES`.
        dtype: of its voxels; None for the smallest integer type that holds the bundle's labels.
        compress: pack the voxels of a .nrrd file.
    """

    device: str = "auto"
    overlap: float | None = None
    tta: bool = False
    force: bool = False
    suffix: str = ".nii.gz"
    dtype: str | None = None
    compress: bool = False

    @classmethod
    def read(cls, request: Mapping[str, Any], spec: BundleSpec) -> InferParameters:
        """From a request; what it does not state, and names that are not known, fall back to the defaults.

        Raises:
            UsageError: a number that is none.
        """
        overlap = number(request, "overlap", spec.overlap, 0.0, 0.9)
        suffix, dtype = str(_first(request.get("result_extension"))), str(_first(request.get("result_dtype")))
        return cls(
            device=device(request),
            overlap=None if overlap == spec.overlap else overlap,
            tta=_flag(request, "tta") and bool(spec.mirror_axes),
            force=_flag(request, "force"),
            suffix=suffix if suffix in SUFFIXES else cls.suffix,
            dtype=dtype if dtype in _DTYPES and max(spec.labels) <= _highest(dtype) else None,
            compress=_flag(request, "result_compress"),
        )


@dataclass(frozen=True)
class TrainParameters:
    """How a client wants a bundle trained on.

    Attributes:
        steps: of the optimiser.
        max_minutes: the training ends after these even if there are steps left.
        learning_rate: the highest.
        batch_size: crops for each step.
        device: one of `devices`.
    """

    steps: int = 200
    max_minutes: float = 60.0
    learning_rate: float = 1e-4
    batch_size: int = 2
    device: str = "auto"

    @classmethod
    def read(cls, request: Mapping[str, Any]) -> TrainParameters:
        """From a request.

        Raises:
            UsageError: a number that is none.
        """
        return cls(
            steps=int(number(request, "steps", cls.steps, 1, 100_000)),
            max_minutes=number(request, "max_minutes", cls.max_minutes, 0.1, 1440.0),
            learning_rate=number(request, "learning_rate", cls.learning_rate, 1e-7, 1e-2),
            batch_size=int(number(request, "batch_size", cls.batch_size, 1, 16)),
            device=device(request),
        )


def number(request: Mapping[str, Any], key: str, default: float, lowest: float, highest: float) -> float:
    """A number of a request, brought into its bounds.

    Raises:
        UsageError: it is no number.
    """
    given = _first(request.get(key))
    if given is None:
        return default
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value):
        raise UsageError(key, "is not a number", f"give one from {lowest:g} to {highest:g}")
    return min(max(value, lowest), highest)


def devices() -> list[str]:
    """What a client can choose from."""
    import torch

    return ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def device(request: Mapping[str, Any]) -> str:
    """The device of a request, auto when this machine does not have it."""
    given = str(_first(request.get("device")))
    return given if given in devices() else "auto"


def _flag(request: Mapping[str, Any], key: str) -> bool:
    return str(_first(request.get(key))).lower() in ("true", "1", "yes")


def _first(value: Any) -> Any:
    """A choice of several is sent as a list by some clients, the chosen one first."""
    return (value[0] if value else None) if isinstance(value, list) else value


def _highest(dtype: str) -> int:
    return 2**24 if dtype == "float32" else int(np.iinfo(dtype).max)
