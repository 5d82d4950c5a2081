"""Published checkpoints of Swin UNETR: MONAI's releases and zoo, the research scripts, the self-supervised encoders.

Layouts: a full network (bare, or in a training checkpoint), the encoder alone with its keys at the root
(``model_swinvit.pt``), and the Disruptive Autoencoders encoder (``ssl_pretrained_weights.pth``). Nothing in keys or
shapes tells which patch merging the weights were trained with, see `medseg.networks.swin_unetr.SwinUNETR`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from medseg.checkpoints.state import (
    PretrainedReport,
    State,
    load_partly,
    load_strictly,
    rename,
    source_of,
    strip_prefixes,
)
from medseg.errors import BundleError
from medseg.networks.swin_unetr import Merging, SwinUNETR, merging_of

log = logging.getLogger(__name__)

Layout = Literal["full", "encoder", "disruptive autoencoder"]

_ANCHOR = "patch_embed.proj.weight"
_INDEX = ".relative_position_index"
_FACT_KEY = "swinViT.layers{stage}.0.blocks.0.attn.relative_position_bias_table"

# Parts of the self-supervised encoder file that a segmentation network has no place for.
_PRETEXT = (
    "norm.",
    "rotation_head.",
    "contrastive_head.",
    "convTrans3d.",
    "conv.",
    "rotation_pre.",
    "contrastive_pre.",
)

# Files published before MONAI 1.5 corrected the patch merging.
_LEGACY_FILES = re.compile(
    r"swin_unetr\.(base|small|tiny)_5000ep_f(48|24|12)_lr2e-4_pretrained\.pt"
    r"|model_swin_unetr_btcv_segmentation_v1\.pt"
    r"|fold[0-4]_f48_ep300_4gpu_dice0_\d{4}\.(zip|pt)"
    r"|model_swinvit\.pt|ssl_pretrained_weights\.pth"
)
_LEGACY_MD5 = (
    "50dd67a01b28a1d5487fd9ac27e682fb",
)  # the zoo's swin_unetr_btcv_segmentation 0.5.6, there named model.pt


@dataclass(frozen=True)
class _Found:
    """A state dict in MONAI's key names, and how it was found.

    Attributes:
        tensors: parameters by MONAI's keys.
        indices: index tables by MONAI's keys; the network computes its own.
        skipped: the file's keys that are no part of the network.
        layout: which of the published layouts it is.
        research: the layout is one of the research scripts', whose files were trained with the legacy merging.
        source: what messages call the file.
    """

    tensors: dict[str, Tensor]
    indices: dict[str, Tensor]
    skipped: tuple[str, ...]
    layout: Layout
    research: bool
    source: str


def load_published(config: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Build Swin UNETR, or its encoder from an encoder-only file.

    Args:
        config: arguments of `SwinUNETR`; all but `merging` follow from the tensors where they are left out. Without
            `merging`, files known by name or checksum and files in a research layout are taken as legacy, all others as
            current, and the assumption is logged. `img_size` of older MONAI configurations is ignored.
        state: the published state dict.

    Returns:
        The network, or the encoder, whose forward returns its five normalised feature maps, 1/2 to 1/32 of the image.

    Raises:
        ValueError: the configuration is none.
        BundleError: the state dict does not fit it.
    """
    found = _find(state)
    facts = _facts(found.tensors, found.source)
    given = {name: value for name, value in config.items() if name != "img_size"}
    if "merging" not in given:
        given["merging"] = _assumed_merging(found)
    network = SwinUNETR(**{"out_channels": 1, **facts, **given})
    target: nn.Module = network
    tensors = found.tensors
    if found.layout != "full":
        target = network.swinViT
        tensors = {key.removeprefix("swinViT."): value for key, value in tensors.items()}
    _check_indices(network, found)
    try:
        load_strictly(target, tensors, source=found.source, computed=_index_keys(target))
    except BundleError as err:
        raise _with_cause(err, facts, network) from err
    return target


def load_pretrained(network: nn.Module, state: dict[str, Tensor]) -> PretrainedReport:
    """Start a Swin UNETR from an encoder or from a network with another head, in place.

    Args:
        network: `SwinUNETR` of this project or of MONAI.
        state: an encoder-only file or a full checkpoint; a head with another number of classes is left out.

    Raises:
        BundleError: the file lacks a part that its layout should have, or has another shape outside the head.
    """
    found = _find(state)
    facts = _facts(found.tensors, found.source)
    _check_indices(network, found)
    computed, own = _index_keys(network), network.state_dict()
    # What the file need not have: the head of a full network, everything but the encoder of an encoder-only file.
    full = found.layout == "full"
    free = {key for key in own if (key.startswith("out.") if full else not key.startswith("swinViT."))}
    complete = own.keys() - free - computed <= found.tensors.keys() <= own.keys()
    try:
        if not complete:  # the strict load says all that is wrong at once
            load_strictly(
                network, {key: own[key] for key in free} | found.tensors, source=found.source, computed=computed
            )
        report = load_partly(
            network, found.tensors, source=found.source, head=("out.",), unused=found.skipped, computed=computed
        )
    except BundleError as err:
        raise _with_cause(err, facts, network) from err
    return PretrainedReport(report.taken, report.adapted, report.left, report.unused, (_merging_note(network, found),))


