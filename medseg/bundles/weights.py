"""``medseg weights import``: an author's checkpoint becomes the weights of a bundle that ships without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import medseg
from medseg.bundles.integrity import write_manifest
from medseg.bundles.load import load_bundle
from medseg.bundles.locate import shipped_bundles, user_bundles
from medseg.bundles.spec import BundleSpec, read_json
from medseg.errors import BundleError, OutputError
from medseg.io.files import sha256_of


def import_weights(
    bundle: str | Path,
    checkpoint: str | Path,
    *,
    network: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a ready bundle of a bundle's configuration and a published checkpoint.

    Every key and shape is checked against the network of the bundle's configuration; nothing is written before.

    Args:
        bundle: a bundle's name or folder.
        checkpoint: the file that the authors, or their trainer, made.
        network: network arguments that differ from the bundle's, e.g. ``{"feature_size": 24}``.
        folder: gets the bundle as a folder of its name; None: the user's bundles.
        overwrite: replace a bundle of that name there.

    Returns:
        The ready bundle's folder.

    Raises:
        BundleError: no such bundle, a checkpoint that cannot be read safely, or one that does not fit.
        OutputError: the ready bundle exists, or cannot be written.
    """
    template = load_bundle(_template(bundle))
    folder = folder or user_bundles()
    target = folder / template.name
    if target.exists() and not overwrite:
        raise OutputError(target, "exists", "use --overwrite to replace it")
    if target.resolve() == template.root.resolve():
        raise OutputError(target, "is the bundle itself", "give another --output")
    spec = replace(template.spec, network_args={**template.spec.network_args, **(network or {})})
    path = Path(checkpoint)
    state = _converted(spec, path)
    aside = folder / f".{template.name}.importing"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(template.root, aside, ignore=shutil.ignore_patterns("models", "eval"))
        _note_arguments(aside / "configs" / "inference.json", network or {})
        _note_source(aside, path)
        save_state(state, aside / "models" / "model.pt")
        write_manifest(aside)
        load_bundle(aside).network()  # whatever would fail later fails here, before the rename
        put_in_place(aside, target)
    except OSError as err:
        raise OutputError(target, f"cannot be written ({err.strerror or err})", "free space, or use --output") from err
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _template(bundle: str | Path) -> str | Path:
    """The shipped bundle of that name rather than the user's copy of it, which an earlier import changed."""
    shipped = shipped_bundles() / str(bundle)
    return shipped if len(Path(bundle).parts) == 1 and shipped.is_dir() else bundle


def _converted(spec: BundleSpec, checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's tensors under the network's own keys."""
    import torch

    from medseg.checkpoints.files import read
    from medseg.checkpoints.load import load_published
    from medseg.networks.registry import network_class

    try:
        network = load_published(spec.network, spec.network_args, read(checkpoint))
    except ValueError as err:
        raise BundleError(spec.network, f"configuration not allowed: {err}", "correct --network") from err
    if not isinstance(network, network_class(spec.network)):
        raise BundleError(
            checkpoint, "an encoder without a decoder, no whole network", "start a training from it, or give another"
        )
    state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    broken = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise BundleError(checkpoint, f"{broken[0]} holds NaN or Inf", "give another checkpoint")
    return state


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors as the weights file of a bundle.

    Raises:
        OSError: it cannot be written.
    """
    import torch

    path.parent.mkdir()
    try:
        torch.save({"model": dict(state)}, path)
    except RuntimeError as err:  # torch's zip writer reports a full disk so
        raise OSError(f"{path.name}: {err}") from err


def _note_arguments(path: Path, network: Mapping[str, Any]) -> None:
    config = read_json(path)
    config["network_def"].update(network)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _note_source(root: Path, checkpoint: Path) -> None:
    """Record in metadata.json and docs/README.md which file the weights came from; its folder is not recorded."""
    path, digest = root / "configs" / "metadata.json", sha256_of(checkpoint)
    metadata = read_json(path)
    metadata.setdefault("medseg", {})["weights"] = {
        "source": checkpoint.name,
        "sha256": digest,
        "imported": datetime.now(UTC).isoformat(timespec="seconds"),
        "medseg": medseg.__version__,
    }
    metadata["description"] = str(metadata.get("description", "")).replace("ships without weights", "imported weights")
    path.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    readme = root / "docs" / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8").replace("**This bundle ships without weights.** ", "")
        text += f"\n## Imported weights\n\n{checkpoint.name}, SHA-256 {digest}.\n"
        readme.write_text(text, encoding="utf-8")


def put_in_place(made: Path, target: Path) -> None:
    """Rename the new bundle to its name; an old one steps aside first and is removed last."""
    old = made.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        made.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
