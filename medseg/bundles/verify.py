"""``medseg bundles verify``: everything that can be checked of a bundle without a scan."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.bundles.ensemble import load_ensemble
from medseg.bundles.integrity import MANIFEST, check_manifest
from medseg.bundles.load import Bundle, load_bundle
from medseg.bundles.locate import find_bundle, is_ensemble
from medseg.bundles.spec import config_files, is_foreign, read_json
from medseg.errors import BundleError

# Required by MONAI's meta_schema_20240725, and the types that it sets for fields that are there.
_REQUIRED: dict[str, type] = {
    "schema": str,
    "version": str,
    "monai_version": str,
    "pytorch_version": str,
    "numpy_version": str,
    "required_packages_version": dict,
    "task": str,
    "description": str,
    "authors": str,
    "copyright": str,
    "network_data_format": dict,
}
_TYPED: dict[str, type] = {
    "changelog": dict,
    "eval_metrics": dict,
    "references": list,
    "supported_apps": dict,
    "data_source": str,
    "data_type": str,
    "image_classes": str,
    "label_classes": str,
    "pred_classes": str,
    "intended_use": str,
}
_TENSOR: dict[str, type] = {
    "type": str,
    "format": str,
    "num_channels": int,
    "spatial_shape": list,
    "dtype": str,
    "value_range": list,
}


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, and what was found."""

    name: str
    passed: bool
    found: str


def verify_bundle(bundle: str | Path, *, trust: bool = False) -> Iterator[Check]:
    """Run the checks one after the other; a failed one does not stop those that can still run.

    Args:
        bundle: a bundle's name or folder.
        trust: let its own code run where it needs some.

    Raises:
        BundleError: there is no such bundle.
    """
    root = find_bundle(bundle)
    yield _check("folder name", lambda: _folder_name(root))
    yield _check("files", lambda: _files(root))
    yield _check("manifest", lambda: _manifest(root))
    yield _check("metadata.json", lambda: check_metadata(read_json(root / "configs" / "metadata.json")))
    if is_ensemble(root):
        yield _check("members", lambda: _members(root))
        return
    try:
        loaded = load_bundle(root, trust=trust)
    except BundleError as err:
        yield Check("inference.json", passed=False, found=str(err))
        return
    own = loaded.own_code
    found = "only what medseg runs itself" if own is None else f"its own code runs: {own.reason}"
    yield Check("inference.json", passed=True, found=found)
    if own is not None and own.pipeline:
        yield _check("network", lambda: f"{sum(one.numel() for one in loaded.network().parameters()):,} parameters")
        return
    if loaded.weights is None:
        yield Check("weights", passed=True, found=f"none shipped; {loaded.how_to_get_weights()}")
        yield _check("network", lambda: _network(loaded))
    else:
        yield _check("forward pass", lambda: _forward(loaded))


def _check(name: str, run: Callable[[], str]) -> Check:
    try:
        return Check(name, passed=True, found=run())
    except BundleError as err:
        return Check(name, passed=False, found=str(err))


def _folder_name(root: Path) -> str:
    name = root.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9_]+" if _of_others(root) else r"[a-z0-9_]+", name):
        raise BundleError(name, "is not made of a-z, 0-9 and _", "rename the folder")
    return name


def _files(root: Path) -> str:
    configs = tuple(path.relative_to(root).as_posix() for path in config_files(root))
    wanted = configs if _of_others(root) else ("LICENSE", *configs, "docs/README.md")
    missing = [name for name in wanted if not (root / name).is_file()]
    if missing:
        raise BundleError(root, f"lacks {', '.join(missing)}", "add the files")
    return ", ".join(wanted)


def _manifest(root: Path) -> str:
    if not check_manifest(root):
        if _of_others(root):
            return "none, as others ship bundles without"
        raise BundleError(root, f"has no {MANIFEST}", "pack it with medseg bundles pack")
    return "every file has the listed size and SHA-256"


def _of_others(root: Path) -> bool:
    """Whether a bundle is not of medseg's own kind."""
    try:
        return is_foreign(read_json(config_files(root)[1]))
    except BundleError:
        return False


def check_metadata(metadata: Mapping[str, Any]) -> str:
    """Hold metadata.json against the rules of MONAI's schema of 2024-07-25, or of 2022-03-24 where it names that.

    Raises:
        BundleError: a field is missing or of another type; all are named.
    """
    required = dict(_REQUIRED)
    if "20220324" in str(metadata.get("schema")):
        required["optional_packages_version"] = required.pop("required_packages_version")
    wrong = [f"{key} is missing" for key in required if key not in metadata]
    for key, kind in (required | _TYPED).items():
        if key in metadata and not isinstance(metadata[key], kind):
            wrong.append(f"{key} is not a {kind.__name__}")
    for group, inner in (("inputs", "image"), ("outputs", "pred")):
        tensor = metadata.get("network_data_format", {}).get(group, {}).get(inner)
        if not isinstance(tensor, dict):
            wrong.append(f"network_data_format.{group}.{inner} is missing")
            continue
        wrong += [
            f"{group}.{inner}.{key} is missing or not a {kind.__name__}"
            for key, kind in _TENSOR.items()
            if not isinstance(tensor.get(key), kind)
        ]
    if wrong:
        raise BundleError("metadata.json", "; ".join(wrong), "correct the fields")
    return f"version {metadata['version']}, as MONAI's schema asks"


def _forward(bundle: Bundle) -> str:
    import torch

    spec = bundle.spec
    network = bundle.network()
    with torch.inference_mode():
        found = network(torch.zeros(1, spec.network_channels, *spec.network_size))
    logits = found if isinstance(found, torch.Tensor) else found[0]
    wanted = (1, spec.out_channels, *spec.network_size)
    if tuple(logits.shape) != wanted:
        raise BundleError(bundle.name, f"gives {tuple(logits.shape)}, not {wanted}", "correct metadata.json")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{tuple(logits.shape)} from a window of {spec.network_size}; {parameters:,} parameters"


def _members(root: Path) -> str:
    """Every member of an ensemble is there, has the recorded weights, and runs."""
    together = load_ensemble(root)
    found = []
    for member in together.members:
        _forward(member.bundle)
        found.append(f"{member.bundle.name} {member.weight:.4g}")
    return f"{', '.join(found)}; the same labels, the recorded SHA-256, one forward pass each"


def _network(bundle: Bundle) -> str:
    """The network of a bundle without weights can be built."""
    network = bundle.untrained_network()
    return f"{sum(parameter.numel() for parameter in network.parameters()):,} parameters"
