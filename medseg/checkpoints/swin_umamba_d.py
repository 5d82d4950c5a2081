"""Published weights of Swin-UMamba-D, and VMamba-tiny for its encoder.

The published keys are the network's own. nnU-Net's file says in ``trainer_name`` which of the two networks it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from medseg.checkpoints.state import PretrainedReport, load_strictly, source_of, strip_wrapper
from medseg.checkpoints.vmamba import ENCODER_ANCHOR, encoder_config, is_family, load_family, load_vmamba, stage_depths
from medseg.networks.registry import create
from medseg.networks.swin_umamba_d import SwinUMambaD

_RGB = 3
_PATCH_EMBED = tuple(f"patch_embed.{key}" for key in ("proj.weight", "proj.bias", "norm.weight", "norm.bias"))
_HEADS = ("decoder.seg_layers.",)


def load_published(config: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Build a trained Swin-UMamba-D from its published state dict.

    Args:
        config: the constructor's arguments; all but `deep_supervision` may be left out, since the tensors tell them.
        state: published keys, bare or inside another module.

    Returns:
        The network in eval mode.

    Raises:
        ValueError: the configuration is not allowed.
        BundleError: missing, unexpected or wrongly shaped keys.
    """
    trained, _ = strip_wrapper(state, ENCODER_ANCHOR)
    network = create("swin_umamba_d", **{**_config(trained), **config})
    load_strictly(network, trained, source=source_of(state))
    return network.eval()


def load_pretrained(network: nn.Module, state: dict[str, Tensor]) -> PretrainedReport:
    """Start a Swin-UMamba-D from VMamba-tiny or from another Swin-UMamba-D, in place.

    Args:
        network: a Swin-UMamba-D; for VMamba-tiny with the default encoder. VMamba's patch embedding is taken where the
            image has three channels.
        state: VMamba's keys, or a Swin-UMamba-D's, of which everything is taken but heads for other classes.

    Raises:
        BundleError: the file is for another size of the network; the network is unchanged then.
    """
    if is_family(state):
        return load_family(network, state, head=_HEADS)
    in_channels = cast("SwinUMambaD", network).in_channels
    return load_vmamba(network, state, dropped=() if in_channels == _RGB else _PATCH_EMBED)


def _config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments, as far as the tensors tell them."""
    names = {"depths": "encoder_depths", "dims": "dims", "d_state": "d_state"}
    config = {names[name]: value for name, value in encoder_config(state).items()}
    decoder_depths = stage_depths(state, "decoder.stages.", stages=3)
    if min(decoder_depths) > 0:
        config["decoder_depths"] = decoder_depths
    if state[ENCODER_ANCHOR].ndim == 4:
        config["in_channels"], config["patch_size"] = state[ENCODER_ANCHOR].shape[1:3]
    head = state.get("decoder.seg_layers.3.bias")
    if head is not None:
        config["out_channels"] = len(head)
    return config