def _find(state: Mapping[str, Tensor]) -> _Found:
    """Strip what is around the network, tell the layout, and rename to MONAI's keys."""
    source = source_of(state)
    containers = state.containers if isinstance(state, State) else ()
    bare = strip_prefixes(State(state, source=source), ("module.", "backbone.", "_orig_mod."))
    anchors = [key for key in bare if key == _ANCHOR or key.endswith("." + _ANCHOR)]
    if not anchors:
        raise BundleError(source, f"no key ends in {_ANCHOR}", "it is no Swin UNETR checkpoint")
    prefixes = [re.sub(r"(^|\.)(swinViT|swin_vit|encoder)\.$", r"\1", key.removesuffix(_ANCHOR)) for key in anchors]
    if len(anchors) > 1:
        raise BundleError(source, f"several networks in it: {', '.join(anchors)}", "give a file with one of them")
    (prefix,) = prefixes
    skipped = [key for key in bare if not key.startswith(prefix)]
    inside = {key.removeprefix(prefix): value for key, value in bare.items() if key.startswith(prefix)}

    layout: Layout = "full"
    if "encoder." + _ANCHOR in inside:
        layout = "disruptive autoencoder"
        foreign = [key for key in inside if not re.match(r"encoder\.(patch_embed\.|layers)", key)]
    elif _ANCHOR in inside:
        layout = "encoder"
        foreign = [key for key in inside if key.startswith(_PRETEXT)]
    else:
        foreign = []
    skipped += foreign
    kept = State({key: value for key, value in inside.items() if key not in foreign}, source=source)
    tensors = rename(kept, _monai_key)
    if layout == "full" and all(key.startswith("swinViT.") for key in tensors):
        layout = "encoder"
    indices = {key: value for key, value in tensors.items() if key.endswith(_INDEX)}
    return _Found(
        tensors={key: value for key, value in tensors.items() if key not in indices},
        indices=indices,
        skipped=(*skipped, *indices),
        layout=layout,
        research=layout != "full" or "state_dict" in containers or any(".mlp.fc1." in key for key in kept),
        source=source,
    )


def _monai_key(key: str) -> str:
    key = re.sub(r"^swin_vit\.", "swinViT.", key)
    key = re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", key)
    key = re.sub(r"^encoder\.patch_embed\.", "swinViT.patch_embed.", key)
    key = re.sub(r"^encoder\.(layers[1-4]c?)\.0\.0\.", r"swinViT.\1.0.", key)
    return re.sub(r"^(patch_embed|layers[1-4]c?)\.", r"swinViT.\1.", key)


def _facts(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The configuration that shapes and keys tell."""
    patch = tensors["swinViT." + _ANCHOR]
    if patch.ndim not in (4, 5):
        raise BundleError(source, f"swinViT.{_ANCHOR} has shape {tuple(patch.shape)}, not that of a 2D or 3D network")
    spatial_dims = patch.ndim - 2
    facts: dict[str, Any] = {
        "in_channels": patch.shape[1],
        "feature_size": patch.shape[0],
        "spatial_dims": spatial_dims,
        "use_v2": any(key.startswith("swinViT.layers1c.") for key in tensors),
    }
    tables = [tensors.get(_FACT_KEY.format(stage=stage)) for stage in (1, 2, 3, 4)]
    shapes = [tuple(table.shape) for table in tables if table is not None and table.ndim == 2]
    if len(shapes) == 4:
        edge = round(shapes[0][0] ** (1 / spatial_dims))
        if edge**spatial_dims == shapes[0][0]:  # rows = (2 window - 1) ** axes
            facts["window_size"] = (edge + 1) // 2
        facts["num_heads"] = tuple(shape[1] for shape in shapes)
        blocks = (re.match(r"swinViT\.layers([1-4])\.0\.blocks\.(\d+)\.", key) for key in tensors)
        numbers = {(int(block[1]), int(block[2])) for block in blocks if block}
        facts["depths"] = tuple(sum(stage == n for n, _ in numbers) for stage in (1, 2, 3, 4))
    head = tensors.get("out.conv.conv.weight")
    if head is not None:
        facts["out_channels"] = head.shape[0]
    return facts


def _with_cause(err: BundleError, facts: Mapping[str, Any], network: nn.Module) -> BundleError:
    """Add what the shapes say about the file's configuration, where the network's is another."""
    own = _facts(network.state_dict(), err.subject)
    differ = [f"{name} {value}, not {own[name]}" for name, value in facts.items() if name in own and own[name] != value]
    remedy = f"the file has {', '.join(differ)}; {err.remedy}" if differ else err.remedy
    return BundleError(err.subject, err.problem, remedy)


def _check_indices(network: nn.Module, found: _Found) -> None:
    own = network.state_dict()
    for key, table in found.indices.items():
        if key in own and own[key].shape != table.shape:
            raise BundleError(
                found.source,
                f"{key} is {tuple(table.shape)}, not {tuple(own[key].shape)}: the file has another window size",
            )


def _index_keys(network: nn.Module) -> frozenset[str]:
    return frozenset(key for key in network.state_dict() if key.endswith(_INDEX))


def _is_legacy_file(source: str) -> bool:
    path = Path(source)
    if _LEGACY_FILES.fullmatch(path.name):
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() in _LEGACY_MD5


def _assumed_merging(found: _Found) -> Merging:
    if _is_legacy_file(found.source):
        return "legacy"
    merging: Merging = "legacy" if found.research else "current"
    reason = "its layout, that of the research scripts" if found.research else "its layout, MONAI's own"
    log.warning("%s: patch merging %r assumed from %s; give merging= if it is another", found.source, merging, reason)
    return merging


def _merging_note(network: nn.Module, found: _Found) -> str:
    own = merging_of(network)
    note = f"layout: {found.layout}; patch merging of the network: {own}"
    if own != "legacy" and (found.research or _is_legacy_file(found.source)):
        note += "; files of this layout were trained with legacy merging, build the network with merging='legacy'"
    return note
