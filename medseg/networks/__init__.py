"""Published architectures, one file each; see `medseg.networks.registry`.

The classes are also offered here by name (``medseg.networks.SwinUNETR``), which is how bundles name them.
"""

from __future__ import annotations

from typing import Any

from medseg.networks.registry import create, name_of, names, network_class, target_of

__all__ = ["create", "name_of", "names", "network_class", "target_of"]


def __getattr__(attribute: str) -> Any:
    """Import an architecture's class where it is first used."""
    name = name_of("medseg.networks." + attribute)
    if name is None:
        raise AttributeError(f"module 'medseg.networks' has no attribute {attribute!r}")
    return network_class(name)
