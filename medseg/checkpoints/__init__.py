"""Importers of published weights: published key layouts to the project's own networks.

One file a source, named as the architecture in `medseg.networks`. The public functions are imported on first use, so
that ``import medseg.checkpoints`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.checkpoints.files import read
    from medseg.checkpoints.load import load_pretrained, load_published
    from medseg.checkpoints.state import PretrainedReport

_PUBLIC = {
    "load_published": "medseg.checkpoints.load",
    "load_pretrained": "medseg.checkpoints.load",
    "PretrainedReport": "medseg.checkpoints.state",
    "read": "medseg.checkpoints.files",
}

__all__ = ["PretrainedReport", "load_pretrained", "load_published", "read"]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'medseg.checkpoints' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
