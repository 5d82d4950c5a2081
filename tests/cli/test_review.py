"""`medseg review`: what it refuses, and that it starts and stops."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medseg.cli.main import app
from medseg.errors import MedsegError
from tests.builders import blob_scan, save_scan


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "192.0.2.7"], 2, "--host 192.0.2.7: other machines could open the page"),
        (["--login", "none.toml"], 3, "none.toml: cannot be read"),
        (["nowhere"], 3, "nowhere: is no folder"),
        (["--database", "mysql://x/y"], 2, "neither a file of SQLite nor PostgreSQL"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MedsegError, match=re.escape(words)) as caught:
        CliRunner().invoke(app, ["review", "--port", "8650", *arguments], catch_exceptions=False)
    assert caught.value.exit_code == code


def test_the_page_opens_from_any_folder_and_stops_without_a_word(tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    save_scan(scans / "Miller^Anna.nii.gz", blob_scan((8, 9, 10)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLIT")}
    with subprocess.Popen(
        [sys.executable, "-m", "medseg", "review", str(scans), "--port", str(port)],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as page:
        try:
            assert page.stdout is not None
            assert page.stdout.readline() == f"http://127.0.0.1:{port}  (data in review; Ctrl+C stops)\n"
            end = time.monotonic() + 120
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                        assert b"<title>" in answer.read()
                        break
                except urllib.error.URLError:
                    assert time.monotonic() < end, "the page did not come up"
                    assert page.poll() is None, page.stdout.read()
                    time.sleep(0.2)
        finally:
            page.send_signal(signal.SIGINT)
        said = page.stdout.read()
    assert page.returncode == 0
    assert "Miller" not in said
    assert said == ""
    assert (tmp_path / "review" / "review.sqlite").is_file()
