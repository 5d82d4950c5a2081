"""Time of medseg's resampling beside SciPy's and MONAI's, in one run.

    OMP_NUM_THREADS=1 python benchmarks/resampling.py

Process CPU time, one thread, the methods one after the other in each of three rounds; the median counts. The volume is
int16 with structure of a few voxels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Spacing
from scipy import ndimage

from medseg.inference.resample import resample_cubic, resample_linear

CASES = (((256, 256, 100), (0.8, 0.8, 1.5)), ((512, 512, 150), (0.8, 0.8, 1.0)))
WANTED_MM = 1.5
ROUNDS = 3


def methods(
    scan: np.ndarray, spacing: tuple[float, ...], shape: tuple[int, ...], step: list[float]
) -> Mapping[str, Callable[[], Any]]:
    """Each way to the wanted grid, by name."""
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))

    def scipy(order: int) -> np.ndarray:
        places = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, step, strict=True)), indexing="ij")
        return ndimage.map_coordinates(scan.astype(np.float32), places, order=order, mode="nearest")

    def monai(mode: str | int) -> np.ndarray:
        image = MetaTensor(torch.from_numpy(scan[None].astype(np.float32)), affine=affine)
        return np.asarray(Spacing((WANTED_MM,) * 3, mode=mode)(image))[0]

    return {
        "medseg linear": lambda: resample_linear(scan[None], shape, step)[0].numpy(),
        "MONAI Spacing bilinear": lambda: monai("bilinear"),
        "medseg cubic": lambda: resample_cubic(scan[None], shape, step)[0].numpy(),
        "SciPy order 3": lambda: scipy(3),
        "MONAI Spacing order 3": lambda: monai(3),
    }


def main() -> None:
    """Print one table for each case."""
    torch.set_num_threads(1)
    for size, spacing in CASES:
        random = np.random.default_rng(0)
        scan = (3000 * ndimage.gaussian_filter(random.normal(size=size), 2)).astype(np.int16)
        step = [WANTED_MM / one for one in spacing]
        shape = tuple(round((n - 1) / s + 1) for n, s in zip(size, step, strict=True))
        seconds: dict[str, list[float]] = {}
        results: dict[str, np.ndarray] = {}
        for _ in range(ROUNDS):
            for name, run in methods(scan, spacing, shape, step).items():
                begin = time.process_time()
                results[name] = run()
                seconds.setdefault(name, []).append(time.process_time() - begin)
        print(f"{size} at {spacing} mm -> {shape} at {WANTED_MM} mm")
        cubic = results["SciPy order 3"]
        for name, times in seconds.items():
            each = statistics.median(times) / np.prod(shape) * 1e9
            error = float(np.abs(results[name] - cubic).mean())
            print(f"  {name:24} {each:7.1f} ns a voxel, mean difference from SciPy order 3 {error:.5f}")


if __name__ == "__main__":
    main()
