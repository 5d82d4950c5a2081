"""Fitting an architecture to data: its constructor's arguments, and the nearest window that it can take.

Each architecture's file holds a function `fit` of its own, since rules for sizes and names of arguments differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from medseg.networks.registry import network_class


@dataclass(frozen=True)
class Fit:
    """An architecture fitted to data.

    Attributes:
        arguments: of its constructor.
        size: a window it can take, (D, H, W) or (H, W); no axis is smaller than what was wanted.
    """

    arguments: Mapping[str, Any]
    size: tuple[int, ...]


def fit(name: str, size: Sequence[int], *, in_channels: int, out_channels: int, given: Mapping[str, Any]) -> Fit:
    """Fit an architecture to data.

    Args:
        name: a registered architecture.
        size: the wanted window, (D, H, W) or (H, W).
        in_channels: channels that the network will see.
        out_channels: classes including background.
        given: constructor arguments that are decided already.

    Raises:
        ValueError: unknown architecture, or data that it cannot take.
    """
    module = import_module(network_class(name).__module__)
    found: Fit = module.fit(tuple(size), in_channels=in_channels, out_channels=out_channels, given=given)
    return found


def round_up(size: Sequence[int], step: int) -> tuple[int, ...]:
    """Each axis to the next positive multiple of `step`."""
    return tuple(max(-(-n // step), 1) * step for n in size)


def strided_window(size: Sequence[int], divisor: Sequence[int]) -> tuple[int, ...]:
    """The smallest window over `size` that a U-Net's strides divide, with more than one voxel at the bottleneck."""
    window = [round_up((n,), step)[0] for n, step in zip(size, divisor, strict=True)]
    if window == list(divisor):
        window[list(size).index(max(size))] *= 2
    return tuple(window)
