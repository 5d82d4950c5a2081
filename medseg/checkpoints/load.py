"""The two ways in: a whole published model, and a partial start for an existing network.

Each architecture's own file in this folder offers functions of the same two names, which get a flat state dict:
containers and the prefixes of DataParallel and torch.compile are gone by then.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from medseg.checkpoints.files import read
from medseg.checkpoints.state import PretrainedReport, State, strip_prefixes, unwrap
from medseg.networks import registry

log = logging.getLogger(__name__)

_KERNEL = 4  # axes of a 2D convolution's weights


def load_published(architecture: str, config: Mapping[str, Any], state: Mapping[str, Any]) -> nn.Module:
    """Build a published model from its published state dict.

    Args:
        architecture: a name of `medseg.networks.names()`.
        config: the network's arguments; what the tensors' shapes tell may be left out where the architecture's importer
            says so.
        state: the published state dict, tensors or NumPy arrays, bare or in the containers its authors used.

    Returns:
        The network in eval mode. An encoder-only file of Swin UNETR gives the encoder.

    Raises:
        ValueError: no such architecture or configuration.
        BundleError: the state dict does not fit; every difference is in the message.
    """
    importer = _importer(architecture)
    network: nn.Module = importer.load_published(config, _flat(state))
    return network.eval()


def load_pretrained(
    network: nn.Module, source: Path | str | Mapping[str, Any], *, slice_stack: int = 0
) -> PretrainedReport:
    """Start a network from published weights, in place, as far as they fit.

    Args:
        network: a network of this project.
        source: a file that `medseg.checkpoints.read` reads, or its content.
        slice_stack: input channels of a network that sees slices with their neighbours as channels, else 0. Of this
            project's own weights for fewer neighbours the network then computes what they computed: its convolutions
            begin with zeros for the further slices.

    Returns:
        What was taken, adapted and left.

    Raises:
        ValueError: the network is none of this project's architectures.
        BundleError: the file cannot be read, or is no start for this network; the network is unchanged then.
    """
    importer = _importer(_architecture_of(network))
    state = source if isinstance(source, Mapping) else read(source)
    flat = _flat(state)
    widened = _widened(flat, network, slice_stack)
    if widened:
        flat = State({**flat, **widened}, source=flat.source, containers=flat.containers, ignored=flat.ignored)
    report: PretrainedReport = importer.load_pretrained(network, flat)
    if widened:
        how = tuple(f"{key}: zeros for slices further off" for key in widened)
        taken = tuple(key for key in report.taken if key not in widened)
        report = replace(report, taken=taken, adapted=(*report.adapted, *how))
    log.info("pretrained start: %d tensors taken, %d left", len(report.taken) + len(report.adapted), len(report.left))
    return report


def _widened(state: State, network: nn.Module, slice_stack: int) -> dict[str, Tensor]:
    """Weights (O, C, ...) of the convolutions that see the input, with zeros on both sides for further slices."""
    found = {}
    for key, own in network.state_dict().items():
        given = state.get(key)
        if given is None or given.ndim != own.ndim or own.ndim < _KERNEL or own.shape[1] != slice_stack:
            continue
        missing = own.shape[1] - given.shape[1]
        if missing > 0 and missing % 2 == 0 and given.shape[0] == own.shape[0] and given.shape[2:] == own.shape[2:]:
            found[key] = torch.zeros(own.shape, dtype=given.dtype)
            found[key][:, missing // 2 : missing // 2 + given.shape[1]] = given
    return found


def _flat(state: Mapping[str, Any]) -> State:
    found = unwrap(state)
    return State(strip_prefixes(found), source=found.source, containers=found.containers, ignored=found.ignored)


def _importer(architecture: str) -> ModuleType:
    registry.network_class(architecture)  # refuses an unknown name with the list of known ones
    return import_module(f"medseg.checkpoints.{architecture}")


def _architecture_of(network: nn.Module) -> str:
    for cls in type(network).__mro__:
        name = registry.name_of("medseg.networks." + cls.__name__)
        if name is not None:
            return name
    raise ValueError(f"{type(network).__name__} is none of the architectures {', '.join(registry.names())}")
