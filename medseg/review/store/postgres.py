"""Connections to PostgreSQL by pg8000, which takes addresses less broadly than PostgreSQL's own library does.

What that library understands is translated: a folder as host, sslmode with its certificates, and passwords that stand
outside the address, where no list of processes shows them.
"""

from __future__ import annotations

import os
import socket
import ssl
import stat
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event

from medseg.errors import UsageError

CONNECT_SECONDS = 10

_PORT = 5432
_OPTIONS = {"host", "port", "sslmode", "sslrootcert", "sslcert", "sslkey"}


def postgres_engine(address: URL) -> Engine:
    """An engine for an address ``postgresql://USER[:PASSWORD]@HOST[:PORT]/NAME[?host=FOLDER&sslmode=...]``.

    Without a password in it, PGPASSWORD holds, then a line of the file ~/.pgpass (or PGPASSFILE).

    Raises:
        UsageError: an option that is not known, or certificates that cannot be read. ImportError: without pg8000.
    """
    from pg8000.dbapi import Connection

    options = {name: value if isinstance(value, str) else value[-1] for name, value in address.query.items()}
    if unknown := sorted(set(options) - _OPTIONS):
        raise UsageError(
            "database address", f"option {unknown[0]!r} is not known", f"use {', '.join(sorted(_OPTIONS))}"
        )
    port = options.get("port", str(address.port or _PORT))
    host = options.get("host") or address.host or "localhost"
    if not port.isdecimal():
        raise UsageError("database address", f"port {port!r} is no number", "leave it out for 5432")
    plain = URL.create(
        "postgresql+pg8000",
        username=address.username or os.environ.get("PGUSER") or None,
        host=None if host.startswith("/") else host,
        port=None if host.startswith("/") else int(port),
        database=address.database,
    )
    password = address.password or _password(host, port, address.database or "", plain.username or "")
    secure = _ssl(options) if not host.startswith("/") else False
    engine = create_engine(plain, connect_args={"ssl_context": secure, "password": password}, pool_pre_ping=True)

    def connect(_dialect: object, _record: object, _arguments: object, parameters: dict[str, Any]) -> Any:
        # pg8000's own timeout would hold for every later answer too, waiting for a lock included.
        parameters.pop("port", None)
        end = _socket(host, int(port))
        try:
            return Connection(**parameters, sock=end)
        except BaseException:
            end.close()
            raise

    event.listen(engine, "do_connect", connect)
    return engine


def _socket(host: str, port: int) -> socket.socket:
    """A connection to a server, or to the socket that it keeps in a folder."""
    if host.startswith("/"):
        found = socket.socket(socket.AF_UNIX)
        found.settimeout(CONNECT_SECONDS)
        found.connect(f"{host}/.s.PGSQL.{port}")
    else:
        found = socket.create_connection((host, port), CONNECT_SECONDS)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    found.settimeout(None)
    return found


def _ssl(options: dict[str, str]) -> ssl.SSLContext | bool | None:
    """What pg8000 takes for an sslmode: None encrypts where the server offers it.

    Raises:
        UsageError: no such mode, or certificates that cannot be read.
    """
    mode = options.get("sslmode", "prefer")
    if mode == "disable":
        return False
    if mode in {"allow", "prefer"}:
        return None
    if mode not in {"require", "verify-ca", "verify-full"}:
        raise UsageError("database address", f"sslmode {mode!r}", "disable, prefer, require, verify-ca or verify-full")
    try:
        context = ssl.create_default_context(cafile=options.get("sslrootcert"))
        if "sslcert" in options:
            context.load_cert_chain(options["sslcert"], options.get("sslkey"))
    except OSError as err:
        raise UsageError("database address", "its certificates cannot be read", "check the paths") from err
    context.check_hostname = mode == "verify-full"
    # As PostgreSQL's library does: "require" checks the certificate only where an authority is named.
    if mode == "require" and "sslrootcert" not in options:
        context.verify_mode = ssl.CERT_NONE
    return context


def _password(host: str, port: str, database: str, user: str) -> str | None:
    """The password that PostgreSQL's programs would use for an address without one."""
    if found := os.environ.get("PGPASSWORD"):
        return found
    file = Path(os.environ.get("PGPASSFILE") or Path.home() / ".pgpass")
    try:
        if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & 0o077:
            return None  # readable by others: PostgreSQL's programs pass it over
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    wanted = ("localhost" if host.startswith("/") else host, port, database, user)
    for line in lines:
        fields = _fields(line)
        if len(fields) == 5 and all(held in {"*", want} for held, want in zip(fields, wanted, strict=False)):
            return fields[4]
    return None


def _fields(line: str) -> list[str]:
    """The fields of a line of .pgpass: parted by colons, a backslash before a letter that is meant itself."""
    found, escaped = [""], False
    for letter in line:
        if not escaped and letter in "\\:":
            escaped = letter == "\\"
            if letter == ":":
                found.append("")
            continue
        found[-1] += letter
        escaped = False
    return found
