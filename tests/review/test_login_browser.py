"""Who may come in, with a real OpenID Connect provider on this machine and a real Chromium."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from medseg.review.signing import Claim, Signer, login_of
from medseg.review.store.models import User
from medseg.review.store.repo import Store
from tests.builders import blob_scan, save_scan
from tests.review.serving import CHROMIUM, FLAGS, PATIENCE_S, free_port, serving, wait_for

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
pytest.importorskip("streamlit", reason="the page needs the package streamlit")
pytest.importorskip("authlib", reason="the login needs the package Authlib")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("oidc_provider_mock") is None, reason="the package oidc-provider-mock is not installed"
    ),
]

KEY = "k" * 40
LOGIN = """
[auth]
redirect_uri = "{address}/oauth2callback"
cookie_secret = "0123456789abcdef0123456789abcdef"
client_id = "medseg"
client_secret = "secret"
server_metadata_url = "{provider}/.well-known/openid-configuration"
[roles]
admin = ["anna@example.org"]
reviewer = ["4f1c-ben"]
reader = ["77aa-rita"]
"""
PEOPLE = {
    "e0d2-anna": {"name": "Anna Adams", "email": "anna@example.org", "email_verified": True},
    "4f1c-ben": {"name": "Ben Brown", "email": "ben@example.org"},
    "77aa-rita": {"name": "Rita Reid"},
    # Some providers let people choose their address.
    "0bad-eve": {"name": "Anna Adams", "email": "anna@example.org", "email_verified": False},
}


class Clinic:
    """A provider, a page that trusts it, a browser, and the store beneath."""

    def __init__(self, address: str, provider: str, browser: Any, store: Store) -> None:
        self.address, self.provider, self.browser, self.store = address, provider, browser, store
        (row,) = store.worklist()
        self.case = row.case.id

    def user(self, subject: str) -> User:
        (found,) = [user for user in self.store.users() if user.subject == f"{self.provider}|{subject}"]
        return found

    def log_in(self, stack: ExitStack, subject: str, **cookies: str) -> Any:
        """A tab of somebody who came by way of the provider, in a browser of their own."""
        context = self.browser.new_context(viewport={"width": 1366, "height": 768})
        stack.callback(context.close)
        context.add_cookies([{"name": name, "value": value, "url": self.address} for name, value in cookies.items()])
        tab = context.new_page()
        tab.set_default_timeout(PATIENCE_S * 1000)
        tab.on("dialog", lambda dialog: dialog.accept())
        tab.goto(self.address)
        tab.get_by_role("button", name="Log in").click()
        tab.get_by_role("button", name=subject).click()
        tab.wait_for_url(f"{self.address}/**")
        return tab

    def open(self, tab: Any) -> list[str]:
        """The case in the viewer; addresses of the voxels that the browser loaded."""
        loaded: list[str] = []
        tab.on("response", lambda answer: loaded.append(answer.url) if "/medseg/api/v1/" in answer.url else None)
        tab.goto(f"{self.address}/review?case={self.case}")
        tab.locator(".medseg-viewer[data-phase=ready]").wait_for()
        return loaded

    def token(self, tab: Any, subject: str) -> dict[str, str]:
        """What the page of somebody would send with a save, were it to save."""
        cookies = {cookie["name"]: cookie["value"] for cookie in tab.context.cookies(self.address)}
        claim = Claim("save", self.case, self.user(subject).id, login_of(cookies))
        return {"X-Medseg-Token": Signer(KEY.encode()).sign(claim), "If-Match": '"1"'}


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    folder = tmp_path_factory.mktemp("login")
    scans = folder / "scans"
    scans.mkdir()
    save_scan(scans / "one.nii.gz", blob_scan((24, 20, 16)))
    labels = np.zeros((24, 20, 16), np.uint8)
    labels[10:14, 8:12, 6:9] = 1
    save_scan(scans / "one_seg.nii.gz", labels)
    ports = free_port(), free_port()
    address, provider = f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
    (folder / "login.toml").write_text(LOGIN.format(address=address, provider=provider))
    people = [word for sub, claims in PEOPLE.items() for word in ("--user-claims", json.dumps({"sub": sub, **claims}))]
    page = ["review", str(scans), "--data", str(folder / "data"), "--host", "127.0.0.1", "--port", str(ports[0])]
    with (
        serving(
            folder / "provider.log",
            *("--port", str(ports[1]), *people),
            port=ports[1],
            module="oidc_provider_mock",
            ready="/.well-known/openid-configuration",
        ),
        serving(
            folder / "page.log",
            *(*page, "--login", str(folder / "login.toml")),
            port=ports[0],
            ready="/medseg/healthz",
            environment={"MEDSEG_REVIEW_TEST": "1", "MEDSEG_REVIEW_KEY": KEY},
        ),
        playwright.sync_playwright() as tools,
    ):
        store = Store.in_folder(folder / "data")
        wait_for(lambda: [row.case.revision for row in store.worklist()] == [1], "the scan was not imported")
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield Clinic(address, provider, browser, store)
        browser.close()
        store.close()


def test_a_reviewer_logs_in_saves_and_signs_under_the_providers_subject_and_logs_out(clinic: Clinic) -> None:
    with ExitStack() as stack:
        ben = clinic.log_in(stack, "4f1c-ben")
        ben.get_by_text("Click a line to open it").wait_for()
        sent: list[Any] = []
        ben.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
        loaded = clinic.open(ben)

        ben.evaluate("window.__medseg_test.goto([4, 4, 7])")
        ben.keyboard.press("b")
        ben.mouse.move(*ben.evaluate("window.__medseg_test.point('axial', [4, 4, 7])"))
        ben.mouse.down()
        ben.mouse.move(*ben.evaluate("window.__medseg_test.point('axial', [8, 4, 7])"), steps=4)
        ben.mouse.up()
        ben.wait_for_function("window.__medseg_test.dirty()")
        ben.keyboard.press("Control+s")
        wait_for(lambda: clinic.store.case(clinic.case).revision == 2, "nothing was saved")
        ben.wait_for_function("!window.__medseg_test.dirty()")
        ben.get_by_role("tab", name="Verdict").click()
        ben.get_by_role("button", name="Sign as Ben Brown").click()
        wait_for(lambda: clinic.store.case(clinic.case).state == "accepted", "nothing was signed")
        user = clinic.user("4f1c-ben")
        (verdict,) = clinic.store.reviews(clinic.case)
        assert (user.role, user.display_name, verdict.reviewer_id) == ("reviewer", "Ben Brown", user.id)
        trail = list(clinic.store.trail())
        assert {line.action for line in trail if line.user_id == user.id} >= {"user_added", "saved", "signed"}
        (came,) = [line for line in trail if line.user_id == user.id and line.action == "user_added"]
        assert json.loads(came.detail) == {"role": "reviewer", "subject": f"{clinic.provider}|4f1c-ben"}
        assert clinic.store.check_trail().broken_at is None

        # Links and tokens belong to this login in this browser.
        volume = next(url for url in loaded if urlsplit(url).path.endswith(f"/volume/{clinic.case}"))
        (save,) = [request for request in sent if "/mask/" in request.url]
        stolen = {"X-Medseg-Token": save.headers["x-medseg-token"], "If-Match": '"2"'}
        assert ben.context.request.get(volume).status == 200
        rita = clinic.log_in(stack, "77aa-rita")
        rita.get_by_text("Click a line to open it").wait_for()
        nobody = clinic.browser.new_context()
        stack.callback(nobody.close)
        for other in (rita.context.request, nobody.request):
            assert other.get(volume).status == 403
            assert other.post(save.url, data=b"x", headers=stolen).status == 403

        second = ben.context.new_page()
        second.set_default_timeout(PATIENCE_S * 1000)
        second.goto(f"{clinic.address}/audit")
        second.get_by_role("button", name="Check").wait_for()
        cookies = {cookie["name"]: cookie["value"] for cookie in ben.context.cookies(clinic.address)}
        copied = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}
        assert nobody.request.get(volume, headers=copied).status == 200
        ben.goto(f"{clinic.address}/settings")
        ben.get_by_role("button", name="Log out").click()
        ben.get_by_role("button", name="End session").click()
        ben.get_by_role("button", name="Log in").wait_for()
        assert ben.context.request.get(volume).status == 403
        assert ben.context.request.post(save.url, data=b"x", headers=stolen).status == 403
        assert nobody.request.get(volume, headers=copied).status == 403
        second.get_by_role("button", name="Check").click()
        second.get_by_role("button", name="Log in").wait_for()


def test_a_reader_sees_and_may_not_save_or_sign(clinic: Clinic) -> None:
    with ExitStack() as stack:
        rita = clinic.log_in(stack, "77aa-rita")
        rita.get_by_text("Click a line to open it").wait_for()
        clinic.open(rita)
        rita.get_by_role("tab", name="Verdict").click()
        rita.get_by_text("Version 1").or_(rita.get_by_text("Version 2")).first.wait_for()
        assert rita.get_by_role("button", name="Sign as").count() == 0
        before = clinic.store.case(clinic.case).revision
        answer = rita.context.request.post(
            f"{clinic.address}/medseg/api/v1/mask/{clinic.case}", data=b"x", headers=clinic.token(rita, "77aa-rita")
        )
        assert (answer.status, answer.json()["error"].split(";")[0]) == (403, "the role reader may not save")
        assert clinic.store.case(clinic.case).revision == before


def test_somebody_without_a_role_is_told_so_whatever_their_browser_claims(clinic: Clinic) -> None:
    with ExitStack() as stack:
        anna = clinic.log_in(stack, "e0d2-anna")
        anna.get_by_text("Click a line to open it").wait_for()
        user = clinic.user("e0d2-anna")
        assert user.role == "admin"
        before = len(clinic.store.users())
        eve = clinic.log_in(stack, "0bad-eve", medseg_reviewer=user.id)
        eve.get_by_text("You are logged in, but you have no role on this page.").wait_for()
        eve.get_by_text("0bad-eve").wait_for()
        eve.goto(f"{clinic.address}/review?case={clinic.case}")
        eve.get_by_text("You are logged in, but you have no role on this page.").wait_for()
        assert eve.locator(".medseg-viewer").count() == 0
        assert len(clinic.store.users()) == before
        eve.get_by_role("button", name="Log out").click()
        eve.get_by_role("button", name="End session").click()
        eve.get_by_role("button", name="Log in").wait_for()
