"""State dicts as they are found in files: unwrapping, prefixes, and loading with every difference named at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg.errors import BundleError

# Names under which training programs store a state dict beside their own records, in the order they are looked for:
# PyTorch Lightning and MONAI, nnU-Net, plain training loops.
CONTAINERS = ("state_dict", "model_state_dict", "network_weights", "model", "network", "net")

# What DataParallel and torch.compile put in front of every key.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

_NAMED = 3  # keys of each kind that a message names


class State(dict[str, Tensor]):
    """A published state dict, and what is known about the file it was in.

    Attributes:
        source: the file, or "checkpoint" where the state came from memory.
        containers: names under which the state dict was found, outermost first; empty for a bare one.
        ignored: names that stood beside it and are no part of it (epoch, optimizer, ...).
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        source: str = "checkpoint",
        containers: tuple[str, ...] = (),
        ignored: tuple[str, ...] = (),
    ) -> None:
        super().__init__(tensors)
        self.source, self.containers, self.ignored = source, containers, ignored


@dataclass(frozen=True)
class PretrainedReport:
    """What a partial start put into a network.

    Attributes:
        taken: the network's keys that hold the file's values unchanged.
        adapted: the network's keys that hold changed values, each as "key: what was done".
        left: the network's keys that keep their initial values.
        unused: the file's keys that have no place in the network.
        notes: what the reader should know besides, one sentence each.
    """

    taken: tuple[str, ...]
    adapted: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for each kind that is not empty."""
        lines = [f"taken: {len(self.taken)} tensors"]
        if self.adapted:
            lines.append(f"adapted: {len(self.adapted)} ({'; '.join(self.adapted)})")
        if self.left:
            lines.append(f"left at their initial values: {_listed(self.left)}")
        if self.unused:
            lines.append(f"not used: {_listed(self.unused)}")
        return "\n".join([*lines, *self.notes])


def unwrap(content: Mapping[Any, Any], *, source: str = "checkpoint") -> State:
    """Take the state dict out of what a checkpoint file holds.

    Containers are entered while there are any; NumPy arrays become tensors; everything else is ignored by name.

    Args:
        content: a state dict of tensors or NumPy arrays, bare or in a container.
        source: what messages call it.

    Raises:
        BundleError: there is no tensor in it.
    """
    if isinstance(content, State):
        return content
    containers: list[str] = []
    ignored: list[str] = []
    while found := next((name for name in CONTAINERS if isinstance(content.get(name), Mapping)), None):
        containers.append(found)
        ignored += [str(name) for name in content if name != found]
        content = content[found]
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor | np.ndarray | np.generic):
            tensors[key] = _to_tensor(value, key, source)
        else:
            ignored.append(str(key))
    if not tensors:
        found_keys = f"it holds {_listed(ignored)}" if ignored else "it is empty"
        raise BundleError(source, f"no state dict in it: {found_keys}", f"known containers: {', '.join(CONTAINERS)}")
    return State(tensors, source=source, containers=tuple(containers), ignored=tuple(ignored))


def source_of(state: Mapping[str, Tensor]) -> str:
    """What messages call a state dict: its file, or "checkpoint"."""
    return state.source if isinstance(state, State) else "checkpoint"


def strip_prefixes(state: Mapping[str, Tensor], prefixes: Collection[str] = WRAPPER_PREFIXES) -> dict[str, Tensor]:
    """Remove prefixes from the start of each key, repeatedly and in any order.

    Raises:
        BundleError: two keys become one.
    """

    def bare(key: str) -> str:
        while prefix := next((prefix for prefix in prefixes if key.startswith(prefix)), None):
            key = key.removeprefix(prefix)
        return key

    return rename(state, bare)


def rename(state: Mapping[str, Tensor], name: Callable[[str], str]) -> dict[str, Tensor]:
    """Rename every key.

    Args:
        state: a state dict.
        name: the new key for an old one.

    Raises:
        BundleError: two keys become one.
    """
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        new = name(key)
        if new in renamed:
            raise BundleError(source_of(state), f"{origin[new]} and {key} both mean {new}")
        renamed[new], origin[new] = value, key
    return renamed


def strip_wrapper(state: Mapping[str, Tensor], anchor: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Remove whatever module the network was wrapped in, found by a key that the network surely has.

    Args:
        state: a state dict, for example of a Lightning module that holds the network as ``model``.
        anchor: a key that every published state dict of the architecture has.

    Returns:
        The state dict with the wrapper's prefix removed, and the keys that lack the prefix: a loss, a teacher.

    Raises:
        BundleError: no key ends in `anchor`, or several do.
    """
    heads = [key.removesuffix(anchor) for key in state if key == anchor or key.endswith("." + anchor)]
    if not heads:
        raise BundleError(
            source_of(state),
            f"no key {anchor}; it holds {_listed(list(state))}",
            "is it another network's checkpoint?",
        )
    if len(heads) > 1:
        raise BundleError(source_of(state), f"several networks in it: {', '.join(head or '(bare)' for head in heads)}")
    (head,) = heads
    inside = {key.removeprefix(head): value for key, value in state.items() if key.startswith(head)}
    return inside, tuple(key for key in state if not key.startswith(head))


