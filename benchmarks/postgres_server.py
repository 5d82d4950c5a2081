"""A PostgreSQL server for one run, on a socket in a folder of its own; nothing of it is left afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def programs() -> Path | None:
    """Where initdb and pg_ctl are; Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    return next((path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None)


@contextmanager
def postgres_server(binaries: Path, *, fsync: bool) -> Iterator[str]:
    """URL of a server that runs meanwhile.

    Args:
        binaries: see `programs`.
        fsync: whether what is committed survives a power failure, as in service.
    """
    as_other: dict[str, str] = {}
    if os.getuid() == 0:  # the server refuses to run as root
        names = {entry.pw_name for entry in pwd.getpwall()}
        as_other = {"user": "postgres" if "postgres" in names else "nobody"}
    root = Path(tempfile.mkdtemp(prefix="medseg-pg-", dir="/tmp"))
    try:
        if as_other:
            shutil.chown(root, as_other["user"])
        options = {"check": True, "capture_output": True, "cwd": root, **as_other}
        data = str(root / "data")

        def run(program: str, *words: str) -> None:
            subprocess.run([binaries / program, "-D", data, *words], **options)  # noqa: S603 - our own words

        run("initdb", "-U", "medseg", "-A", "trust", "-E", "UTF8", "--no-sync")
        server = f"-c listen_addresses='' -c unix_socket_directories={root} -c max_connections=60"
        server += f" -c fsync={'on' if fsync else 'off'}"
        run("pg_ctl", "-w", "-l", str(root / "log"), "-o", server, "start")
        try:
            yield f"postgresql://medseg@/postgres?host={root}"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(root, ignore_errors=True)
