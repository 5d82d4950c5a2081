"""Files by their bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from medseg.errors import InputError
from medseg.io.files import sha256_of


def test_the_digest_of_files_is_that_of_their_bytes_one_after_the_other(tmp_path: Path) -> None:
    long, short, empty = tmp_path / "long", tmp_path / "short", tmp_path / "empty"
    content = bytes(range(256)) * 5000  # more than one block
    long.write_bytes(content)
    short.write_bytes(b"end")
    empty.touch()
    assert sha256_of(long, empty, short) == hashlib.sha256(content + b"end").hexdigest()
    assert sha256_of(empty) == hashlib.sha256().hexdigest()
    assert sha256_of(long, short) != sha256_of(short, long)


def test_what_is_no_file_has_no_digest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (("none", "no such file"), ("pipe", "not a regular file"), (".", "a folder, not a file")):
        with pytest.raises(InputError, match=problem):
            sha256_of(tmp_path / name)
