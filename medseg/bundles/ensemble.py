"""Ensembles: bundles whose probabilities are averaged, named for one run or kept as a bundle of their own.

An ensemble bundle holds no weights. Its inference.json names the members, and metadata.json records the SHA-256 of each
member's weights, so that an ensemble never runs with other weights than those it was made of.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medseg.bundles.integrity import check_manifest, write_manifest
from medseg.bundles.load import Bundle, load_bundle
from medseg.bundles.locate import DEFAULT_BUNDLE, find_bundle, is_ensemble
from medseg.bundles.spec import ENSEMBLE, BundleSpec, Calibration, config_files, parse_calibration, read_json
from medseg.bundles.weights import put_in_place
from medseg.bundles.write import metadata_config
from medseg.errors import BundleError, OutputError, UsageError

_CONFIGS = ("configs/metadata.json", "configs/inference.json")
_MAX_MEMBERS = 64


@dataclass(frozen=True)
class Member:
    """A bundle of an ensemble.

    Attributes:
        bundle: with its own preprocessing, window and network.
        weight: its share in the mean; those of all members add up to 1.
    """

    bundle: Bundle
    weight: float


@dataclass(frozen=True)
class Ensemble:
    """Bundles with the same labels, whose probabilities are averaged; a bundle alone is an ensemble of one.

    Attributes:
        name: the folder's name, or those of the members.
        members: at least one.
        root: the folder of an ensemble bundle; of a bundle alone, its own; None when it was put together for one run.
        metadata: metadata.json of that folder.
        calibration: of the mean; of a bundle alone the bundle's own is in its spec, and this one does nothing.
    """

    name: str
    members: tuple[Member, ...]
    root: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)

    @classmethod
    def of(cls, bundle: Bundle) -> Ensemble:
        """The ensemble of one bundle."""
        return cls(bundle.name, (Member(bundle, 1.0),), bundle.root, bundle.metadata)

    @property
    def alone(self) -> bool:
        """Whether there is one member only, which is then used as it would be by itself."""
        return len(self.members) == 1

    @property
    def spec(self) -> BundleSpec:
        """Of the first member; channels, labels, activation and regions are those of all."""
        return self.members[0].bundle.spec

    @property
    def version(self) -> str:
        """The version of the bundle alone or of the ensemble bundle, "" without a folder."""
        return str(self.metadata.get("version", ""))

    @property
    def sha256(self) -> str:
        """Of the weights of the bundle alone; of several, SHA-256 of their weights' SHA-256 and shares."""
        if self.alone:
            return self.members[0].bundle.sha256
        text = json.dumps([[member.bundle.sha256, round(member.weight, 9)] for member in self.members])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def own_code(self) -> str:
        """Why code of trusted bundles runs, "" where none does."""
        own = [(member.bundle.name, member.bundle.own_code) for member in self.members]
        return "; ".join(f"{name}: {code.reason}" for name, code in own if code is not None)

    @property
    def fitted(self) -> Calibration:
        """What holds for the result: the bundle's own calibration where it is alone, else the ensemble's."""
        return self.spec.calibration if self.alone else self.calibration

    def source(self) -> tuple[list[Path], list[float] | None]:
        """The folders and weights from which `load_ensemble` makes the same again."""
        if self.root is not None:
            return [self.root.absolute()], None
        return [member.bundle.root.absolute() for member in self.members], [member.weight for member in self.members]

    def configs(self) -> list[Path]:
        """The configuration files that decide the result."""
        roots = [member.bundle.root for member in self.members]
        if self.root is not None and self.root not in roots:
            roots.insert(0, self.root)
        scripts = [path for root in roots for path in sorted((root / "scripts").rglob("*.py"))] if self.own_code else []
        return [path for root in roots for path in config_files(root)] + scripts


Loadable = str | Path | Bundle | Ensemble


