"""The pages' own logic, without a browser: what the viewer is given, and what becomes of its events and of clicks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from streamlit.testing.v1 import AppTest

from medseg.review import server
from medseg.review.api import Api
from medseg.review.masks import encode
from medseg.review.saving import save_drawing
from medseg.review.settings import Settings
from medseg.review.store.models import User
from medseg.review.store.repo import BANNER, Saved
from medseg.review.worklist import add_result, import_folder
from tests.builders import blob_scan, save_scan

SHAPE = (8, 9, 10)
NAMES = {0: "background", 1: "liver", 2: "tumour"}


class Desk:
    """A data folder with two cases, the first with a segmentation, and pages over it."""

    def __init__(self, folder: Path) -> None:
        scans = folder / "scans"
        scans.mkdir()
        for name in ("one", "two"):
            save_scan(scans / f"{name}.nii.gz", blob_scan(SHAPE))
        self.services = server.Services.open(Settings(folder / "data"))
        server.share(self.services)
        self.store = self.services.store
        self.anna: User = self.store.sign_in("local:anna", "Anna")
        self.one, self.two = import_folder(self.store, scans, by=self.anna).added
        self.labels = np.zeros(SHAPE, np.uint8)
        self.labels[1:4, 2:5, 3:6] = 1
        self.labels[6, 7, 8] = 2
        add_result(self.store, self.one, self.labels, names=NAMES, model="organs", version="1.2", by=self.anna)

    def page(self, user: User | None = None) -> AppTest:
        """The page as somebody sees it who has said a name."""
        found = AppTest.from_file(str(server.app_folder() / "page.py"), default_timeout=60)
        found.session_state["user_id"] = (user or self.anna).id
        return found.run()

    def review(self, tab: str = "Structures", user: User | None = None) -> AppTest:
        """The first case, opened from the worklist."""
        found = self.page(user)
        found.session_state["panel"] = tab
        return found.button(key="next_unreviewed").click().run()

    def save(self, by: User, voxel: tuple[int, int, int], base: int) -> None:
        """Somebody corrects a voxel of the first case elsewhere."""
        labels = self.labels.copy()
        labels[voxel] = 2
        body = encode(labels, {1: 1, 2: 2})
        assert isinstance(save_drawing(self.store, self.one, body, base_revision=base, by=by), Saved)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path)
    yield found
    found.store.close()


def spec(page: AppTest) -> dict[str, Any]:
    """What the viewer was given."""
    found: list[dict[str, Any]] = [json.loads(element.proto.json) for element in page.get("bidi_component")]
    (content,) = (one for one in found if "case_id" in one)
    return content


def tell(page: AppTest, **events: Any) -> AppTest:
    """The viewer tells something; what it keeps between runs stays as it is."""
    page.session_state["viewer"] = events
    return page.run()


def texts(page: AppTest) -> str:
    kinds = ("markdown", "caption", "error", "info", "success", "warning", "toast", "title", "subheader")
    return "\n".join(str(element.value) for kind in kinds for element in page.get(kind))


def open_view(page: AppTest, name: str) -> AppTest:
    """Go to another view, as its link does; AppTest itself knows views in files only."""
    page._page_hash = page.session_state["pages"][name]._script_hash
    return page.run()


def progress(page: AppTest) -> str:
    return "\n".join(element.proto.text for element in page.get("progress"))


def test_somebody_says_a_name_once_and_sees_the_worklist(desk: Desk) -> None:
    page = AppTest.from_file(str(server.app_folder() / "page.py"), default_timeout=60).run()
    assert BANNER in texts(page)
    assert "the name is not checked" in texts(page)
    assert not page.get("arrow_data_frame")
    page.text_input[0].set_value("  Ben   Miller ")
    page.button[0].click().run()
    assert [user.display_name for user in desk.store.users() if user.subject == "local:ben miller"] == ["Ben Miller"]
    assert not page.exception
    assert list(page.dataframe[0].value["case"]) == ["one", "two"]
    page.text_input(key="filter_search").set_value("TW").run()
    assert list(page.dataframe[0].value["case"]) == ["two"]


def test_the_viewer_gets_links_that_answer_labels_and_where_to_save(desk: Desk) -> None:
    page = desk.review()
    assert not page.exception
    found = spec(page)
    assert [(label["value"], label["name"], label["visible"]) for label in found["labels"]] == [
        (1, "liver", True),
        (2, "tumour", True),
    ]
    assert [lesion["vox"] for lesion in found["lesions"]] == [[2, 3, 4], [6, 7, 8]]
    assert (found["case_id"], found["mask"]["revision"]) == (desk.one, 1)
    http = TestClient(Starlette(routes=Api(desk.store, desk.services.signer).routes()))
    for link in (found["image"]["url"], found["image"]["poster_url"], found["mask"]["url"]):
        assert http.get(link).status_code == 200
    body = encode(desk.labels, {1: 1, 2: 2})
    headers = {"X-Medseg-Token": found["save"]["token"], "If-Match": f'"{found["save"]["revision"]}"'}
    assert http.post(found["save"]["url"], content=body, headers=headers).json()["revision"] == 2


def test_structures_are_shown_alone_and_all_again(desk: Desk) -> None:
    page = desk.review()
    page.selectbox(key="structure").set_value(2).run()
    page.button(key="show_solo").click().run()
    assert [label["visible"] for label in spec(page)["labels"]] == [False, True]
    page.button(key="show_all").click().run()
    assert [label["visible"] for label in spec(page)["labels"]] == [True, True]


def test_a_reader_sees_and_cannot_save_sign_or_bring_back(desk: Desk) -> None:
    rita = desk.store.sign_in("local:rita", "Rita", role="reader")
    page = desk.review("Verdict", rita)
    assert spec(page)["save"] is None
    assert "sign" not in {button.key for button in page.button}
    page = desk.review("History", rita)
    assert not [button.key for button in page.button if str(button.key).startswith("act_")]


def test_a_save_is_told_once_and_the_next_one_builds_on_it(desk: Desk) -> None:
    page = desk.review()
    desk.save(desk.anna, (0, 0, 0), 1)
    told = {"case_id": desk.one, "revision": 2, "changed_voxels": 1, "sha256": "a" * 64}
    tell(page, saved=told, dirty=False)
    assert spec(page)["save"]["revision"] == 2
    assert spec(page)["mask"]["revision"] == 2
    assert not page.exception


def test_unsaved_changes_hold_their_base_while_somebody_else_saves(desk: Desk) -> None:
    page = tell(desk.review(), dirty=True)
    desk.save(desk.store.sign_in("local:ben", "Ben"), (0, 0, 0), 1)
    page.run()
    assert (spec(page)["save"]["revision"], spec(page)["mask"]["revision"]) == (1, 1)
    tell(page, dirty=False)
    assert spec(page)["save"]["revision"] == 2


def test_leaving_a_case_with_unsaved_changes_asks_and_saves_first(desk: Desk) -> None:
    page = tell(desk.review(), dirty=True)
    page.button(key="next").click().run()
    assert spec(page)["case_id"] == desk.one
    page.button(key="leave_stay").click().run()
    assert "leave_stay" not in {button.key for button in page.button}
    page.button(key="next").click().run()
    page.button(key="leave_save").click().run()
    assert (spec(page)["case_id"], spec(page)["cmd"]["type"]) == (desk.one, "save")
    told = {"case_id": desk.one, "revision": 2, "changed_voxels": 1, "sha256": "b" * 64}
    tell(page, saved=told, dirty=False)
    assert spec(page)["case_id"] == desk.two


def test_of_two_who_save_the_second_chooses_and_nothing_is_lost(desk: Desk) -> None:
    page = tell(desk.review(), dirty=True)
    ben = desk.store.sign_in("local:ben", "Ben")
    desk.save(ben, (0, 0, 0), 1)
    labels = desk.labels.copy()
    labels[0, 0, 1] = 1
    lost = save_drawing(desk.store, desk.one, encode(labels, {1: 1, 2: 2}), base_revision=1, by=desk.anna)
    assert not isinstance(lost, Saved)
    tell(page, dirty=True, conflict={"case_id": desk.one, **vars(lost)})
    assert "Ben saved version 2" in texts(page)
    page.button(key="conflict_over").click().run()
    command = spec(page)["cmd"]
    assert (command["type"], command["revision"], command["draft_id"]) == ("save_over", 2, lost.draft_id)
    tell(page, dirty=False)
    page.session_state["panel"] = "History"
    page.run()
    page.button(key=f"act_{lost.draft_id}").click().run()
    assert desk.store.case(desk.one).revision == 3
    assert desk.store.drafts(desk.one) == []


def test_a_verdict_is_signed_with_a_comment_where_one_is_needed(desk: Desk) -> None:
    page = desk.review("Verdict")
    page.radio[0].set_value("needs correction").run()
    page.button(key="sign").click().run()
    assert "without a comment; say what is wrong" in texts(page)
    page.text_area[0].set_value("<b>too small</b>").run()
    page.button(key="sign").click().run()
    (review,) = desk.store.reviews(desk.one)
    assert (review.verdict, review.comment, review.revision, review.reviewer_name) == (
        "needs correction",
        "<b>too small</b>",
        1,
        "Anna",
    )
    assert "Anna" in texts(page)
    tell(page, dirty=True)
    assert page.button(key="sign").disabled


def test_an_older_version_is_looked_at_and_brought_back_as_a_new_one(desk: Desk) -> None:
    desk.save(desk.anna, (0, 0, 0), 1)
    page = desk.review("History")
    first = desk.store.version(desk.one, 1)
    page.button(key=f"view_{first.id}").click().run()
    assert spec(page)["save"] is None
    assert spec(page)["mask"]["revision"] == 1
    page.button(key=f"act_{first.id}").click().run()
    assert desk.store.version(desk.one, 3).restored_from == 1
    assert (spec(page)["save"]["revision"], spec(page)["mask"]["revision"]) == (3, 3)


def test_runs_show_their_place_in_the_queue_and_why_they_failed(desk: Desk) -> None:
    page = desk.page()
    page.session_state["case_id"] = desk.two
    page = open_view(page, "run")
    page.checkbox[1].check()
    page.button[0].click().run()
    (job,) = desk.store.jobs()
    assert (job.case_id, job.state, job.options["force"]) == (desk.two, "queued", True)

    assert "waiting, 0 before it" in progress(page)
    desk.store.take_job("worker")
    desk.store.end_job(job.id, "failed", message="two.nii.gz: damaged; copy it again", code=3)
    page.run()
    assert "two.nii.gz: damaged; copy it again" in texts(page)


def test_two_label_maps_are_compared_by_numbers_and_by_pictures(desk: Desk) -> None:
    desk.save(desk.anna, (0, 0, 0), 1)
    page = open_view(desk.page(), "compare")
    assert not page.exception
    shown = spec(page)
    assert shown["layout"] == "compare"
    assert shown["compare"]["first"]["source"] == desk.store.version(desk.one, 2).id
    table = page.dataframe[0].value
    assert list(table["structure"]) == ["liver", "tumour"]
    assert list(table["Dice"].round(3)) == [1.0, round(2 / 3, 3)]
    page.segmented_control(key="compare_view").set_value("Difference").run()
    assert [label["name"] for label in spec(page)["labels"]][:2] == ["A only", "B only"]
    http = TestClient(Starlette(routes=Api(desk.store, desk.services.signer).routes()))
    assert http.get(spec(page)["mask"]["url"]).status_code == 200


def test_the_audit_trail_is_shown_and_checked(desk: Desk) -> None:
    page = open_view(desk.page(), "audit")
    page.button(key="audit_check").click().run()
    assert "each follows from the one before" in texts(page)
    assert "Anna" in set(page.dataframe[0].value["who"])
