"""MONAI's networks that bundles of other authors may name, each by its exact name and with checked arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

PREFIX = "monai."
"""Stands before the class in `BundleSpec.network`."""

_MODULE = "monai.networks.nets"
# Each is a plain network: images in, logits out, all arguments numbers, texts and lists, no downloads.
_NAMES = (
    "AttentionUnet",
    "BasicUNet",
    "DynUNet",
    "HighResNet",
    "MedNeXt",
    "SegResNet",
    "SegResNetDS",
    "SwinUNETR",
    "UNETR",
    "UNet",
    "VNet",
)
# Older versions of MONAI had these names and arguments; the weights are the same without them.
_ALIASES = {
    "Unet": "UNet",
    "BasicUnet": "BasicUNet",
    "Basicunet": "BasicUNet",
    "DynUnet": "DynUNet",
    "Dynunet": "DynUNet",
}
_GONE = {"SwinUNETR": ("img_size",), "UNETR": ("pos_embed",)}


def zoo_network(target: str) -> str | None:
    """The name in `BundleSpec.network` of what a configuration calls ``_target_``, or None when it is not allowed."""
    prefix, _, name = target.rpartition(".")
    name = _ALIASES.get(name, name)
    of_monai = prefix in ("", _MODULE) or prefix.startswith(_MODULE + ".")
    return PREFIX + name if of_monai and name in _NAMES else None


def known_networks() -> str:
    """The allowed names, for messages."""
    return ", ".join(_NAMES)


def checked_arguments(network: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a network without those that MONAI has dropped.

    Raises:
        ValueError: a value is neither a number nor a text nor made of them.
    """
    kept = {key: value for key, value in arguments.items() if key not in _GONE.get(network.removeprefix(PREFIX), ())}
    for key, value in kept.items():
        if not _plain(value):
            raise ValueError(f"{key} is {value!r}")
    return kept


def create_zoo_network(network: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network of MONAI with random weights.

    Args:
        network: a name of `zoo_network`.
        arguments: of its constructor.

    Raises:
        ValueError: the name is not allowed, or the arguments do not fit.
    """
    name = network.removeprefix(PREFIX)
    if name not in _NAMES:
        raise ValueError(f"unknown network {network!r}; known: {known_networks()}")
    from monai.networks import nets

    try:
        found: nn.Module = getattr(nets, name)(**checked_arguments(network, arguments))
    except Exception as err:  # whatever a constructor makes of numbers that do not fit together
        raise ValueError(f"{name}: {err}") from err
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and key[:1] != "_" and _plain(one) for key, one in value.items())
    if isinstance(value, list):
        return all(_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str)
