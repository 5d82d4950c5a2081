"""What a reader returns: voxels, where they lie in space, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DicomFrames:
    """The images that a DICOM volume was read from; their headers stay on disk.

    Attributes:
        files: file of each slice along the third axis, relative to the folder or archive; "." when the path itself is
            the file.
        numbers: frame of each slice in its file, counted from 0.
        shape: (X, Y, Z) of the images.
        affine: of the images to RAS mm; not the volume's when a gantry tilt was taken out.
        modality: "CT", "MR", ...
        referable: whether the images have all identifiers that another DICOM object needs to refer to them.
        assigned: whether identifiers that they lack are made up where one is needed.
    """

    files: tuple[Path, ...]
    numbers: tuple[int, ...]
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    modality: str
    referable: bool
    assigned: bool = False


@dataclass(frozen=True)
class Source:
    """Where a volume came from.

    Attributes:
        path: the file or folder as the user named it (the first, when several make up the channels).
        format: "nifti", "itk" or "dicom".
        header: what the writer copies geometry from (a nibabel header), None when the affine is enough.
        sha256: digest of the file's bytes, hexadecimal; of all files in order when there are several. Of a DICOM
            series the digest of its files' sorted hexadecimal digests.
        warnings: what the reader had to assume or replace, one sentence each; no patient identity.
        dicom: the images, for a DICOM volume.
        dtype: type of the stored values ("int16").
    """

    path: Path
    format: str
    header: Any = None
    sha256: str = ""
    warnings: tuple[str, ...] = ()
    dicom: DicomFrames | None = None
    dtype: str = ""


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
