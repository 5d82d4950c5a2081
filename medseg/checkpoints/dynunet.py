"""Checkpoints of MONAI's DynUNet, as the public model zoo holds them: its keys without the chain of skip layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from medseg.checkpoints.state import PretrainedReport, load_partly, load_strictly, source_of, strip_wrapper
from medseg.networks.dynunet import DynUNet

_FIRST = "input_block.conv1.conv.weight"
_CHAIN = "skip_layers."  # the same tensors under second names


def load_published(config: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Build a DynUNet and load a whole state dict.

    Args:
        config: arguments of `DynUNet`; strides and kernels are not in the tensors.
        state: the published state dict.

    Raises:
        ValueError: the configuration is none.
        BundleError: the state dict does not fit it.
    """
    bare, _ = strip_wrapper(state, _FIRST)
    network = DynUNet(**config)
    load_strictly(network, _once(bare), source=source_of(state))
    return network


def load_pretrained(network: nn.Module, state: dict[str, Tensor]) -> PretrainedReport:
    """Start a DynUNet from another one's checkpoint, in place.

    Args:
        network: a `DynUNet` of the same size; outputs with another number of classes keep their initial values.
        state: the other one's state dict.

    Raises:
        BundleError: another shape outside the outputs; nothing is loaded then.
    """
    bare, outside = strip_wrapper(state, _FIRST)
    outputs = ["output_block.", "deep_supervision_heads."]
    return load_partly(network, _once(bare), source=source_of(state), head=outputs, unused=outside)


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(_CHAIN)}
