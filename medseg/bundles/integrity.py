"""A bundle's manifest: size and SHA-256 of each of its files. It shows damage, not forgery."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from medseg.bundles.spec import read_json
from medseg.errors import BundleError
from medseg.io.files import sha256_of

MANIFEST = "manifest.json"
_LFS_POINTER = b"version https://git-lfs"


def _files(root: Path) -> list[Path]:
    found = sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)
    return [path for path in found if path.relative_to(root).parts[0] != "eval"]


def updated_manifest(root: Path, name: str, content: bytes) -> bytes | None:
    """manifest.json for a bundle of which one file is about to change; None for a bundle without one.

    Args:
        root: the bundle's folder.
        name: the file, relative to `root`.
        content: what it will hold.
    """
    if not (root / MANIFEST).is_file():
        return None
    entries = read_json(root / MANIFEST)
    entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return (json.dumps(entries, indent=2) + "\n").encode()


def write_manifest(root: Path) -> None:
    """Write manifest.json for the files that the folder holds now."""
    entries = {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in _files(root)
    }
    (root / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def check_manifest(root: Path, *, names: tuple[str, ...] = ()) -> bool:
    """Compare the files of a bundle with its manifest.

    Args:
        root: the bundle's folder.
        names: files to check, relative to `root`; all files, and that no other is there, when empty.

    Returns:
        Whether there is a manifest at all.

    Raises:
        BundleError: a file is missing, differs, is not listed, or leads out of the folder by a link.
    """
    inside = root.resolve()
    for path in root.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise BundleError(path, "is a link that leads out of the bundle", "replace it with the file")
    if not (root / MANIFEST).is_file():
        return False
    entries = read_json(root / MANIFEST)
    for name, entry in entries.items():
        if names and name not in names:
            continue
        path = root / name
        if not path.is_file() or not path.resolve().is_relative_to(inside):
            raise BundleError(path, "is in the manifest and not in the bundle", "restore the bundle")
        if not isinstance(entry, dict) or path.stat().st_size != entry.get("bytes"):
            if path.read_bytes()[: len(_LFS_POINTER)] == _LFS_POINTER:
                raise BundleError(path, "is a Git LFS pointer, not the file", "fetch it with git lfs pull")
            raise BundleError(path, "damaged or changed: its size differs from the manifest", "restore the bundle")
        if sha256_of(path) != entry.get("sha256"):
            raise BundleError(path, "damaged or changed: its SHA-256 differs from the manifest", "restore the bundle")
    if not names:
        for path in _files(root):
            if path.relative_to(root).as_posix() not in entries:
                raise BundleError(path, "is not in the manifest", "remove it, or pack the bundle again")
    return True
