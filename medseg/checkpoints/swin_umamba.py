"""Published weights of Swin-UMamba, and VMamba-tiny for its encoder.

The published keys are the network's own. nnU-Net's file says in ``trainer_name`` which of the two networks it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from medseg.checkpoints.state import PretrainedReport, load_strictly, source_of, strip_wrapper
from medseg.checkpoints.vmamba import ENCODER_ANCHOR, encoder_config, is_family, load_family, load_vmamba
from medseg.networks.registry import create

# The stem stands before the encoder, so that VMamba's patch embedding has other shapes than this network's. The
# published list names its norm's weight twice and the bias not at all, and that bias is loaded.
_DROPPED = ("patch_embed.proj.weight", "patch_embed.proj.bias", "patch_embed.norm.weight")
_HEADS = ("out_layers.",)


def load_published(config: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Build a trained Swin-UMamba from its published state dict.

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
    network = create("swin_umamba", **{**_config(trained), **config})
    load_strictly(network, trained, source=source_of(state))
    return network.eval()


def load_pretrained(network: nn.Module, state: dict[str, Tensor]) -> PretrainedReport:
    """Start a Swin-UMamba from VMamba-tiny or from another Swin-UMamba, in place.

    Args:
        network: a Swin-UMamba; for VMamba-tiny with the default encoder.
        state: VMamba's keys, or a Swin-UMamba's, of which everything is taken but heads for other classes.

    Raises:
        BundleError: the file is for another size of the network; the network is unchanged then.
    """
    if is_family(state):
        return load_family(network, state, head=_HEADS)
    return load_vmamba(network, state, dropped=_DROPPED)


def _config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments, as far as the tensors tell them."""
    names = {"depths": "encoder_depths", "dims": "encoder_dims", "d_state": "d_state"}
    config = {names[name]: value for name, value in encoder_config(state).items()}
    if "encoder_dims" in config:
        config["hidden_size"] = config["encoder_dims"][-1]
    stem, head = state.get("stem.0.weight"), state.get("out_layers.0.conv.conv.bias")
    if stem is not None and stem.ndim == 4:
        config["in_channels"] = stem.shape[1]
    if head is not None:
        config["out_channels"] = len(head)
    convolutions = [state.get(f"encoder{i}.layer.conv1.conv.weight") for i in range(1, 6)]
    if all(weight is not None for weight in convolutions):
        config["feature_sizes"] = tuple(len(weight) for weight in convolutions if weight is not None)
    return config
