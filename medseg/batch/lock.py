"""One run at a time in a batch's folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import uuid
from pathlib import Path

from medseg.errors import OutputError

log = logging.getLogger(__name__)

_NAME = ".run.lock"


class FolderLock:
    """A lock that ends with its process, whatever ends that.

    The file also carries the run's token: a worker process that outlives a killed run sees that another one has
    taken over, and leaves its outputs alone.

    Args:
        folder: the batch's folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = uuid.uuid4().hex
        self._handle = -1

    def __enter__(self) -> FolderLock:
        """Take the lock.

        Raises:
            OutputError: another run has it, or the folder cannot be written.
        """
        path = self.folder / _NAME
        while True:
            try:
                self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as err:
                raise OutputError(self.folder, f"cannot be written ({err.strerror})", "choose another folder") from err
            if not _locked(self._handle):
                holder = _read(path)
                os.close(self._handle)
                here = "" if holder.get("host") == socket.gethostname() else f" on {holder.get('host', 'another host')}"
                raise OutputError(
                    self.folder, f"process {holder.get('pid', '?')}{here} works on it", "wait for that run"
                )
            with contextlib.suppress(OSError):  # the holder removes the file at its end: then ours has no name
                if os.fstat(self._handle).st_ino == path.stat().st_ino:
                    break
            os.close(self._handle)
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "token": self.token})
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, content.encode(), 0)
        return self

    def __exit__(self, *_error: object) -> None:
        (self.folder / _NAME).unlink(missing_ok=True)
        os.close(self._handle)


def holds(folder: Path, token: str) -> bool:
    """Whether the run with this token still owns the folder."""
    return _read(folder / _NAME).get("token") == token


def _read(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _locked(handle: int) -> bool:
    """Take the lock; True also where the platform or the file system has none."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        log.warning("no file locks here: nothing keeps a second run out")
    return True
