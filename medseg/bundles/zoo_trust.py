"""Bundles whose own code runs, because the user said so (``--trust``).

This is the only module that gives a bundle's configuration to MONAI's ConfigParser, which evaluates its expressions,
imports what it names, ``scripts/`` of the bundle included, and calls it; and that loads TorchScript.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.bundles.spec import BundleSpec, config_files, is_foreign, read_json, read_spec
from medseg.bundles.zoo import bare_spec, parse_zoo
from medseg.errors import BundleError

if TYPE_CHECKING:
    from torch import nn

TORCHSCRIPT = Path("models") / "model.ts"


@dataclass(frozen=True)
class OwnCode:
    """What of a bundle runs as its own code.

    Attributes:
        root: the bundle's folder.
        reason: what medseg does not do by itself.
        pipeline: whether all of its pipeline runs; else only its network does, in medseg's engine.
    """

    root: Path
    reason: str
    pipeline: bool

    def network(self, weights: Path | None) -> nn.Module:
        """The network with its weights, in eval mode, on the CPU.

        Raises:
            BundleError: its code failed, or the weights do not fit.
        """
        from medseg.checkpoints.files import read
        from medseg.checkpoints.state import load_strictly

        if weights is not None and weights.name == TORCHSCRIPT.name:
            return self._torchscript(weights)
        network: nn.Module = self.parts("cpu", "network_def")[0]
        if weights is None:
            raise BundleError(self.root.name, "has no weights", "put them at models/model.pt")
        load_strictly(network, read(weights), source=str(weights))
        return network.eval()

    def parts(self, device: str, *names: str) -> list[Any]:
        """Sections of the configuration as the objects that they describe.

        Raises:
            BundleError: its code failed.
        """
        from monai.bundle import ConfigParser  # noqa: TID251  the user trusts this bundle

        parser = ConfigParser()
        with self.imports():
            try:
                parser.read_config(config_files(self.root)[1])
                parser["bundle_root"] = str(self.root.resolve())
                if "device" in parser:
                    parser["device"] = device
                return [parser.get_parsed_content(name) for name in names]
            except Exception as err:  # whatever code of others raises
                raise self.failed(err) from err

    @contextmanager
    def imports(self) -> Iterator[None]:
        """Let code of the bundle import its ``scripts``; what it imported is forgotten afterwards."""
        folder, known = str(self.root.resolve()), set(sys.modules)
        sys.path.insert(0, folder)
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            sys.path.remove(folder)
            for name in set(sys.modules) - known:
                if name.partition(".")[0] == "scripts":
                    del sys.modules[name]

    def failed(self, err: Exception) -> BundleError:
        """The error for a failure of the bundle's code."""
        cause: BaseException = err
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = " ".join(str(cause).split())
        return BundleError(
            self.root.name, f"its own code failed ({type(cause).__name__}: {text[:200]})", "see its docs"
        )

    def _torchscript(self, path: Path) -> nn.Module:
        import torch

        try:
            with warnings.catch_warnings(action="ignore"):
                network: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        except RuntimeError as err:
            raise self.failed(err) from err
        return network.eval()


def read_trusted(root: Path, weights: Path | None) -> tuple[BundleSpec, OwnCode | None]:
    """The specification of a trusted bundle, and what of it has to run as its own code; None where nothing has.

    Raises:
        BundleError: it is a damaged bundle of medseg's own, or nothing that can be run at all.
    """
    script = f"{TORCHSCRIPT} is TorchScript" if weights is not None and weights.name == TORCHSCRIPT.name else ""
    try:
        spec = read_spec(root)
    except BundleError as err:
        refused = err
    else:
        return spec, OwnCode(root, script, pipeline=False) if script else None
    metadata_path, config_path = config_files(root)
    metadata, config = read_json(metadata_path), read_json(config_path)
    if not is_foreign(config):
        raise refused
    try:
        return parse_zoo(metadata, config, config_path, own_network=True), OwnCode(
            root, refused.problem, pipeline=False
        )
    except BundleError as err:
        return bare_spec(metadata, config_path), OwnCode(root, err.problem, pipeline=True)
