"""Published weights of TransUNet.

The network's parameters carry their published names, so that a trained checkpoint needs no translation. Google's
ImageNet-21k files of the vision transformer (`.npz`) hold the same tensors under other names and with other axes; they
fill everything under ``transformer.`` and leave decoder and head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any, cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from medseg.checkpoints.state import PretrainedReport, load_partly, load_strictly, source_of, strip_wrapper
from medseg.errors import BundleError
from medseg.networks.registry import create
from medseg.networks.transunet import TransUNet

ANCHOR = "segmentation_head.0.weight"
POSITIONS = "transformer.embeddings.position_embeddings"
NPZ_POSITIONS = "Transformer/posembed_input/pos_embedding"

# Parts of the ImageNet files that a segmenter has no use for.
_NPZ_UNUSED = re.compile(r"cls|(pre_logits|head)/.*")

# From a module's name to its name in the ImageNet files, applied in this order.
_NPZ_MODULES = (
    (r"^transformer\.embeddings\.patch_embeddings", "embedding"),
    (r"^transformer\.embeddings\.hybrid_model\.root\.(conv|gn)", r"\1_root"),
    (r"^transformer\.embeddings\.hybrid_model\.body\.", ""),
    (r"\.downsample$", ".conv_proj"),
    (r"^transformer\.encoder\.encoder_norm", "Transformer/encoder_norm"),
    (r"^transformer\.encoder\.layer\.", "Transformer/encoderblock_"),
    (r"\.attention_norm$", ".LayerNorm_0"),
    (r"\.ffn_norm$", ".LayerNorm_2"),
    (r"\.attn\.", ".MultiHeadDotProductAttention_1."),
    (r"\.ffn\.fc1$", ".MlpBlock_3.Dense_0"),
    (r"\.ffn\.fc2$", ".MlpBlock_3.Dense_1"),
    (r"\.", "/"),
)


def load_published(config: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Build a trained TransUNet from its published state dict.

    Args:
        config: the constructor's arguments; the number of heads does not follow from the tensors.
        state: published keys, without the prefixes of data-parallel training.

    Returns:
        The network in eval mode.

    Raises:
        ValueError: the configuration is not allowed.
        BundleError: missing, unexpected or wrongly shaped keys, or an ImageNet file, which is no whole model.
    """
    if NPZ_POSITIONS in state:
        raise BundleError(
            source_of(state),
            "ImageNet weights of the transformer, without decoder and head",
            "start a training from it, or give the checkpoint of a trained TransUNet",
        )
    network = create("transunet", **config)
    trained, _ = strip_wrapper(state, ANCHOR)
    load_strictly(network, trained, source=source_of(state))
    return network.eval()


def load_pretrained(network: nn.Module, state: dict[str, Tensor]) -> PretrainedReport:
    """Start a TransUNet from ImageNet weights or from another TransUNet, in place.

    Position embeddings of another grid are interpolated. Of another TransUNet everything is taken but a head for
    another number of classes.

    Args:
        network: a TransUNet.
        state: Google's `R50+ViT-B_16`, `ViT-B_16` or `ViT-L_16`, or a published TransUNet.

    Raises:
        BundleError: the file is for another size of the network; the network is unchanged then.
    """
    if NPZ_POSITIONS in state:
        return _load_imagenet(cast("TransUNet", network), state)
    trained, unused = strip_wrapper(state, ANCHOR)
    adapted = {}
    tokens = network.state_dict()[POSITIONS].shape[1]
    found = trained.get(POSITIONS)
    if found is not None and found.shape[1] != tokens and isqrt(found.shape[1]) ** 2 == found.shape[1]:
        trained[POSITIONS] = _resized_grid(found, tokens)
        adapted[POSITIONS] = _how_resized(found.shape[1], tokens)
    return load_partly(
        network,
        trained,
        source=source_of(state),
        head=("segmentation_head.",),
        adapted=adapted,
        unused=unused,
    )