def load_ensemble(
    bundles: Loadable | Sequence[Loadable] = DEFAULT_BUNDLE,
    weights: Sequence[float] | None = None,
    *,
    trust: bool = False,
) -> Ensemble:
    """Load a bundle, an ensemble bundle, or several bundles that are to be averaged.

    Args:
        bundles: names, folders, or what was loaded before.
        weights: a positive number for each of several bundles; None: all the same.
        trust: as `load_bundle`, of bundles that are named; members of an ensemble bundle run no code.

    Raises:
        UsageError: no bundle, or weights that do not fit.
        BundleError: a bundle is not found, damaged, an ensemble among several, or does not fit the others; a member of
            an ensemble bundle is missing or has other weights than when the ensemble was made.
    """
    given = [bundles] if isinstance(bundles, str | Path | Bundle | Ensemble) else list(bundles)
    if not given:
        raise UsageError("--bundle", "no bundle given", "name one")
    if weights is not None and len(weights) != len(given):
        raise UsageError("--weight", f"{len(weights)} weights for {len(given)} bundles", "give one for each, or none")
    if len(given) == 1:
        _shares(weights or [1.0])
        return _load_one(given[0], trust=trust)
    members = [_member(one, trust=trust) for one in given]
    return _together(" + ", members, _shares(weights or [1.0] * len(given)))


