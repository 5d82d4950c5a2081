"""What every page gets: the services of this process, who looks at it, and how failures and links are worded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from medseg.errors import MedsegError
from medseg.review.api import PREFIX
from medseg.review.compare import Segmentation
from medseg.review.server import Services
from medseg.review.signing import Claim, Purpose, Reading, login_of
from medseg.review.store.models import Case, Prediction, User
from medseg.review.store.repo import Store, WorklistRow

COOKIE = "medseg_reviewer"
"""Holds the identifier of the person who said a name in this browser, where there is no login."""

STATES = ("new", "in review", "accepted", "needs correction", "rejected")


@dataclass(frozen=True)
class Context:
    """A page's surroundings.

    Attributes:
        services: of this process.
        user: who looks at the page, read from the store in this run.
    """

    services: Services
    user: User

    @property
    def store(self) -> Store:
        """The store."""
        return self.services.store

    @property
    def may_review(self) -> bool:
        """Whether this person may save, sign, upload and run."""
        return self.user.role != "reader"

    def token(self, purpose: Purpose, target: str) -> str:
        """A signed claim of this person, for the browser that they have logged in with."""
        login = login_of(st.context.cookies) if self.services.settings.login is not None else ""
        return self.services.signer.sign(Claim(purpose, target, self.user.id, login))

    def link(self, purpose: Reading, *target: str) -> str:
        """A signed path on this server.

        Args:
            purpose: what is read, the route's name.
            target: identifiers of what it is about.
        """
        place = ".".join(target)
        return f"{PREFIX}/{purpose}/{place}?t={self.token(purpose, place)}"

    def revision_of(self, shown: Segmentation) -> int:
        """The version that a label map is, or was drawn on; 0 for a model's."""
        if shown.kind == "version":
            return self.store.mask(shown.id).revision
        return self.store.mask(shown.id).base_revision if shown.kind == "draft" else 0

    def prediction_of(self, case: Case, shown: Segmentation | None) -> Prediction | None:
        """The prediction that is shown, or that a version was made from."""
        if shown is None or shown.kind == "reference":
            return None
        if shown.kind == "prediction":
            return self.store.prediction(shown.id)
        return self.store.origin(case.id, self.revision_of(shown))


def log_out(services: Services) -> None:
    """End the login of this browser, in all its tabs."""
    services.signer.end(login_of(st.context.cookies))
    st.logout()


@contextmanager
def told() -> Iterator[None]:
    """Show a failure with a known cause as one line, without folders, instead of ending the page."""
    try:
        yield
    except MedsegError as error:
        st.error(said(error))
    except PermissionError as error:
        st.error(str(error))


def said(error: MedsegError) -> str:
    """A failure in the words of the command line, without folders."""
    subject = Path(error.subject).name or error.subject
    return f"{subject}: {error.problem}" + (f"; {error.remedy}" if error.remedy else "")


def distinct(names: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Identifier to name, where a name that came before gets a number: Streamlit tells options apart by their text."""
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for one, name in names:
        seen[name] += 1
        found[one] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return found


def case_names(rows: Iterable[WorklistRow]) -> dict[str, str]:
    """Identifier to a name that no other case has on this page."""
    return distinct((row.case.id, row.case.name) for row in rows)


def open_case() -> str | None:
    """The case that this session looks at."""
    found: str | None = st.session_state.get("case_id")
    return found


def show_case(case_id: str) -> None:
    """Make a case the one that this session looks at."""
    if case_id != open_case():
        for key in ("shown", "cmd", "visible", "colours", "conflict"):
            st.session_state.pop(key, None)
    st.session_state.case_id = case_id
