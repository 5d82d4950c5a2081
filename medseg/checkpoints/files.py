"""Weights files, read without running anything that they contain.

Pickled files go through ``torch.load(weights_only=True)``, an interpreter that knows tensors and plain containers
only. Training programs store more beside the weights: scores as NumPy scalars, settings as objects. For the former
this module has stand-ins, which make plain numbers; the latter become `Inert` objects, which do nothing. A pickle that
calls any other function is refused. No code of the file's choosing runs in any case.
"""

from __future__ import annotations

from pathlib import Path

from medseg.checkpoints.state import State


def read(path: Path | str) -> State:
    """TODO."""
    raise NotImplementedError(path)
