"""Who may come in, what is served beside the page, and which scans become cases."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from medseg.batch.journal import Entry, Journal
from medseg.errors import DeviceError, InputError, MedsegError, UsageError
from medseg.review import server
from medseg.review.intake import Intake
from medseg.review.settings import Settings, read_login
from medseg.review.store.repo import Store
from medseg.review.worklist import import_upload
from tests.builders import blob_scan, save_scan

LOGIN = """
[auth]
redirect_uri = "https://review.example.org/oauth2callback"
cookie_secret = "0123456789abcdef0123456789abcdef"
client_id = "medseg"
client_secret = "hidden"
server_metadata_url = "https://login.example.org/.well-known/openid-configuration"
[roles]
admin = ["Anna@Example.org"]
reviewer = ["subject-of-ben"]
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A browser at the whole application; Streamlit allows one in a process."""
    app = server.build_app(Settings(tmp_path_factory.mktemp("data")), hosts=("testserver",))
    with TestClient(app) as found:
        yield found


def test_page_and_routes_answer_on_one_port_to_this_machines_names_only(client: TestClient) -> None:
    assert client.get("/medseg/healthz").status_code == 204
    assert "<title>" in client.get("/").text
    assert client.get("/medseg/healthz", headers={"Host": "attacker.example"}).status_code == 400
    assert client.get("/medseg/healthz", headers={"Host": "localhost:8501"}).status_code == 204


def test_only_files_that_the_manifest_lists_are_served(tmp_path: Path) -> None:
    (tmp_path / "viewer.0123.js").write_text("export default 1")
    (tmp_path / "other.js").write_text("secret")
    (tmp_path / "manifest.json").write_text(json.dumps({"entry": "viewer.0123.js", "files": ["viewer.0123.js"]}))
    client = TestClient(Starlette(routes=[server.static_route(tmp_path)]))
    answer = client.get("/medseg/static/viewer.0123.js")
    assert (answer.status_code, answer.text) == (200, "export default 1")
    assert answer.headers["content-type"].startswith("text/javascript")
    assert "immutable" in answer.headers["cache-control"]
    for name in ("manifest.json", "other.js", "..%2fmanifest.json", "%2e%2e/manifest.json"):
        assert client.get(f"/medseg/static/{name}").status_code == 404


def test_another_address_needs_a_login(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--host 192\.0\.2\.7: .*nobody would be asked who they are; give --login"):
        Settings(tmp_path, host="192.0.2.7")
    (tmp_path / "login.toml").write_text(LOGIN)
    assert Settings(tmp_path, host="192.0.2.7", login=read_login(tmp_path / "login.toml")).login is not None
    assert Settings(tmp_path, host="::1").login is None
    with pytest.raises(UsageError, match="has 5 bytes; use 32 random ones"):
        Settings(tmp_path, key=b"short")


def test_roles_follow_the_login_file_and_an_unverified_address_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "login.toml").write_text(LOGIN)
    login = read_login(tmp_path / "login.toml")
    assert login.address == "https://review.example.org"

    def role(sub: str, **claims: Any) -> str | None:
        return login.role({"iss": "https://login.example.org", "sub": sub, **claims})

    assert role("1", email="Anna@example.org", email_verified=True) == "admin"
    assert role("1", email="anna@example.org", email_verified=False) is None
    assert role("1", email="anna@example.org") is None
    assert role("subject-of-ben") == "reviewer"
    assert role("Subject-of-Ben") is None
    assert role("x", email="carl@example.org", email_verified=True) is None
    assert login.role({"sub": "subject-of-ben"}) is None
    everybody = LOGIN + 'reader = ["*"]\n'
    (tmp_path / "login.toml").write_text(everybody)
    assert [read_login(tmp_path / "login.toml").role({"iss": "i", "sub": sub}) for sub in ("x", "subject-of-ben")] == [
        "reader",
        "reviewer",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[auth", "is not TOML"),
        ("[roles]", r"has no section \[auth\]"),
        (LOGIN.replace("client_secret", "secret"), "lacks client_secret"),
        (LOGIN.replace("reviewer =", "doctor ="), "takes reader, reviewer and admin"),
        (LOGIN.partition("[roles]")[0], "takes reader, reviewer and admin"),
        (LOGIN.replace("subject-of-ben", "*"), "may only be a reader"),
        (LOGIN.replace("0123456789abcdef", "hidden"), "shorter than 32 characters"),
        (LOGIN.replace("oauth2callback", "callback"), "redirect_uri is not the page's address"),
        (LOGIN.replace('["subject-of-ben"]', '"ben"'), "reviewer is not a list"),
    ],
)
def test_a_login_file_that_is_not_complete_is_refused_without_its_secrets(
    tmp_path: Path, text: str, problem: str
) -> None:
    (tmp_path / "login.toml").write_text(text)
    with pytest.raises(InputError, match=problem) as caught:
        read_login(tmp_path / "login.toml")
    assert "hidden" not in str(caught.value)


def test_a_login_without_its_packages_is_refused_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "login.toml").write_text(LOGIN)
    settings = Settings(tmp_path / "data", login=read_login(tmp_path / "login.toml"))
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DeviceError, match=r"--login: authlib and httpx not installed; pip install 'medseg\[auth\]'"):
        server.build_app(settings)
    assert not (tmp_path / "data").exists()


def test_a_taken_port_is_said_before_anything_is_opened(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}: cannot listen there"):
            server.check_port("127.0.0.1", port)


def test_scans_in_the_data_folder_become_cases_once_and_what_the_store_keeps_does_not(tmp_path: Path) -> None:
    save_scan(tmp_path / "a.nii.gz", blob_scan((8, 9, 10)))
    save_scan(tmp_path / "a_seg.nii.gz", np.ones((8, 9, 10), np.uint8))
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing")
    store = Store.in_folder(tmp_path)
    intake = Intake(store, [tmp_path])
    for _ in range(2):
        intake.start()
        intake.wait()
    (row,) = store.worklist()
    assert (row.case.name, row.case.revision) == ("a", 1)
    progress = intake.progress()
    assert not progress.running
    assert any(problem.startswith("broken:") for problem in progress.problems)
    import_upload(store, tmp_path / "a.nii.gz", name="upload", by=store.sign_in("local:anna", "Anna"))
    intake.start()
    intake.wait()
    assert sorted(one.case.name for one in store.worklist()) == ["a", "upload"]
    store.close()


def test_a_batchs_output_finds_its_scans_in_the_other_folders(tmp_path: Path) -> None:
    scans, output = tmp_path / "scans", tmp_path / "output"
    for folder in (scans, output):
        folder.mkdir()
    for name in ("a", "b"):
        save_scan(scans / f"{name}.nii.gz", blob_scan((8, 9, 10)))
    save_scan(output / "a_seg.nii.gz", np.ones((8, 9, 10), np.uint8))
    journal = Journal.read(output)
    journal.begin({})
    journal.append(Entry(event="done", case="a"))
    journal.close()
    store = Store.in_folder(tmp_path / "data")
    intake = Intake(store, [tmp_path / "data", scans, output, tmp_path / "gone"])
    intake.start()
    intake.wait()
    assert {row.case.name: row.case.revision for row in store.worklist()} == {"a": 1, "b": 0}
    assert any("gone" in problem for problem in intake.progress().problems)
    store.close()


def test_a_database_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="neither a file of SQLite nor PostgreSQL"):
        server.Services.open(Settings(tmp_path, database="mysql://x/y"))
