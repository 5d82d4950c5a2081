"""``medseg label serve`` as people start it, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


class Server:
    """A running server, its folders, and clients of it.

    Args:
        folder: holds ``bundles/tiny`` and ``studies``.
        options: of the command, after those that this class gives.
        environment: variables of the server's process, beside those of the tests.
    """

    def __init__(self, folder: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.studies, self.trained = folder, folder / "studies", folder / "trained"
        self.bundle, self.url = folder / "bundles" / "tiny", f"http://127.0.0.1:{port}"
        self.log = folder / "log.txt"
        command = [sys.executable, "-m", "medseg", "label", "serve", "--studies", str(self.studies)]
        command += ["--bundle", str(self.bundle), "--trained", str(self.trained), "--port", str(port), *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )
        assert self.process.stdout is not None
        # A server that does not come up is stopped, which ends the wait for its line.
        timer = threading.Timer(600, self.process.terminate)
        timer.start()
        self.greeting = self.process.stdout.readline()
        timer.cancel()
        assert self.greeting, self.log.read_text()

    def client(self) -> Any:
        from monailabel.client import MONAILabelClient

        (self.folder / "client").mkdir(exist_ok=True)
        return MONAILabelClient(self.url, tmpdir=str(self.folder / "client"))

    def call(self, method: str, path: str, **given: Any) -> Any:
        import requests

        return requests.request(method, self.url + path, timeout=300, **given)

    def stop(self) -> int:
        self.process.terminate()
        with self.process:  # closes the pipe
            return self.process.wait(60)
