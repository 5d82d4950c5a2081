"""From a volume to labels on its own grid: the one engine behind every entry point.

`SliceInferer` is offered here by name, which is how bundles of 2D networks name it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.inference.slice_inferer import SliceInferer

__all__ = ["SliceInferer"]


def __getattr__(name: str) -> Any:
    """Import the inferer where it is first used (PEP 562)."""
    if name != "SliceInferer":
        raise AttributeError(f"module 'medseg.inference' has no attribute {name!r}")
    from medseg.inference.slice_inferer import SliceInferer

    return SliceInferer
