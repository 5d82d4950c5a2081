"""Overlap of two masks, and the error of a volume."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """Dice similarity coefficient, 2 |P and R| / (|P| + |R|).

    Args:
        prediction: mask (X, Y, Z).
        reference: mask (X, Y, Z).

    Returns:
        0 to 1; 0 when just one mask is empty, NaN (not applicable) when both are.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"masks must have one shape, got {prediction.shape} and {reference.shape}")
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    if total == 0:
        return math.nan
    return 2.0 * int(np.count_nonzero(prediction & reference)) / total


def volume_error_percent(prediction_ml: float, reference_ml: float) -> float:
    """Signed volume error in percent of the reference's volume; NaN when the reference is empty.

    Positive means that the prediction is too large. Volumes in millilitres.
    """
    return 100.0 * (prediction_ml - reference_ml) / reference_ml if reference_ml > 0 else math.nan
