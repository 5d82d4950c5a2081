"""What nnU-Net v2 saves: its state dicts, and the record of the training beside them.

nnU-Net's networks register the tensors of a block twice, as ``conv.weight`` and ``all_modules.0.weight``, and the
encoder's once more below ``decoder.encoder``; the first names are this project's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from medseg.checkpoints.files import read_content
from medseg.checkpoints.state import (
    PretrainedReport,
    State,
    load_partly,
    load_strictly,
    source_of,
    strip_prefixes,
    strip_wrapper,
    unwrap,
)
from medseg.errors import BundleError

_FIRST = "encoder.stages.0.0.convs.0.conv.weight"
_FIRST_RESIDUAL = "encoder.stem.convs.0.conv.weight"
_SECOND_NAMES = re.compile(r"(^|\.)(all_modules|decoder\.encoder)\.")
_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Training:
    """A checkpoint of nnU-Net's trainer.

    Attributes:
        state: the network's tensors, as they are in the file.
        trainer: name of the trainer's class.
        configuration: what was trained: "3d_fullres", "2d", ...
        mirror_axes: axes along which the trainer allows mirroring, in the order of the network's axes.
    """

    state: State
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...]


def read_training(path: Path) -> Training:
    """Read ``checkpoint_final.pth`` or another checkpoint of nnU-Net v2, without running anything in it.

    Raises:
        BundleError: the file cannot be read safely, or is no checkpoint of nnU-Net v2.
    """
    content = read_content(path)
    settings = content.get("init_args")
    trainer, axes = content.get("trainer_name"), content.get("inference_allowed_mirroring_axes")
    configuration = settings.get("configuration") if isinstance(settings, Mapping) else None
    if not isinstance(content.get("network_weights"), Mapping) or not isinstance(configuration, str):
        raise BundleError(path, "no checkpoint of nnU-Net v2: it lacks network_weights or init_args", "give another")
    if not isinstance(trainer, str) or not _CLASS_NAME.fullmatch(trainer):
        raise BundleError(path, "no checkpoint of nnU-Net v2: it names no trainer", "give another")
    allowed = () if axes is None else tuple(axes)
    if not all(isinstance(axis, int) and axis in (0, 1, 2) for axis in allowed):
        raise BundleError(path, f"allows mirroring along {axes!r}, which are no axes", "give another checkpoint")
    return Training(unwrap(content, source=str(path)), trainer, configuration, tuple(sorted(set(allowed))))


def first_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of nnU-Net without the second names of its tensors, and without what it was wrapped in.

    Raises:
        BundleError: it is of another network.
    """
    once = {key: value for key, value in strip_prefixes(state).items() if not _SECOND_NAMES.search(key)}
    residual = any(key.endswith(_FIRST_RESIDUAL) for key in once)
    bare, _ = strip_wrapper(State(once, source=source_of(state)), _FIRST_RESIDUAL if residual else _FIRST)
    return bare


def load_first_names(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a whole state dict of nnU-Net into a network, in place.

    Raises:
        BundleError: it does not fit.
    """
    load_strictly(network, first_names(state), source=source_of(state))
    return network


def load_pretrained(network: nn.Module, state: dict[str, Tensor]) -> PretrainedReport:
    """Start one of nnU-Net's networks from another one's checkpoint, in place.

    Args:
        network: of the same size; outputs with another number of classes keep their initial values.
        state: the other one's state dict.

    Raises:
        BundleError: another shape outside the outputs; nothing is loaded then.
    """
    return load_partly(network, first_names(state), source=source_of(state), head=["decoder.seg_layers."])