def make_ensemble(
    name: str,
    members: Sequence[str],
    folder: Path,
    *,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Make an ensemble bundle.

    Args:
        name: the bundle's name, a-z, 0-9 and _.
        members: names of bundles with weights, as they will be searched for when the ensemble is used.
        folder: gets the bundle as a folder of that name.
        weights: a positive number for each member; None: all the same.
        overwrite: replace a bundle of that name.

    Returns:
        The bundle's folder.

    Raises:
        UsageError: a name that a bundle cannot have, fewer than two members, or weights that do not fit.
        BundleError: as `load_ensemble`; also a member without weights. OutputError: it exists, or cannot be written.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UsageError("NAME", f"{name!r} is not made of a-z, 0-9 and _", "e.g. ensemble_hippocampus")
    if len(members) < 2:
        raise UsageError("--member", f"{len(members)} members", "an ensemble has at least two")
    for one in members:
        if len(Path(one).parts) != 1:
            raise UsageError("--member", f"{one!r} is not a name", "put it where names are searched, and name it")
        if one == name:
            raise UsageError("--member", f"{one!r} is the ensemble itself", "name other bundles")
    together = load_ensemble(list(members), weights)
    for member in together.members:
        if member.bundle.weights is None:
            raise BundleError(member.bundle.name, "has no weights", member.bundle.how_to_get_weights())
    target = folder / name
    if target.exists() and not overwrite:
        raise OutputError(target, "exists", "use --overwrite, or another name")
    aside = folder / f".{name}.tmp"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "configs").mkdir(parents=True)
        (aside / "docs").mkdir()
        configs = _metadata(name, together), _inference(members, weights or [1.0] * len(members))
        for file, content in zip(("metadata.json", "inference.json"), configs, strict=True):
            (aside / "configs" / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (aside / "docs" / "README.md").write_text(_readme(name, together), encoding="utf-8")
        (aside / "LICENSE").write_text(
            "This ensemble holds no weights. Those of its members are under their own terms, see the LICENSE of each.\n"
            "The configuration files in configs/ are under the Apache License 2.0.\n",
            encoding="utf-8",
        )
        write_manifest(aside)
        load_ensemble(aside)  # whatever would fail later fails here, before the rename
        put_in_place(aside, target)
    except OSError as err:
        raise OutputError(target, f"cannot be written ({err.strerror or err})", "choose another folder") from err
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _load_one(bundle: Loadable, *, trust: bool) -> Ensemble:
    """A bundle alone, or an ensemble bundle."""
    if isinstance(bundle, Ensemble):
        return bundle
    if isinstance(bundle, Bundle):
        return Ensemble.of(bundle)
    root = find_bundle(bundle)
    return _load_kept(root) if is_ensemble(root) else Ensemble.of(load_bundle(root, trust=trust))


def _load_kept(root: Path) -> Ensemble:
    """An ensemble bundle, its members found by their names and held against what was recorded of them."""
    check_manifest(root, names=_CONFIGS)
    metadata, listed, name = read_json(root / _CONFIGS[0]), listed_members(root), root.resolve().name
    try:
        own = metadata.get("medseg", {})
        recorded = {str(one["bundle"]): str(one["weights_sha256"]) for one in own["members"]}
        if {bundle for bundle, _ in listed} != set(recorded):
            raise ValueError(f"the SHA-256 of {', '.join(sorted(recorded)) or 'no member'} are recorded")
        calibration = parse_calibration(own.get("calibration", {}))
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise BundleError(
            root / _CONFIGS[0], f"field missing or malformed ({err!r})", "make the ensemble again"
        ) from err
    bundles = []
    for member, _ in listed:
        try:
            bundles.append(_member(member))
        except BundleError as err:
            raise BundleError(name, f"its member cannot be loaded: {err.subject}: {err.problem}", err.remedy) from err
        if bundles[-1].sha256 != recorded[member]:
            raise BundleError(
                name,
                f"its member {member} has other weights ({bundles[-1].sha256[:12] or 'none'}) than the ensemble was "
                f"made with ({recorded[member][:12]})",
                "restore the member, or make the ensemble again with medseg bundles ensemble",
            )
    together = _together(" + ", bundles, _shares([weight for _, weight in listed]))
    return replace(together, name=name, root=root, metadata=metadata, calibration=calibration)


def listed_members(root: Path) -> list[tuple[str, float]]:
    """Name and weight of each member that an ensemble bundle lists; nothing is loaded.

    Raises:
        BundleError: inference.json does not list two or more.
    """
    where = root / _CONFIGS[1]
    try:
        listed = [(str(one["bundle"]), float(one["weight"])) for one in read_json(where)[ENSEMBLE]["members"]]
        if not 2 <= len(listed) <= _MAX_MEMBERS:
            raise ValueError(f"{len(listed)} members")
        if wrong := [bundle for bundle, _ in listed if len(Path(bundle).parts) != 1]:
            raise ValueError(f"{wrong[0]!r} is not a bundle's name")
    except (KeyError, TypeError, ValueError) as err:
        raise BundleError(where, f"field missing or malformed ({err!r})", "make the ensemble again") from err
    return listed


def _member(bundle: Loadable, *, trust: bool = False) -> Bundle:
    """A bundle with a network of its own.

    Raises:
        BundleError: it is an ensemble.
    """
    loaded = _only_bundle(bundle, trust=trust)
    if loaded is None:
        name = bundle.name if isinstance(bundle, Ensemble) else Path(str(bundle)).name
        raise BundleError(name, "is an ensemble itself", "name its members instead")
    return loaded


def _only_bundle(bundle: Loadable, *, trust: bool) -> Bundle | None:
    if isinstance(bundle, Bundle):
        return bundle
    if isinstance(bundle, Ensemble):
        return bundle.members[0].bundle if bundle.alone else None
    root = find_bundle(bundle)
    return None if is_ensemble(root) else load_bundle(root, trust=trust)


def _together(joint: str, bundles: Sequence[Bundle], shares: Sequence[float]) -> Ensemble:
    """An ensemble of bundles that fit together.

    Raises:
        BundleError: channels, labels, activation or regions differ.
    """
    if len(bundles) > _MAX_MEMBERS:
        raise UsageError("--bundle", f"{len(bundles)} bundles", f"at most {_MAX_MEMBERS}")
    first = bundles[0]
    for other in bundles[1:]:
        if difference := _difference(first.spec, other.spec):
            what, theirs, ours = difference
            raise BundleError(
                other.name, f"cannot be averaged with {first.name}: {what} {theirs} instead of {ours}", "choose another"
            )
    members = tuple(Member(bundle, share) for bundle, share in zip(bundles, shares, strict=True))
    return Ensemble(joint.join(bundle.name for bundle in bundles), members)


def _difference(first: BundleSpec, other: BundleSpec) -> tuple[str, str, str] | None:
    """The first thing in which a bundle differs that all members must share: what it is, the other's, the first's."""
    if other.labels != first.labels:
        values = sorted(set(first.labels) | set(other.labels))
        differing = [value for value in values if first.labels.get(value) != other.labels.get(value)]

        def named(spec: BundleSpec) -> str:
            return ", ".join(f"{value} {spec.labels.get(value, 'nothing')}" for value in differing)

        return "labels", named(other), named(first)
    if other.channels != first.channels:
        return "channels", ", ".join(other.channels), ", ".join(first.channels)
    if other.activation != first.activation:
        return "activation", other.activation, first.activation
    if other.label_steps != first.label_steps:
        return "steps after the network", str(other.label_steps), str(first.label_steps)
    if other.regions != first.regions:
        return "regions", _regions(other), _regions(first)
    return None


def _regions(spec: BundleSpec) -> str:
    return ", ".join(f"{region.name} (channel {region.channel}, label {region.label})" for region in spec.regions)


def _shares(weights: Sequence[float]) -> list[float]:
    """Weights that add up to 1.

    Raises:
        UsageError: one is not a positive finite number.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError("--weight", f"{weight:g} is not a positive number", "e.g. 1 or 0.5")
    return [weight / math.fsum(weights) for weight in weights]


def _metadata(name: str, together: Ensemble) -> dict[str, Any]:
    """metadata.json: that of MONAI's schema, and the members with the SHA-256 of their weights."""
    names = [member.bundle.name for member in together.members]
    sources = {str(member.bundle.metadata.get("data_source", "")) for member in together.members}
    described = {
        "name": name,
        "task": str(together.members[0].bundle.metadata.get("task", "")),
        "description": f"Weighted mean of the probabilities of {', '.join(names)}; holds no weights of its own",
        "data_source": "; ".join(sorted(source for source in sources if source)),
    }
    metadata = metadata_config(replace(together.spec, calibration=Calibration()), described)
    for key in ("mirror_axes", "suitability"):  # each member has its own
        del metadata["medseg"][key]
    metadata["medseg"]["members"] = [
        {
            "bundle": member.bundle.name,
            "version": member.bundle.version,
            "weights_sha256": member.bundle.sha256,
        }
        for member in together.members
    ]
    return metadata


def _inference(members: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    """inference.json: the members, and what ``python -m monai.bundle run`` needs to call medseg with them."""
    return {
        "imports": ["$import glob", "$import os", "$import medseg"],
        "bundle_root": ".",
        "dataset_dir": "./data",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii.gz')))",
        ENSEMBLE: {
            "members": [{"bundle": one, "weight": weight} for one, weight in zip(members, weights, strict=True)]
        },
        "folder": "$os.makedirs(@output_dir, exist_ok=True)",
        "run": [
            "$@folder",
            "$[medseg.infer(scan, bundle=@bundle_root).save("
            "os.path.join(@output_dir, os.path.basename(scan)[:-7] + '_seg.nii.gz'), overwrite=True)"
            " for scan in @datalist]",
        ],
    }


def _readme(name: str, together: Ensemble) -> str:
    rows = "\n".join(
        f"| {member.bundle.name} | {member.bundle.version} | {member.weight:.4g} | {member.bundle.sha256} |"
        for member in together.members
    )
    return f"""# {name}

The weighted mean of the probabilities of other bundles, each with its own preprocessing and window. This folder holds
no weights: the members are found by their names. For research only: not a medical device, not for diagnosis.

| member | version | share | SHA-256 of its weights |
| --- | --- | --- | --- |
{rows}

Data, licence and performance of each member: its own docs/README.md.

## Commands

    medseg infer scan.nii.gz --bundle {name}
    medseg bundles verify {name}
"""
