"""Converted networks on disk, in the user's medseg folder.

An entry is a folder: ``model.onnx``, ``entry.json`` with its size and SHA-256, and a ``probe-*.json`` for each back end
and machine that was tried. It is written aside and renamed, so that it is whole or not there. Its name holds whatever
decides the model: the weights' SHA-256, architecture and arguments, window, number of windows a call, medseg's code of
the networks, and the versions of torch and ONNX Runtime, which made it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import medseg.networks
from medseg.bundles.load import Bundle
from medseg.bundles.locate import user_bundles
from medseg.errors import InputError
from medseg.inference.backends.sessions import version
from medseg.io.files import sha256_of

log = logging.getLogger(__name__)

_MODEL, _FACTS, _FAILED = "model.onnx", "entry.json", "failed.json"
_WINDOWS_A_CALL = 1


def cache_folder() -> Path:
    """Where converted networks lie: ``cache`` beside the user's bundles."""
    return user_bundles().parent / "cache" / "backends"


class Entry:
    """The place of one bundle's converted network, made or not.

    Args:
        bundle: with weights.
        folder: as `cache_folder` gives it.
    """

    def __init__(self, bundle: Bundle, folder: Path | None = None) -> None:
        spec, weights = bundle.spec, bundle.sha256
        self.shape = (_WINDOWS_A_CALL, spec.network_channels, *spec.network_size)
        made_of = {
            "weights": weights,
            "network": spec.network,
            "arguments": dict(spec.network_args),
            "shape": self.shape,
            "code": _code_of_networks(),
            "torch": version("eager"),
            "onnxruntime": version("onnxruntime"),
        }
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=list).encode()).hexdigest()
        size = "x".join(str(n) for n in self.shape)
        self.folder = (folder or cache_folder()) / weights[:16] / f"{spec.network}-{size}-{digest[:16]}"

    @cached_property
    def model(self) -> Path | None:
        """The converted network, its bytes checked; None when there is none. A damaged entry is removed."""
        if not self.folder.is_dir():
            return None
        if not self._private():
            log.warning("%s belongs to somebody else, or others can write there; it is not used", self.folder)
            return None
        path = self.folder / _MODEL
        try:
            facts = json.loads((self.folder / _FACTS).read_text(encoding="utf-8"))
            if path.stat().st_size == facts["bytes"] and sha256_of(path) == facts["sha256"]:
                return path
        except (InputError, OSError, ValueError, KeyError, TypeError) as err:
            log.debug("%s: %s", self.folder, err)
        log.info("%s is damaged and is made again", self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        return None

    @property
    def failed(self) -> str:
        """Why an earlier conversion failed; empty when none did."""
        found = _read(self._failure)
        return str(found.get("reason", "")) if found else ""

    def make(self, write: Callable[[Path], None]) -> Path:
        """Make the entry.

        Args:
            write: writes the converted network to the path it is given.

        Raises:
            OSError: the folder cannot be written.
            Exception: what `write` raises; nothing is left behind then.
        """
        parent = self.folder.parent
        private_folder(parent)
        aside = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=parent))  # 0700
        try:
            path = aside / _MODEL
            write(path)
            path.chmod(0o600)
            _write(aside / _FACTS, {"bytes": path.stat().st_size, "sha256": sha256_of(path)})
            try:
                aside.rename(self.folder)
            except OSError:  # another process was faster: its entry is as good
                if not self.folder.is_dir():
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._failure.unlink(missing_ok=True)
        self.__dict__["model"] = self.folder / _MODEL
        return self.folder / _MODEL

    def note_failure(self, reason: str) -> None:
        """Remember that the network cannot be converted, so that later runs do not try."""
        private_folder(self._failure.parent)
        _write(self._failure, {"reason": reason})

    def probe(self, name: str) -> dict[str, Any] | None:
        """What an earlier probe found, None without one."""
        return _read(self.folder / f"probe-{name}.json")

    def note_probe(self, name: str, found: Mapping[str, Any]) -> None:
        """Remember what a probe found."""
        _write(self.folder / f"probe-{name}.json", found)

    @property
    def _failure(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{_FAILED}")

    def _private(self) -> bool:
        if not hasattr(os, "getuid"):
            return True
        for path in (self.folder, self.folder / _MODEL):
            try:
                found = path.stat()
            except OSError:
                continue  # incomplete, which is found out elsewhere
            if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return False
        return True


def private_folder(path: Path) -> None:
    """Make a folder for its owner only, and those above it where they are missing.

    Raises:
        OSError: it cannot be made.
    """
    for one in (*reversed(path.parents), path):
        one.mkdir(mode=0o700, exist_ok=True)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")  # 0600
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
    Path(name).replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _code_of_networks() -> str:
    """SHA-256 of the code that networks are built from: the same weights in changed code are another model."""
    digest = hashlib.sha256()
    root = Path(str(medseg.networks.__file__)).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
