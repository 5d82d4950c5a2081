"""Published weights of ParaTransCNN, and torchvision's ResNet-34 for its CNN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from medseg.checkpoints.state import PretrainedReport, load_partly, load_strictly, rename, source_of, strip_wrapper
from medseg.networks.paratranscnn import ParaTransCNN
from medseg.networks.registry import create

ANCHOR = "firstconv.weight"
OWN_ANCHOR = "cnn.conv1.weight"
RESNET_ANCHORS = ("conv1.weight", "layer1.0.conv1.weight")


def load_published(config: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Build a trained ParaTransCNN from its published state dict.

    Args:
        config: the constructor's arguments; the number of heads does not follow from the tensors.
        state: published keys, without the prefixes of data-parallel training.

    Returns:
        The network in eval mode.

    Raises:
        ValueError: the configuration is not allowed.
        BundleError: missing, unexpected or wrongly shaped keys, under their published names.
    """
    network = cast("ParaTransCNN", create("paratranscnn", **config))
    trained, _ = strip_wrapper(state, ANCHOR)
    load_strictly(_under_published_names(network), trained, source=source_of(state))
    return network.eval()


def load_pretrained(network: nn.Module, state: dict[str, Tensor]) -> PretrainedReport:
    """Start a ParaTransCNN from torchvision's ResNet-34 or from another ParaTransCNN, in place.

    Args:
        network: a ParaTransCNN; for the ResNet with the default `cnn_width` and `cnn_blocks`.
        state: torchvision's ResNet-34, a published ParaTransCNN or one of this project. Of another ParaTransCNN
            everything is taken but a head for another number of classes.

    Raises:
        BundleError: the file is for another size of the network; the network is unchanged then.
    """
    network = cast("ParaTransCNN", network)
    if all(key in state for key in RESNET_ANCHORS):
        return _load_resnet(network, state)
    own = any(key == OWN_ANCHOR or key.endswith("." + OWN_ANCHOR) for key in state)
    trained, unused = strip_wrapper(state, OWN_ANCHOR if own else ANCHOR)
    if not own:
        theirs_to_ours = {theirs: ours for ours, theirs in published_modules(network).items()}
        trained = rename(trained, lambda key: _translated(key, theirs_to_ours))
    return load_partly(network, trained, source=source_of(state), head=("head.classify.",), unused=unused)


def _load_resnet(network: ParaTransCNN, state: dict[str, Tensor]) -> PretrainedReport:
    """Fill the CNN, whose parameters carry torchvision's names; older files do not count batches."""
    classifier = tuple(key for key in state if key.startswith("fc."))
    resnet = {key: value for key, value in state.items() if key not in classifier}
    counters = [key for key in network.cnn.state_dict() if key.endswith("num_batches_tracked")]
    load_strictly(network.cnn, resnet, source=source_of(state), computed=counters)
    taken = tuple(f"cnn.{key}" for key in resnet if key not in counters)
    return PretrainedReport(
        taken=taken, left=tuple(key for key in network.state_dict() if key not in taken), unused=classifier
    )


def published_modules(network: ParaTransCNN) -> dict[str, str]:
    """The published name of each module that has one, by our name.

    The publication numbers the pyramid's levels from the finest on, fusions and decoders from the coarsest; a
    transformer's list holds attention and feed-forward parts in turn.
    """
    names = {
        "cnn.conv1": "firstconv",
        "cnn.bn1": "firstbn",
        "up.0": "up3_1",
        "up.1": "up2_1",
        "head.up": "up1_1",
        "head.classify": "out",
    }
    for stage in range(1, 5):
        names[f"cnn.layer{stage}"] = f"encoder{stage}"
    for level, depth in enumerate(network.depth):
        names[f"transformer.{level}.patch_embed"] = f"patch_embed_{level + 1}"
        for index in range(depth):
            layer, vit = f"transformer.{level}.layers.{index}", f"vit_{level + 1}.net"
            names[f"{layer}.attention_norm"] = f"{vit}.{2 * index}.fn.norm"
            names[f"{layer}.attention"] = f"{vit}.{2 * index}.fn.fn"
            names[f"{layer}.mlp_norm"] = f"{vit}.{2 * index + 1}.fn.norm"
            names[f"{layer}.mlp.fc1"] = f"{vit}.{2 * index + 1}.fn.fn.net.0"
            names[f"{layer}.mlp.fc2"] = f"{vit}.{2 * index + 1}.fn.fn.net.3"
    for level in range(3):
        names[f"fusion.{level}.squeeze"] = f"SE_{level + 1}.fc.0"
        names[f"fusion.{level}.excite"] = f"SE_{level + 1}.fc.2"
        for position, part in ((0, "conv1"), (1, "norm1"), (3, "conv3"), (4, "norm3")):
            names[f"decoder.{level}.{position}"] = f"decoder{level + 1}.{part}"
    return names


def _translated(key: str, modules: Mapping[str, str]) -> str:
    """A key with the longest module name that `modules` knows replaced."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if module in modules:
            return ".".join([modules[module], *parts[end:]])
    return key


def _under_published_names(network: ParaTransCNN) -> nn.Module:
    """The network's own tensors in modules with the published names, so that messages name what the file holds."""
    ours_to_theirs = published_modules(network)
    root: nn.Module = type("ParaTransCNN", (nn.Module,), {})()
    for key, tensor in network.state_dict(keep_vars=True).items():
        *path, leaf = _translated(key, ours_to_theirs).split(".")
        module = root
        for name in path:
            if name not in dict(module.named_children()):
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.register_buffer(leaf, tensor)
    return root
