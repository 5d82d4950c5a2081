"""Golden cases: what a published network computes when its state dict holds known values.

A case is ``<case>.json`` with ``<case>.npz`` beside it. The JSON holds ``config`` (the network's arguments), ``state``
(a list of key, shape, kind), ``inputs`` (shape by name), ``outputs`` (shape and stride by name, in the order in which
the network returns them), ``parameters`` (their number) and sometimes ``tolerance`` and ``npz`` (a second set of
tensors, as ``state``, imported as a pretrained start). Values follow from names alone: no case ships weights.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DEFAULT_FOLDER = HERE.parents[2] / "shared" / "golden"


@dataclass(frozen=True)
class Case:
    """One golden case on disk.

    Attributes:
        architecture: the registered name it belongs to.
        path: its JSON file.
    """

    architecture: str
    path: Path

    def __str__(self) -> str:
        return f"{self.architecture}/{self.path.stem}"

    def description(self) -> dict[str, Any]:
        """What the JSON file holds."""
        description: dict[str, Any] = json.loads(self.path.read_text())
        return description

    def outputs(self) -> dict[str, np.ndarray]:
        """The stored outputs, strided."""
        with np.load(self.path.with_suffix(".npz"), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def golden_folders() -> list[Path]:
    """The folders named by MEDSEG_GOLDEN, or the default one; each holds one folder for each architecture."""
    named = os.environ.get("MEDSEG_GOLDEN")
    return [Path(part) for part in named.split(os.pathsep) if part] if named else [DEFAULT_FOLDER]


def find_cases(architecture: str) -> list[Case]:
    """The cases of an architecture: the project's own first, then those of the golden folders."""
    paths = [HERE / f"{architecture}.json"]
    for folder in golden_folders():
        paths += sorted((folder / architecture).glob("*.json"))
    return [Case(architecture, path) for path in paths if path.is_file()]


def fill(entries: list[tuple[str, list[int], str]]) -> dict[str, np.ndarray]:
    """The values of a state dict, from its keys and shapes.

    Args:
        entries: (key, shape, kind); a ``keep`` entry is a buffer that the network computes itself and gets no value.
    """
    return {key: _value(key, tuple(shape), kind) for key, shape, kind in entries if kind != "keep"}


def draw_input(name: str, shape: list[int]) -> np.ndarray:
    """A standard normal float32 input, seeded by its name."""
    return _normal("input:" + name, tuple(shape))


def strided(output: np.ndarray, stride: list[int]) -> np.ndarray:
    """The part of an output that a case stores."""
    return output[tuple(slice(None, None, step) for step in stride)]


def _normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return generator.standard_normal(shape, dtype=np.float32)


def _value(key: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    if kind == "zero":
        return np.zeros(shape, np.int64)
    noise, tenth = _normal(key, shape), np.float32(0.1)
    if kind == "weight":  # keeps the size of activations: one over the root of the inputs of each output
        inputs = math.prod(shape[1:]) if len(shape) > 1 else max(shape[0], 1)
        return noise * np.float32(inputs) ** np.float32(-0.5)
    if kind == "scale":
        return 1 + tenth * noise
    if kind == "shift":
        return tenth * noise
    if kind == "var":
        return np.exp(tenth * noise)
    if kind == "a_log":  # state-space decay rates
        return np.log(np.arange(1, shape[-1] + 1, dtype=np.float32)) + tenth * noise
    if kind == "dt_bias":  # state-space time steps, before softplus
        return np.float32(-4) + np.float32(0.5) * noise
    raise ValueError(f"unknown kind {kind!r} of {key}")
