"""Loading a bundle: found, checked, and its network with its weights; no code of the bundle runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from medseg.bundles.integrity import check_manifest
from medseg.bundles.locate import DEFAULT_BUNDLE, find_bundle
from medseg.bundles.locate import weights_of as weights_of
from medseg.bundles.spec import BundleSpec, config_files, read_json, read_spec
from medseg.bundles.zoo import stated_weights
from medseg.bundles.zoo_networks import PREFIX, create_zoo_network
from medseg.bundles.zoo_trust import TORCHSCRIPT, OwnCode, read_trusted
from medseg.errors import BundleError
from medseg.io.files import sha256_of

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked.

    Attributes:
        name: the folder's name.
        root: the folder.
        spec: what inference needs.
        metadata: metadata.json as it is.
        weights: the weights file, or None when the bundle ships without.
        own_code: what of it runs as code of its own, because it is trusted; None: nothing.
    """

    name: str
    root: Path
    spec: BundleSpec
    metadata: Mapping[str, Any]
    weights: Path | None
    own_code: OwnCode | None = field(default=None, kw_only=True)

    @property
    def version(self) -> str:
        """The bundle's own version."""
        return str(self.metadata.get("version", ""))

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights file, "" without weights."""
        return "" if self.weights is None else sha256_of(self.weights)

    def network(self) -> nn.Module:
        """The network with its weights, in eval mode, on the CPU.

        Raises:
            BundleError: no weights, unreadable weights, or keys and shapes that do not fit the network.
        """
        import torch

        from medseg.checkpoints.files import read
        from medseg.checkpoints.state import load_strictly

        if self.own_code is not None:
            return self.own_code.network(self.weights)
        if self.weights is None:
            raise BundleError(self.name, "has no weights", self.how_to_get_weights())
        network = self.untrained_network()
        state = read(self.weights)
        broken = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise BundleError(self.weights, f"{broken[0]} holds NaN or Inf", "restore the weights")
        load_strictly(network, state, source=str(self.weights))
        return network.eval()

    def untrained_network(self) -> nn.Module:
        """The network with random weights; of several folds the networks of all.

        Raises:
            BundleError: its arguments are not allowed.
        """
        from medseg.networks.layers.mean import MeanOfNetworks
        from medseg.networks.registry import create

        try:
            if self.spec.network.startswith(PREFIX):
                return create_zoo_network(self.spec.network, self.spec.network_args)
            folds = [create(self.spec.network, **self.spec.network_args) for _ in range(self.spec.folds)]
            return folds[0] if len(folds) == 1 else MeanOfNetworks(folds)
        except ValueError as err:
            raise BundleError(config_files(self.root)[1], f"network_def: {err}", "correct its arguments") from err

    def once(self, _key: str, make: Callable[[], T]) -> T:
        """What `make` makes; a bundle that stays in memory makes it once for each key."""
        return make()

    def how_to_get_weights(self) -> str:
        """Where the weights of a bundle that ships without are, and what to do with them."""
        source = self.metadata.get("medseg", {}).get("weights_source", "")
        if not source and (self.root / TORCHSCRIPT).is_file():
            return f"its {TORCHSCRIPT.as_posix()} is code; if you trust its authors, add --trust"
        if not source and (listed := sorted(self.root.glob("large_files.y*ml"))):
            return f"download what {listed[0].name} lists into {self.root}"
        if not source:
            return "train it, or restore models/model.pt"
        return f"{source}; then run: medseg weights import {self.name} CHECKPOINT"


@dataclass(frozen=True)
class ResidentBundle(Bundle):
    """A bundle that builds its network and hashes its weights once."""

    @classmethod
    def of(cls, bundle: Bundle) -> ResidentBundle:
        """The same bundle, kept in memory."""
        return cls(bundle.name, bundle.root, bundle.spec, bundle.metadata, bundle.weights, own_code=bundle.own_code)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights file, "" without weights."""
        return super().sha256

    @cached_property
    def _network(self) -> nn.Module:
        return super().network()

    def network(self) -> nn.Module:
        """The network with its weights, in eval mode; the same object each time."""
        return self._network

    @cached_property
    def _made(self) -> dict[str, Any]:
        return {}

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` made when it was first asked for by this key."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made


def load_bundle(bundle: str | Path = DEFAULT_BUNDLE, *, trust: bool = False) -> Bundle:
    """Find a bundle and check its configuration and weights against its manifest.

    Args:
        bundle: a shipped or own bundle's name, or a bundle's folder.
        trust: let code of the bundle run where it needs some: expressions of its configuration, ``scripts/``,
            TorchScript.

    Raises:
        BundleError: not found, incomplete, damaged, or asking for something medseg does not run.
    """
    root = find_bundle(bundle)
    weights = weights_of(root)
    if weights is not None:
        weights = stated_weights(root) or weights
    if weights is None and trust and (root / TORCHSCRIPT).is_file():
        weights = root / TORCHSCRIPT
    configs = config_files(root)
    files = configs if weights is None else (*configs, weights)
    check_manifest(root, names=tuple(path.relative_to(root).as_posix() for path in files))
    if weights is not None and weights.stat().st_size == 0:
        raise BundleError(weights, "is empty", "restore the weights")
    spec, own_code = read_trusted(root, weights) if trust else (read_spec(root), None)
    return Bundle(root.resolve().name, root, spec, read_json(configs[0]), weights, own_code=own_code)
