"""The architectures by name; a class is imported when it is asked for.

Adding an architecture is one file beside this one, one line here and one golden case.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_CLASSES = {
    "dformer": "medseg.networks.dformer:DFormer",
    "dynunet": "medseg.networks.dynunet:DynUNet",
    "mdpformer": "medseg.networks.mdpformer:MDPFormer",
    "paratranscnn": "medseg.networks.paratranscnn:ParaTransCNN",
    "plain_conv_unet": "medseg.networks.plain_conv_unet:PlainConvUNet",
    "resenc_unet": "medseg.networks.resenc_unet:ResidualEncoderUNet",
    "swin_umamba": "medseg.networks.swin_umamba:SwinUMamba",
    "swin_umamba_d": "medseg.networks.swin_umamba_d:SwinUMambaD",
    "swin_unetr": "medseg.networks.swin_unetr:SwinUNETR",
    "transunet": "medseg.networks.transunet:TransUNet",
}


def names() -> list[str]:
    """The registered architectures, sorted."""
    return sorted(_CLASSES)


def network_class(name: str) -> type[nn.Module]:
    """The class of an architecture.

    Raises:
        ValueError: the name is not registered.
    """
    if name not in _CLASSES:
        raise ValueError(f"unknown architecture {name!r}; known: {', '.join(names())}")
    module, _, attribute = _CLASSES[name].partition(":")
    found: type[nn.Module] = getattr(import_module(module), attribute)
    return found


def create(name: str, **config: Any) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: an architecture of `names()`.
        **config: the constructor's arguments, named as in the architecture's class.

    Raises:
        ValueError: unknown name, unknown argument, or a configuration the architecture does not allow.
    """
    cls = network_class(name)
    try:
        return cls(**config)
    except TypeError as err:
        raise ValueError(f"{name}: {err}") from err


def name_of(target: str) -> str | None:
    """The architecture that a bundle's ``_target_`` (``medseg.networks.SwinUNETR``) means, or None."""
    prefix, _, cls = target.rpartition(".")
    if prefix != "medseg.networks":
        return None
    return next((name for name, where in _CLASSES.items() if where.endswith(":" + cls)), None)


def target_of(name: str) -> str:
    """The ``_target_`` by which bundles name an architecture; the inverse of `name_of`."""
    network_class(name)
    return "medseg.networks." + _CLASSES[name].partition(":")[2]
