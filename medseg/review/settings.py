"""How the review page is served: where its data lie, on which address, and who may come in."""

from __future__ import annotations

import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medseg.errors import InputError, UsageError
from medseg.review.store.models import Role

DEFAULT_PORT = 8501
LARGEST_UPLOAD_MB = 2048
KEY_BYTES = 32

EVERYBODY = "*"
CALLBACK = "/oauth2callback"
LEAST_SECRET = 32
"""Characters: who guesses the secret of the cookies can be anybody."""

_LOGIN_KEYS = ("redirect_uri", "cookie_secret", "client_id", "client_secret", "server_metadata_url")


@dataclass(frozen=True)
class Login:
    """Login by OpenID Connect: who may come in, and the roles that people have from the start.

    Attributes:
        file: TOML file with ``[auth]`` as Streamlit reads it, and ``[roles]``.
        address: of the page in browsers; a login that begins at another one cannot end.
        roles: subject, or e-mail address in lower case, to role; `EVERYBODY` stands for whomever the provider knows.
    """

    file: Path
    address: str
    roles: Mapping[str, Role]

    def role(self, claims: Mapping[str, Any]) -> Role | None:
        """The role of somebody who signs in for the first time; None for somebody who may not come in.

        Args:
            claims: of the identity token. An address counts only when the provider says that it is verified: with
                some, people choose their address themselves.
        """
        if not claims.get("iss") or not claims.get("sub"):
            return None
        names = [str(claims["sub"])]
        if claims.get("email_verified") is True:
            names.append(str(claims.get("email")).lower())
        return next((self.roles[name] for name in (*names, EVERYBODY) if name in self.roles), None)


@dataclass(frozen=True)
class Settings:
    """Where and for whom the page is served.

    Attributes:
        data: the data folder.
        database: address of the database; "" is SQLite in the data folder.
        scans: folders whose scans become cases, with the results beside them or in another of these folders.
        host: address to listen on; anything but this machine needs `login`.
        port: port to listen on.
        key: signs the links to voxels; shared by all processes that serve one data folder.
        upload_mb: largest upload.
        login: None: who opens the page says a name, which nobody checks.
        test: the viewer lets tests look into it.
    """

    data: Path
    database: str = ""
    scans: tuple[Path, ...] = ()
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES), repr=False)
    upload_mb: int = LARGEST_UPLOAD_MB
    login: Login | None = None
    test: bool = False

    def __post_init__(self) -> None:
        if len(self.key) < KEY_BYTES:
            raise UsageError("MEDSEG_REVIEW_KEY", f"has {len(self.key)} bytes", f"use {KEY_BYTES} random ones or more")
        if self.login is None and not is_local(self.host):
            raise UsageError(
                f"--host {self.host}",
                "other machines could open the page, and nobody would be asked who they are",
                "give --login FILE, or leave --host out",
            )


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def read_login(file: Path) -> Login:
    """Read the file that sets up the login.

    Raises:
        InputError: it cannot be read, or something is missing in it. The message repeats no value.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(file, "cannot be read", "check path and permissions") from err
    except tomllib.TOMLDecodeError as err:
        raise InputError(file, "is not TOML", "see docs/review.md for an example") from err
    auth, roles = content.get("auth"), content.get("roles", {})
    if not isinstance(auth, dict):
        raise InputError(file, "has no section [auth]", "see docs/review.md for an example")
    missing = [key for key in _LOGIN_KEYS if not auth.get(key)]
    if missing:
        raise InputError(file, f"[auth] lacks {', '.join(missing)}", "see docs/review.md for an example")
    if len(str(auth["cookie_secret"])) < LEAST_SECRET:
        remedy = "write what python -c 'import secrets; print(secrets.token_hex())' prints"
        raise InputError(file, f"cookie_secret is shorter than {LEAST_SECRET} characters", remedy)
    address = str(auth["redirect_uri"]).removesuffix(CALLBACK)
    place = urlsplit(address)
    if address == auth["redirect_uri"] or place.scheme not in {"http", "https"} or place.path or "{" in address:
        raise InputError(file, f"redirect_uri is not the page's address and {CALLBACK}", "see docs/review.md")
    ranks: tuple[Role, ...] = ("reader", "reviewer", "admin")
    if not isinstance(roles, dict) or not roles or set(roles) - set(ranks):
        raise InputError(file, "[roles] takes reader, reviewer and admin", "say who may come in, under one of them")
    known: dict[str, Role] = {}
    for role in ranks:
        names = roles.get(role, [])
        if not isinstance(names, list):
            raise InputError(file, f"[roles] {role} is not a list", 'write admin = ["anna@example.org"]')
        known |= {str(name).lower() if "@" in str(name) else str(name): role for name in names}
    if known.get(EVERYBODY, "reader") != "reader":
        raise InputError(file, f'"{EVERYBODY}" may only be a reader', "name those who may do more")
    return Login(file.absolute(), address, known)
