"""VMamba's ImageNet weights, and the encoder that the Swin-UMamba family has from it.

The file is VMamba-tiny of MzeroMiko/VMamba, release tag 20240218, ``vssmtiny_dp01_ckpt_epoch_292.pth``: 3 image
channels, 4 x 4 patches, widths 96 to 768, depths 2, 2, 9, 2, state 16.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from medseg.checkpoints.state import PretrainedReport, load_partly, rename, source_of, strip_wrapper
from medseg.errors import BundleError

ENCODER = "vssm_encoder."
ENCODER_ANCHOR = ENCODER + "patch_embed.proj.weight"
VMAMBA_ANCHOR = "patch_embed.proj.weight"
_STAGES = 4

# The classifier on top of VMamba; a segmentation network has neither.
_CLASSIFIER = ("norm.weight", "norm.bias", "head.weight", "head.bias")


def load_vmamba(network: nn.Module, state: Mapping[str, Tensor], *, dropped: Collection[str]) -> PretrainedReport:
    """Fill a network's ``vssm_encoder`` from VMamba, in place.

    Args:
        network: a network of the Swin-UMamba family.
        state: VMamba's keys.
        dropped: VMamba's keys that the network is not to have, besides the classifier.

    Raises:
        BundleError: a tensor has another shape, or the file's downsampling has no place in the network; the network is
            unchanged then.
    """
    source = source_of(state)
    vmamba, outside = strip_wrapper(state, VMAMBA_ANCHOR)
    unwanted = [key for key in vmamba if key in dropped or key in _CLASSIFIER]
    encoder = rename({key: value for key, value in vmamba.items() if key not in unwanted}, _encoder_key)
    own = network.state_dict()
    homeless = [key for key in encoder if key.startswith(ENCODER + "downsamples.") and key not in own]
    if homeless:
        raise BundleError(source, f"{type(network).__name__} has no {', '.join(homeless)}", "is it another VMamba?")
    report = load_partly(network, encoder, source=source, unused=(*outside, *unwanted))
    ignored = [key for key in encoder if key not in own]
    if not ignored:
        return report
    note = f"{len(ignored)} keys of VMamba are not in this network and were ignored, {ignored[0]} the first"
    return dataclasses.replace(report, notes=(*report.notes, note))


def load_family(network: nn.Module, state: Mapping[str, Tensor], *, head: Collection[str]) -> PretrainedReport:
    """Fill a network from a checkpoint of its own architecture; heads for other classes are left.

    Args:
        network: a network of the Swin-UMamba family.
        state: published keys, in whatever module they were wrapped.
        head: prefixes of the heads' keys.

    Raises:
        BundleError: a tensor outside the heads has another shape; the network is unchanged then.
    """
    trained, unused = strip_wrapper(state, ENCODER_ANCHOR)
    return load_partly(network, trained, source=source_of(state), head=head, unused=unused)


def is_family(state: Mapping[str, Tensor]) -> bool:
    """Whether the state dict is a Swin-UMamba's, rather than VMamba's."""
    return any(key == ENCODER_ANCHOR or key.endswith("." + ENCODER_ANCHOR) for key in state)


def stage_depths(state: Mapping[str, Tensor], prefix: str, *, stages: int) -> tuple[int, ...]:
    """Number of blocks in each stage ``<prefix><i>.blocks.<j>``, i < `stages`."""
    found = (re.match(re.escape(prefix) + r"(\d+)\.blocks\.(\d+)\.", key) for key in state)
    blocks = {(int(match[1]), int(match[2])) for match in found if match}
    return tuple(sum(stage == i for stage, _ in blocks) for i in range(stages))


def encoder_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the tensors of ``vssm_encoder`` tell of the configuration.

    Args:
        state: published keys of a network of the Swin-UMamba family.

    Returns:
        ``depths``, ``dims`` and ``d_state``, as far as the keys are there; what is missing shows when they are loaded.
    """
    depths = stage_depths(state, ENCODER + "layers.", stages=_STAGES)
    norms = [state.get(f"{ENCODER}layers.{i}.blocks.0.ln_1.weight") for i in range(_STAGES)]
    rates = state.get(f"{ENCODER}layers.0.blocks.0.self_attention.A_logs")
    config: dict[str, Any] = {}
    if min(depths) > 0:
        config["depths"] = depths
    if all(norm is not None for norm in norms):
        config["dims"] = tuple(len(norm) for norm in norms if norm is not None)
    if rates is not None and rates.ndim == 2:
        config["d_state"] = rates.shape[1]
    return config


def _encoder_key(key: str) -> str:
    return ENCODER + re.sub(r"^layers\.(\d+)\.downsample\.", r"downsamples.\1.", key)
