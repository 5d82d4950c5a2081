"""`medseg review` as a process of its own, as people start it, and a Chromium to look at it with."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    "--ignore-gpu-blocklist",
]
PATIENCE_S = 120
"""Generous: the machine that runs the tests may have other work."""


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(found: Callable[[], bool], otherwise: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


@contextmanager
def serving(
    log: Path,
    *arguments: str,
    port: int,
    module: str = "medseg",
    ready: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """A server that answers.

    Args:
        log: takes what it writes.
        arguments: of ``python -m MODULE``; the port is among them.
        port: that it listens on.
        module: the program.
        ready: path that answers when it is.
        environment: beside that of the tests.
    """
    with log.open("w") as told:
        server = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=told,
            stderr=told,
        )

    def answers() -> bool:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5).close()
        except (urllib.error.URLError, OSError):
            return False
        return True

    try:
        wait_for(answers, "the server did not start")
        yield
    finally:
        server.terminate()
        server.wait(timeout=60)
