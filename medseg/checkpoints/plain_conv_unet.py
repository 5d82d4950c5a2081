"""Checkpoints of nnU-Net's PlainConvUNet, as nnU-Net v2 saves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from medseg.checkpoints.nnunet import load_first_names, load_pretrained
from medseg.networks.plain_conv_unet import PlainConvUNet

__all__ = ["load_pretrained", "load_published"]


def load_published(config: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Build a PlainConvUNet and load a whole state dict.

    Args:
        config: arguments of `PlainConvUNet`; strides and kernels are not in the tensors.
        state: the published state dict.

    Raises:
        ValueError: the configuration is none.
        BundleError: the state dict does not fit it.
    """
    return load_first_names(PlainConvUNet(**config), state)
