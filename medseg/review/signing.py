"""Signed, short-lived claims: what a URL or a header may be used for, by whom, until when."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from itsdangerous import BadData, URLSafeTimedSerializer

Reading = Literal["volume", "reduced", "poster", "labels", "uncertainty", "evidence", "phase", "difference"]
Writing = Literal["save", "screenshot", "upload"]
Purpose = Literal[Reading, Writing]

MAX_AGE_S: dict[Purpose, int] = {
    **dict.fromkeys(get_args(Reading), 300),
    "save": 8 * 3600,
    "screenshot": 8 * 3600,
    "upload": 3600,
}
"""Seconds that a claim holds. Those in URLs are short; those in headers last a working day or an upload."""


LOGIN_COOKIE = "_streamlit_user"
"""Begins the names of the cookies in which Streamlit keeps, signed and out of reach of scripts, who has logged in."""


class BadClaimError(Exception):
    """A token that is not ours, of another purpose, for something else or another login, or too old."""


def login_of(cookies: Mapping[str, str]) -> str:
    """What tells one login in one browser from all others; "" where nobody has logged in."""
    found = sorted((name, value) for name, value in cookies.items() if name.startswith(LOGIN_COOKIE))
    return hashlib.sha256(repr(found).encode()).hexdigest() if found else ""


@dataclass(frozen=True)
class Claim:
    """What a token says.

    Attributes:
        purpose: what it may be used for.
        target: the last part of the route: identifiers of what it is about, joined by dots; "" where there is none yet.
        user_id: who asked for it.
        login: see `login_of`; requests must come with the cookies of this login. "" where the page has no login.
    """

    purpose: Purpose
    target: str
    user_id: str
    login: str = ""


class Signer:
    """Signs claims with a secret.

    Args:
        key: 32 random bytes or more; the same in all processes that serve one store.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 32:
            raise ValueError(f"the key must have at least 32 bytes, got {len(key)}")
        self._key = key
        self._ended: set[str] = set()

    def sign(self, claim: Claim) -> str:
        """A token, safe in URLs and headers; it holds random identifiers and a time, nothing else."""
        return self._serializer(claim.purpose).dumps([claim.target, claim.user_id, claim.login])

    def end(self, login: str) -> None:
        """Take no claim of a login any more: somebody has logged out, and copies of the cookies may be left."""
        self._ended.add(login)

    def ended(self, login: str) -> bool:
        """Whether somebody has logged out of this login, as far as this process knows."""
        return login in self._ended

    def verify(self, token: str, purpose: Purpose, target: str, *, cookies: Mapping[str, str]) -> Claim:
        """Check a token.

        Args:
            token: made by `sign`.
            purpose: what it is to be used for.
            target: what on.
            cookies: those that came with it.

        Raises:
            BadClaimError: it does not allow `purpose` on `target` now.
        """
        try:
            signed, user_id, login = self._serializer(purpose).loads(token, max_age=MAX_AGE_S[purpose])
        except (BadData, ValueError, TypeError):
            raise BadClaimError from None
        if signed != target or (login and (login != login_of(cookies) or self.ended(login))):
            raise BadClaimError
        return Claim(purpose, target, user_id, login)

    def _serializer(self, purpose: Purpose) -> URLSafeTimedSerializer:
        return URLSafeTimedSerializer(
            self._key, salt=f"medseg.review.{purpose}", signer_kwargs={"digest_method": hashlib.sha256}
        )