def load_strictly(
    network: nn.Module, state: Mapping[str, Tensor], *, source: str = "checkpoint", computed: Collection[str] = ()
) -> None:
    """Load a state dict that must fit exactly; nothing is loaded if it does not.

    Args:
        network: takes the values, in place.
        state: the network's own keys.
        source: what messages call the state dict.
        computed: buffers that the network computes itself: they may be missing, and are not loaded.

    Raises:
        BundleError: missing, unexpected or wrongly shaped keys, all of them in one message.
    """
    own = network.state_dict()
    missing = [key for key in own if key not in state and key not in computed]
    unexpected = [key for key in state if key not in own]
    misshapen = _misshapen(own, state)
    if missing or unexpected or misshapen:
        raise _misfit(network, source, missing, unexpected, misshapen)
    network.load_state_dict({key: value for key, value in state.items() if key not in computed}, strict=False)


def load_partly(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str = "checkpoint",
    head: Collection[str] = (),
    adapted: Mapping[str, str] | None = None,
    unused: Iterable[str] = (),
    computed: Collection[str] = (),
) -> PretrainedReport:
    """Load what a state dict has for a network, and report the rest.

    Args:
        network: takes the values, in place.
        state: the network's own keys, or some of them.
        source: what messages call the state dict.
        head: prefixes of the keys that depend on the task; they are left where their shape differs.
        adapted: what the caller did to the values of a key, for the report.
        unused: keys of the file that the caller has already set aside, for the report.
        computed: buffers that the network computes itself; they are not loaded and not reported.

    Raises:
        BundleError: a key outside the head has another shape, or nothing fits; nothing is loaded then.
    """
    adapted = adapted or {}
    own = network.state_dict()
    misshapen = _misshapen(own, state)
    wrong = {key: shapes for key, shapes in misshapen.items() if not key.startswith(tuple(head))}
    if wrong:
        raise _misfit(network, source, [], [], wrong)
    fits = {key: value for key, value in state.items() if key in own and key not in misshapen and key not in computed}
    if not fits:
        raise BundleError(source, f"nothing in it fits {type(network).__name__}: it holds {_listed(list(state))}")
    network.load_state_dict(fits, strict=False)
    return PretrainedReport(
        taken=tuple(key for key in fits if key not in adapted),
        adapted=tuple(f"{key}: {how}" for key, how in adapted.items() if key in fits),
        left=tuple(key for key in own if key not in fits and key not in computed),
        unused=(*unused, *(key for key in state if key not in own)),
    )


def _to_tensor(value: Tensor | np.ndarray[Any, Any] | np.generic, key: str, source: str) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise BundleError(source, f"{key} is not a plain tensor of numbers")
        return value.detach()
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise BundleError(source, f"{key} holds {array.dtype}, not numbers")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))


def _misshapen(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {key: (value, own[key]) for key, value in state.items() if key in own and value.shape != own[key].shape}


def _misfit(
    network: nn.Module,
    source: str,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Mapping[str, tuple[Tensor, Tensor]],
) -> BundleError:
    shapes = [f"{key} is {tuple(got.shape)}, not {tuple(want.shape)}" for key, (got, want) in misshapen.items()]
    parts = [
        f"{kind}: {_listed(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    return BundleError(source, f"does not fit {type(network).__name__}; " + "; ".join(parts), "nothing was loaded")


def _listed(keys: Collection[str]) -> str:
    """The number of keys and the first few of them."""
    first = ", ".join(list(keys)[:_NAMED])
    return f"{len(keys)} ({first}{', ...' if len(keys) > _NAMED else ''})"
