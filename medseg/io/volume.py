"""What a reader returns: voxels, where they lie in space, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Source:
    """Where a volume came from.

    Attributes:
        path: the file as the user named it (the first, when several make up the channels).
        format: "nifti", "itk", ...
        header: what the writer copies geometry from (a nibabel header for NIfTI, else None).
        sha256: digest of the file's bytes, hexadecimal; of all files in order when there are several.
        warnings: what the reader had to assume or replace, one sentence each; no patient identity.
    """

    path: Path
    format: str
    header: Any = None
    sha256: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Volume:
    """A scan in memory.

    Attributes:
        data: voxels (C, X, Y, Z), float32, finite, scl_slope and scl_inter applied.
        affine: voxel index to RAS millimetres, (4, 4) float64.
        source: where it came from.
    """

    data: NDArray[np.float32]
    affine: NDArray[np.float64]
    source: Source = field(repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Spatial shape (X, Y, Z)."""
        x, y, z = self.data.shape[1:]
        return x, y, z
