"""What a bundle has done to its finished label map; it agrees with MONAI's transforms of the same name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.bundles.spec import KeepLargest


def apply_label_steps(labels: NDArray[Any], steps: Sequence[KeepLargest]) -> NDArray[Any]:
    """Apply steps in order; the map (X, Y, Z) that is given may be changed."""
    for step in steps:
        values = step.labels or tuple(int(value) for value in np.unique(labels) if value)
        structure = ndimage.generate_binary_structure(3, step.connectivity)
        for group in [(value,) for value in values] if step.independent else [values]:
            found = np.isin(labels, group)
            pieces, count = ndimage.label(found, structure)
            if count > step.pieces:
                sizes = np.bincount(pieces.ravel())
                sizes[0] = 0
                kept = np.argsort(sizes)[::-1][: step.pieces]
                labels[found & ~np.isin(pieces, kept)] = 0
    return labels
