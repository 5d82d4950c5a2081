"""Checkpoints of D-Former in the layout of the published code, whose keys are the network's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from medseg.checkpoints.state import PretrainedReport, load_partly, load_strictly, source_of, strip_wrapper
from medseg.errors import BundleError
from medseg.networks.dformer import DFormer

_PATCH = "model_down.patch_embed.proj.weight"
_BLOCK = re.compile(r"model_down\.layers\.(\d)\.blocks\.(\d+)\.norm1\.weight")


def load_published(config: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Build D-Former and load a whole state dict.

    Args:
        config: arguments of `DFormer`. Heads, group size and intervals are not in the tensors and have the published
            defaults; the others follow from the tensors where they are left out.
        state: the published state dict.

    Raises:
        ValueError: the configuration is none.
        BundleError: the state dict does not fit it.
    """
    bare, _ = strip_wrapper(state, _PATCH)
    network = DFormer(**{**_facts(bare, source_of(state)), **config})
    load_strictly(network, bare, source=source_of(state))
    return network


def load_pretrained(network: nn.Module, state: dict[str, Tensor]) -> PretrainedReport:
    """Start a D-Former from another one's checkpoint, in place.

    Args:
        network: a `DFormer` of the same size; classifiers with another number of classes keep their initial values.
        state: the other one's state dict.

    Raises:
        BundleError: another shape outside the classifiers; nothing is loaded then.
    """
    bare, outside = strip_wrapper(state, _PATCH)
    classifiers = [f"final.{level}.1." for level in range(3)]
    return load_partly(network, bare, source=source_of(state), head=classifiers, unused=outside)


def _facts(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The configuration that keys and shapes tell."""
    patch = state[_PATCH]
    if patch.ndim != 5:
        raise BundleError(source, f"{_PATCH} has shape {tuple(patch.shape)}, not five axes")
    facts: dict[str, Any] = {
        "embed_dim": patch.shape[0],
        "in_channels": patch.shape[1],
        "patch_size": tuple(patch.shape[2:]),
        "patch_norm": "model_down.patch_embed.norm.weight" in state,
        "qkv_bias": "model_down.layers.0.blocks.0.attn.qkv.bias" in state,
    }
    levels = [int(found[1]) for found in map(_BLOCK.fullmatch, state) if found]
    if set(levels) == {0, 1, 2, 3}:
        facts["depths"] = tuple(levels.count(level) for level in range(4))
    mlp = state.get("model_down.layers.0.blocks.0.mlp.fc1.weight")
    if mlp is not None:
        facts["mlp_ratio"] = mlp.shape[0] / patch.shape[0]
    head = state.get("final.0.1.weight")
    if head is not None:
        facts["num_classes"] = head.shape[0]
    return facts