def _load_imagenet(network: TransUNet, state: dict[str, Tensor]) -> PretrainedReport:
    """Fill everything under ``transformer.`` from a Google file; all names and shapes are compared before."""
    own = {key: value for key, value in network.state_dict().items() if key.startswith("transformer.")}
    names = {key: npz_name(key) for key in own}
    heads = network.num_heads
    wrong = {
        name: f"{name} is {tuple(state[name].shape)}, not {want}"
        for key, name in names.items()
        if name in state and (want := _npz_misfit(key, state[name], own[key], heads))
    }
    known = set(names.values())
    unused = [key for key in state if key not in known and _NPZ_UNUSED.fullmatch(key)]
    differences = {
        "missing": [name for name in names.values() if name not in state],
        "unexpected": [key for key in state if key not in known and key not in unused],
        "of another shape": list(wrong.values()),
    }
    if any(differences.values()):
        listed = "; ".join(
            f"{kind}: {len(entries)} ({', '.join(entries[:3])}{', ...' if len(entries) > 3 else ''})"
            for kind, entries in differences.items()
            if entries
        )
        raise BundleError(source_of(state), f"does not fit this TransUNet; {listed}", "nothing was loaded")

    values = {key: _from_npz(key, state[name], own[key].ndim) for key, name in names.items() if key != POSITIONS}
    values[POSITIONS], how = _imagenet_positions(state[NPZ_POSITIONS], own[POSITIONS].shape[1])
    return load_partly(
        network,
        values,
        source=source_of(state),
        adapted={POSITIONS: how} if how else {},
        unused=unused,
    )


def npz_name(key: str) -> str:
    """The name in the ImageNet files of one of the network's keys under ``transformer.``."""
    if key == POSITIONS:
        return NPZ_POSITIONS
    module, _, kind = key.rpartition(".")
    is_norm = module.rpartition(".")[2].startswith("gn") or module.endswith("norm")
    for pattern, replacement in _NPZ_MODULES:
        module = re.sub(pattern, replacement, module)
    return f"{module}/" + ("bias" if kind == "bias" else "scale" if is_norm else "kernel")


def _npz_misfit(key: str, found: Tensor, own: Tensor, heads: int) -> str:
    """The shape that an ImageNet tensor should have, or nothing if it has it.

    Heads are compared too: the reshape to (hidden_size, hidden_size) would hide another number of them.
    """
    shape: tuple[int, ...] = tuple(own.shape)
    if key == POSITIONS:
        fits = found.ndim == 3 and found.shape[0] == 1 and found.shape[2] == shape[2]
        grid = found.shape[1] - 1 if fits else 0  # without the class token
        return "" if fits and (grid + 1 == shape[1] or 0 < grid == isqrt(grid) ** 2) else f"(1, 1 + n * n, {shape[2]})"
    if own.ndim == 4:  # convolution: HWIO
        shape = (*shape[2:], shape[1], shape[0])
    elif re.search(r"\.attn\.(query|key|value)\.", key):
        split = (heads, shape[0] // heads)
        shape = split if own.ndim == 1 else (shape[1], *split)
    elif key.endswith(".attn.out.weight"):
        shape = (heads, shape[1] // heads, shape[0])
    elif own.ndim == 2:
        shape = (shape[1], shape[0])
    elif found.numel() == own.numel() == max(found.shape):  # group norms: (1, 1, 1, C) or (C,)
        return ""
    return "" if tuple(found.shape) == shape else str(shape)


def _from_npz(key: str, found: Tensor, ndim: int) -> Tensor:
    """An ImageNet tensor with the network's axes, of which there are `ndim`."""
    if ndim == 1:
        return found.flatten()
    if ndim == 4:
        return rearrange(found, "h w i o -> o i h w")
    if key.endswith(".attn.out.weight"):
        return rearrange(found, "heads d o -> o (heads d)")
    if ".attn." in key:
        return rearrange(found, "i heads d -> (heads d) i")
    return found.T


def _imagenet_positions(found: Tensor, tokens: int) -> tuple[Tensor, str]:
    """Position embeddings (1, n, hidden) for `tokens` tokens, and what was done, empty for a plain copy.

    The first row is the class token's, unless there are exactly as many rows as tokens.
    """
    rows = found.shape[1]
    if rows == tokens:
        return found, ""
    if rows - 1 == tokens:
        return found[:, 1:], "class token dropped"
    return _resized_grid(found[:, 1:], tokens), f"class token dropped, {_how_resized(rows - 1, tokens)}"


def _resized_grid(positions: Tensor, tokens: int) -> Tensor:
    """Square grid of position embeddings (1, n, hidden) to (1, tokens, hidden), linearly, corners on corners."""
    grid = rearrange(positions.double(), "1 (h w) c -> 1 c h w", h=isqrt(positions.shape[1]))
    resized = F.interpolate(grid, size=(isqrt(tokens), isqrt(tokens)), mode="bilinear", align_corners=True)
    return rearrange(resized, "1 c h w -> 1 (h w) c").to(positions.dtype)


def _how_resized(rows: int, tokens: int) -> str:
    side_in, side_out = isqrt(rows), isqrt(tokens)
    return f"interpolated from {side_in} x {side_in} to {side_out} x {side_out}"
