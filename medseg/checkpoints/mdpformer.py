"""Checkpoints of MDPFormer; none are published, so these are this project's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from medseg.checkpoints.state import PretrainedReport, load_partly, load_strictly, source_of, strip_wrapper
from medseg.networks.mdpformer import MDPFormer

_FIRST = "s_path.encoder.0.conv1.conv.weight"


def load_published(config: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Build an MDPFormer and load a whole state dict.

    Args:
        config: arguments of `MDPFormer`.
        state: its state dict.

    Raises:
        ValueError: the configuration is none.
        BundleError: the state dict does not fit it.
    """
    bare, _ = strip_wrapper(state, _FIRST)
    network = MDPFormer(**config)
    load_strictly(network, bare, source=source_of(state))
    return network


def load_pretrained(network: nn.Module, state: dict[str, Tensor]) -> PretrainedReport:
    """Start an MDPFormer from another one, in place: with other classes, or from an S-path trained alone.

    Args:
        network: an `MDPFormer` with an S-path of the same size; other outputs keep their initial values.
        state: the other one's state dict.

    Raises:
        BundleError: another shape in the S-path; nothing is loaded then.
    """
    bare, outside = strip_wrapper(state, _FIRST)
    outputs = ["s_path.head.", "patient.", "c_path."]
    return load_partly(network, bare, source=source_of(state), head=outputs, unused=outside)
