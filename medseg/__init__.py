"""medseg: segmentation of medical volumes with published networks.

The public API is loaded on first use, so that ``import medseg`` and ``medseg --help`` stay fast:
neither torch nor MONAI is imported before a function needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from medseg.bundles.load import load_bundle
    from medseg.inference.run import Result, infer
    from medseg.io.read import read_volume
    from medseg.io.write import write_labels

_PUBLIC = {
    "infer": "medseg.inference.run",
    "Result": "medseg.inference.run",
    "load_bundle": "medseg.bundles.load",
    "read_volume": "medseg.io.read",
    "write_labels": "medseg.io.write",
}

__all__ = ["Result", "__version__", "infer", "load_bundle", "read_volume", "write_labels"]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'medseg' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
