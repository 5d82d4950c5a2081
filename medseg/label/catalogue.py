"""The bundles of a server, and the versions that training makes of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg.bundles.ensemble import Ensemble, load_ensemble
from medseg.bundles.load import Bundle, ResidentBundle
from medseg.bundles.locate import all_bundles, is_ensemble, weights_of
from medseg.bundles.spec import read_json
from medseg.errors import BundleError

log = logging.getLogger(__name__)

PARENT = "finetuned_from"
"""Entry of metadata.json's ``medseg`` that says which bundle a version was trained from."""

_VERSION = re.compile(r"_v(\d+)$")


@dataclass(frozen=True)
class Served:
    """A bundle that clients can use.

    Attributes:
        root: its folder.
        ensemble: loaded and checked.
        parent: name of the bundle that it was trained from, "" for none.
    """

    root: Path
    ensemble: Ensemble
    parent: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.name

    @property
    def bundle(self) -> Bundle | None:
        """The bundle, None for an ensemble, which cannot be trained on."""
        members = self.ensemble.members
        return members[0].bundle if self.ensemble.alone and not is_ensemble(self.root) else None


class Catalogue:
    """The bundles of a server by name: those it was started with, and the versions trained from them.

    Args:
        roots: folders of the bundles to serve.
        trained: folder that gets new versions.

    Raises:
        BundleError: a bundle is damaged, ships without weights, or there are two of one name.
    """

    def __init__(self, roots: Sequence[Path], trained: Path) -> None:
        self.trained = trained
        self.served: dict[str, Served] = {}
        self._passed_over: set[str] = set()
        self._resident: ResidentBundle | None = None
        for root in roots:
            served = _load(root.resolve())
            if served.name in self.served:
                raise BundleError(served.name, "is the name of two bundles", "rename the folder of one of them")
            self.served[served.name] = served
        self.refresh()

    def refresh(self) -> list[Served]:
        """Take in versions that were trained since; those that are new."""
        if not self.trained.is_dir():
            return []
        found = []
        for root in sorted(self.trained.resolve().iterdir(), key=_generation):
            if root.name in self.served or root.name in self._passed_over or root.name.startswith("."):
                continue
            if _parent(root) not in self.served:
                continue
            try:
                served = _load(root)
            except BundleError as err:
                log.warning("bundle %s: %s", root.name, err.problem)
                self._passed_over.add(root.name)
                continue
            self.served[served.name] = served
            found.append(served)
        return found

    def newest(self, name: str = "") -> Served:
        """The latest version that descends from a bundle, or that bundle; without a name, from the first.

        Raises:
            BundleError: there is no such bundle.
        """
        name = name or next(iter(self.served), "")
        if name not in self.served:
            raise BundleError(f"model {name!r}", "not served", f"known: {', '.join(self.served)}")
        descended = [name]
        for one in self.served.values():  # parents come before their children
            if one.parent in descended:
                descended.append(one.name)
        return max((self.served[one] for one in descended), key=lambda one: _generation(one.root))

    def ready(self, name: str) -> Bundle | Ensemble:
        """What `infer` takes; the bundle used last stays in memory."""
        served = self.served[name]
        if served.bundle is None:
            return served.ensemble
        if self._resident is None or self._resident.root != served.bundle.root:
            self._resident = ResidentBundle.of(served.bundle)
        return self._resident

    def next_name(self, name: str) -> str:
        """The name of the next version of a bundle: NAME_v2, NAME_v3, ..."""
        base = re.sub(r"[^a-z0-9_]", "_", _VERSION.sub("", name).lower())
        taken = [path.name for path in self.trained.iterdir()] if self.trained.is_dir() else []
        numbers = [int(found[1]) for one in [*self.served, *taken] if (found := _numbered(base, one))]
        return f"{base}_v{max(numbers, default=1) + 1}"


def ready_bundles() -> list[Path]:
    """Folders of all bundles of the search path that can segment: not damaged, and with weights."""
    found = []
    for root in all_bundles():
        if weights_of(root) is None and not is_ensemble(root):
            continue
        try:
            load_ensemble(root)
        except BundleError as err:
            log.warning("bundle %s left out: %s", root.name, err.problem)
            continue
        found.append(root)
    return found


def _load(root: Path) -> Served:
    ensemble = load_ensemble(root)
    for member in ensemble.members:
        if member.bundle.weights is None:
            raise BundleError(member.bundle.name, "has no weights", member.bundle.how_to_get_weights())
    return Served(root, ensemble, _parent(root))


def _parent(root: Path) -> str:
    """Name of the bundle that a folder's bundle was trained from, "" for none or no bundle."""
    try:
        own = read_json(root / "configs" / "metadata.json").get("medseg", {})
        return str(own[PARENT]["name"])
    except (BundleError, KeyError, TypeError, AttributeError):
        return ""


def _generation(root: Path) -> tuple[int, str]:
    found = _VERSION.search(root.name)
    return (int(found[1]) if found else 1), root.name


def _numbered(base: str, name: str) -> re.Match[str] | None:
    found = _VERSION.search(name)
    return found if found and _VERSION.sub("", name) == base else None
