"""Finding a bundle by name or folder."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from medseg.bundles.spec import ENSEMBLE, read_json
from medseg.errors import BundleError

DEFAULT_BUNDLE = "swin_unetr_hippocampus"
_METADATA = Path("configs") / "metadata.json"
_WEIGHTS = ("models/model.safetensors", "models/model.pt")


def shipped_bundles() -> Path:
    """Folder of the shipped bundles: inside the installed package, or bundles/ of a source checkout.

    Raises:
        BundleError: neither is there.
    """
    package = Path(str(resources.files("medseg")))
    for folder in (package / "_bundles", package.parent / "bundles"):
        if folder.is_dir():
            return folder
    raise BundleError("shipped bundles", "not found", "reinstall medseg, or give --bundle FOLDER")


def user_bundles() -> Path:
    """Folder of the user's own bundles: ``bundles`` in MEDSEG_HOME, or in the user's data folder.

    The environment is read here and not in the command line, because the Python API, the review page and the
    servers have to find the same bundles.
    """
    if home := os.environ.get("MEDSEG_HOME"):
        return Path(home) / "bundles"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))) / "medseg" / "bundles"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "medseg" / "bundles"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "medseg" / "bundles"


def search_path() -> list[Path]:
    """Folders that are searched for a name, in order: shipped, the user's own, those of MEDSEG_BUNDLES.

    The first match that has weights, or is an ensemble, counts, so that a shipped bundle without them gives way to the
    user's copy with imported ones; without any such match, the first.
    """
    more = [Path(part) for part in os.environ.get("MEDSEG_BUNDLES", "").split(os.pathsep) if part]
    return [shipped_bundles(), user_bundles(), *more]


def all_bundles() -> Iterator[Path]:
    """The folders of all bundles that a name can mean, sorted by name within each folder of the search path."""
    seen: set[str] = set()
    for folder in search_path():
        if not folder.is_dir():
            continue
        for root in sorted(folder.iterdir()):
            if (root / _METADATA).is_file() and root.name not in seen and not root.name.startswith("."):
                seen.add(root.name)
                yield _by_name(root.name) or root


def find_bundle(name: str | Path) -> Path:
    """The folder of a bundle.

    Args:
        name: a folder that holds configs/metadata.json, or a name in the search path.

    Raises:
        BundleError: no such bundle; the message lists those that there are.
    """
    path = Path(name)
    if (path / _METADATA).is_file():
        return path
    # A plain name cannot climb out of the folders searched.
    if len(path.parts) == 1 and path.name and (found := _by_name(path.name)):
        return found
    if path.exists():
        problem = "is a file, not a bundle's folder" if path.is_file() else f"is a folder without {_METADATA}"
        raise BundleError(path, problem, "give the folder that holds configs/ and models/")
    names = [root.name for root in all_bundles()]
    meant = "".join(f"did you mean {one}? " for one in difflib.get_close_matches(path.name, names, n=1, cutoff=0.8))
    known = ", ".join(names) or "none"
    raise BundleError(f"bundle {str(name)!r}", "not found", f"{meant}known: {known}; or give a bundle's folder")


def weights_of(root: Path) -> Path | None:
    """The weights file of a bundle's folder, or None when it ships without."""
    return next((root / name for name in _WEIGHTS if (root / name).is_file()), None)


def is_ensemble(root: Path) -> bool:
    """Whether a bundle's folder names other bundles instead of holding weights."""
    try:
        return ENSEMBLE in read_json(root / "configs" / "inference.json")
    except BundleError:
        return False  # whoever loads it says what is wrong


def _by_name(name: str) -> Path | None:
    roots = [folder / name for folder in search_path() if (folder / name / _METADATA).is_file()]
    return next((root for root in roots if weights_of(root) or is_ensemble(root)), roots[0] if roots else None)
