"""The review page in a real Chromium, from the worklist to the exported files, over a server as people start it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.io.read import read_volume
from medseg.review.store.repo import Store
from tests.builders import save_scan
from tests.dicom_builders import write_series
from tests.review.serving import CHROMIUM, FLAGS, PATIENCE_S, free_port, serving, wait_for

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
pytest.importorskip("streamlit", reason="the page needs the package streamlit")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

SHAPE = (40, 36, 24)
TILTED = np.array([[1.95, -0.2, 0.1, -40], [0.25, 1.9, -0.6, -30], [0.1, 0.35, 2.9, 12], [0, 0, 0, 1.0]])
SERIES = np.diag([-1.5, -1.5, 2.5, 1.0])


def volume() -> tuple[np.ndarray, np.ndarray]:
    """A body of 40 HU in air with a brighter ball, and the ball (1) and a cube (2) as labels."""
    x, y, z = np.indices(SHAPE)
    body = ((x - 19.5) / 18) ** 2 + ((y - 17.5) / 16) ** 2 + ((z - 11.5) / 11) ** 2 < 1
    ball = (x - 12) ** 2 + (y - 18) ** 2 + (z - 12) ** 2 <= 16
    labels = ball.astype(np.uint8)
    labels[24:29, 15:20, 10:15] = 2
    noise = np.random.default_rng(0).normal(0, 12, SHAPE)
    return (np.select([ball, body], [150, 40], -1000) + noise).astype("<i2"), labels


class Page:
    """A tab of one person."""

    def __init__(self, tab: Any, address: str, person: str) -> None:
        self.tab, self.address = tab, address
        tab.set_default_timeout(PATIENCE_S * 1000)
        tab.on("dialog", lambda dialog: dialog.accept())
        tab.goto(address)
        tab.get_by_role("textbox", name="Your name").fill(person)
        tab.get_by_role("button", name="Begin").click()
        tab.get_by_text("Click a line to open it").wait_for()

    def open(self, desk: Desk, case: str) -> None:
        """A click on a case in the worklist, whose table is one canvas; the voxels are there when it ends."""
        place = [row.case.id for row in desk.store.worklist()].index(case)
        box = self.tab.locator("[data-testid=stDataFrame]").bounding_box()
        self.tab.mouse.click(box["x"] + 60, box["y"] + 52 + 35 * place)
        self.tab.locator(".medseg-viewer[data-phase=ready]").wait_for()
        assert f"case={case}" in self.tab.url

    def ask(self, expression: str) -> Any:
        return self.tab.evaluate(f"window.__medseg_test.{expression}")

    def until(self, expression: str) -> None:
        self.tab.wait_for_function(
            f"() => {{ try {{ return window.__medseg_test.{expression} }} catch {{ return false }} }}"
        )

    def move(self, plane: str, voxel: list[int]) -> None:
        self.tab.mouse.move(*self.ask(f"point('{plane}', {voxel})"), steps=4)

    def paint(self, start: list[int], end: list[int]) -> int:
        """A stroke of the brush in the axial plane; how many voxels differ from what was loaded."""
        self.ask(f"goto({start})")
        self.tab.keyboard.press("b")
        self.move("axial", start)
        self.tab.mouse.down()
        self.move("axial", end)
        self.tab.mouse.up()
        self.until("dirty()")
        return int(self.ask("changed()"))

    def picture(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.tab.locator(".stage").screenshot())).convert("RGB"), np.int16)

    def show_tab(self, name: str) -> None:
        self.tab.get_by_role("tab", name=name).click()

    def export(self, name: str) -> bytes:
        with self.tab.expect_download() as waiting:
            self.tab.get_by_role("button", name=name).click()
        return Path(waiting.value.path()).read_bytes()


class Desk:
    """A running server over a data folder, a browser, and the store beside them."""

    def __init__(self, folder: Path, address: str, browser: Any) -> None:
        self.folder, self.address, self.browser = folder, address, browser
        self.store = Store.in_folder(folder / "data")
        self.cases = {row.case.name: row.case.id for row in self.store.worklist()}

    @contextmanager
    def person(self, name: str) -> Iterator[Page]:
        """Somebody with a browser of their own."""
        context = self.browser.new_context(viewport={"width": 1366, "height": 768}, accept_downloads=True)
        tab = context.new_page()
        try:
            yield Page(tab, self.address, name)
        except BaseException:
            tab.screenshot(
                path=self.folder / f"failed_{name}.png"
            )  # beside the server's log, for whoever looks for why
            raise
        finally:
            context.close()

    def mask(self, case: str, revision: int) -> Any:
        return nib.load(self.store.file(self.store.version(case, revision).path))

    def wait_for(self, found: Callable[[], bool]) -> None:
        wait_for(found, "nothing happened")


@contextmanager
def opened(folder: Path, scans: Path, *, revisions: list[int]) -> Iterator[Desk]:
    """A server over a folder of scans whose cases have come to these versions, and a browser."""
    port = free_port()
    arguments = ["review", str(scans), "--data", str(folder / "data"), "--port", str(port)]
    environment = {"MEDSEG_REVIEW_TEST": "1"}
    with (
        serving(folder / "server.log", *arguments, port=port, ready="/medseg/healthz", environment=environment),
        playwright.sync_playwright() as tools,
    ):
        store = Store.in_folder(folder / "data")
        wait_for(lambda: [row.case.revision for row in store.worklist()] == revisions, "the scans were not imported")
        store.close()
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        found = Desk(folder, f"http://127.0.0.1:{port}", browser)
        try:
            yield found
        finally:
            found.store.close()
            browser.close()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("review")
    scans = folder / "scans"
    scans.mkdir()
    image, labels = volume()
    save_scan(scans / "ball.nii.gz", image, TILTED)
    save_scan(scans / "ball_seg.nii.gz", labels, TILTED)
    write_series(scans / "series", image, SERIES, modality="CT")
    save_scan(scans / "series_seg.nii.gz", labels, read_volume(scans / "series").affine)
    with opened(folder, scans, revisions=[1, 1]) as found:
        yield found


def test_a_case_is_opened_seen_corrected_saved_disputed_signed_and_exported(desk: Desk) -> None:
    case, labels = desk.cases["ball"], volume()[1]
    with desk.person("Anna") as anna, desk.person("Ben") as ben:
        for page in (anna, ben):
            page.open(desk, case)

        # The picture: all quadrants hold something, the structures have their colours.
        rows = desk.store.labels(case)
        anna.ask("goto([12, 18, 12])")
        wait_for(lambda: min(_filled(anna.picture())) > 0.05, "a quadrant stayed black")
        shown = anna.picture()
        colour = (rows[0].r, rows[0].g, rows[0].b)
        assert _share_of_hue(shown, colour) > 0.01
        anna.tab.keyboard.press("o")
        # The marks of the directions have a hue like it.
        wait_for(lambda: _share_of_hue(anna.picture(), colour) < 0.005, "the overlay stayed")
        anna.tab.keyboard.press("o")

        # Slices by the wheel, the window by a key and by the right button.
        before = anna.ask("vox()")
        anna.move("axial", before)
        anna.tab.mouse.wheel(0, 100)
        anna.until(f"vox()[2] !== {before[2]}")
        assert abs(anna.ask("vox()")[2] - before[2]) == 1
        anna.tab.keyboard.press("2")
        anna.until("window().join() === '-600,1500'")
        anna.move("axial", [20, 18, 12])
        anna.tab.mouse.down(button="right")
        anna.move("axial", [26, 18, 12])
        anna.tab.mouse.up(button="right")
        anna.until("window()[1] !== 1500")
        assert not anna.ask("dirty()")

        # A stroke, undone and done again, arrives in the file voxel by voxel.
        painted = anna.paint([8, 8, 12], [14, 8, 12])
        assert painted > 10
        anna.tab.keyboard.press("Control+z")
        anna.until("changed() === 0")
        anna.tab.keyboard.press("Control+Shift+Z")
        anna.until(f"changed() === {painted}")
        drawn = np.array(anna.ask("label([11, 8, 12])"))
        theirs = ben.paint([26, 26, 14], [30, 26, 14])  # unsaved: his page stays with version 1
        anna.tab.keyboard.press("Control+s")
        desk.wait_for(lambda: desk.store.case(case).revision == 2)
        anna.until("dirty() === false")
        saved, image = desk.mask(case, 2), nib.load(desk.folder / "scans" / "ball.nii.gz")
        found = np.asarray(saved.dataobj)
        assert np.count_nonzero(found != labels) == painted == desk.store.version(case, 2).changed_voxels
        assert set(found[found != labels]) == {int(drawn)}
        changed = np.argwhere(found != labels)
        assert set(changed[:, 2]) == {12}
        assert {8, 14} <= set(changed[:, 0])
        for field in ("srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "qform_code", "sform_code"):
            assert saved.header[field].tobytes() == image.header[field].tobytes(), field

        # Ben's save comes second, is kept, and goes on top.
        ben.tab.keyboard.press("Control+s")
        ben.tab.get_by_text("Somebody else saved first").wait_for()
        assert "Anna saved version 2" in ben.tab.get_by_role("dialog").inner_text()
        (draft,) = desk.store.drafts(case)
        kept = np.asarray(nib.load(desk.store.file(draft.path)).dataobj)
        assert np.count_nonzero(kept != labels) == theirs
        ben.tab.get_by_role("button", name="Save mine on top of theirs").click()
        desk.wait_for(lambda: desk.store.case(case).revision == 3)
        assert np.array_equal(np.asarray(desk.mask(case, 3).dataobj), kept)
        assert desk.store.drafts(case) == []

        # Ben signs what he sees, and takes the report home.
        ben.until("dirty() === false")
        ben.show_tab("Verdict")
        ben.tab.get_by_role("button", name="Sign as Ben").click()
        desk.wait_for(lambda: desk.store.case(case).state == "accepted")
        (verdict,) = desk.store.reviews(case)
        assert (verdict.revision, verdict.reviewer_name) == (3, "Ben")
        assert verdict.mask_sha256 == desk.store.version(case, 3).sha256
        ben.show_tab("Export")
        report = ben.export("Report (PDF)")
        assert report.startswith(b"%PDF")
        assert b"/Subtype /Image" in report
        assert [line.action for line in desk.store.trail(case_id=case)][-1] == "exported"
        assert desk.store.check_trail().broken_at is None


def test_going_to_another_view_with_unsaved_changes_asks_and_loses_nothing(desk: Desk) -> None:
    case = desk.cases["ball"]
    begin = desk.store.case(case).revision
    with desk.person("Carl") as carl:
        carl.open(desk, case)
        asked = carl.tab.get_by_text("This drawing has unsaved changes.")

        def leave(answer: str) -> None:
            carl.tab.get_by_role("link", name="Audit trail").click()
            asked.wait_for()
            assert "/review" in carl.tab.url
            carl.tab.get_by_role("button", name=answer, exact=True).click()
            asked.wait_for(state="detached")

        painted = carl.paint([20, 26, 12], [25, 26, 12])
        leave("Stay")
        assert carl.ask("changed()") == painted
        leave("Leave and keep them as a draft")
        carl.tab.get_by_role("button", name="Check").wait_for()
        assert desk.store.case(case).revision == begin

        def come_back() -> None:
            carl.tab.get_by_role("link", name="Review").click()
            carl.tab.get_by_role("button", name="Restore them").click()
            carl.until(f"changed() === {painted}")

        come_back()
        carl.tab.go_back()  # the browser's button cannot be asked about
        carl.tab.get_by_text("Your unsaved changes are kept as a draft in this browser.").wait_for()
        carl.tab.get_by_role("button", name="Check").wait_for()
        come_back()
        leave("Save and leave")
        carl.tab.get_by_role("button", name="Check").wait_for()
        version = desk.store.version(case, begin + 1)
        assert version.changed_voxels == painted
        carl.tab.get_by_role("link", name="Review").click()
        carl.until("drafts() === 'none'")
        carl.tab.get_by_role("link", name="Worklist").click()  # nothing to ask about
        carl.tab.get_by_text("Click a line to open it").wait_for()


def test_a_dicom_series_leaves_as_a_segmentation_object_on_its_images(desk: Desk) -> None:
    case = desk.cases["series"]
    with desk.person("Anna") as anna:
        anna.open(desk, case)
        anna.paint([20, 20, 11], [23, 20, 11])
        anna.tab.keyboard.press("Control+s")
        desk.wait_for(lambda: desk.store.case(case).revision == 2)
        anna.until("dirty() === false")
        anna.show_tab("Export")
        seg = hd.seg.segread(io.BytesIO(anna.export("Labels (DICOM SEG)")))
    stored = desk.mask(case, 2)
    lies = seg.get_volume(combine_segments=True, allow_missing_positions=True)
    found = np.zeros(SHAPE, np.uint8)
    to_index = np.linalg.inv(stored.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0]) @ lies.affine
    for index in np.argwhere(lies.array):
        found[tuple(np.rint(to_index[:3, :3] @ index + to_index[:3, 3]).astype(int))] = lies.array[tuple(index)]
    assert np.array_equal(found, np.asarray(stored.dataobj))


def test_scans_are_sent_to_the_data_folder_and_become_cases(desk: Desk, tmp_path: Path) -> None:
    image, _ = volume()
    files = [save_scan(tmp_path / f"Zyxwvut_{number}.nii.gz", image + number) for number in (1, 2)]
    write_series(tmp_path / "PID-8675309", image, SERIES, modality="CT")
    waiting = lambda: list((desk.folder / "data").glob(".upload-*"))  # noqa: E731
    with desk.person("Dora") as dora:
        dora.tab.get_by_text("Add scans").click()
        chosen = dora.tab.locator("input[type=file][multiple]:not([webkitdirectory])")
        dora.tab.route("**/upload/**", lambda _route: None)  # a slow network
        chosen.set_input_files(files)
        dora.tab.get_by_text("sending 1 of 2").wait_for()
        dora.tab.get_by_role("button", name="Cancel").click()
        dora.tab.get_by_text("cancelled").wait_for()
        dora.tab.unroute_all()
        chosen.set_input_files(files)
        dora.tab.get_by_text("2 files are there").wait_for()
        ((folder,), held) = waiting(), [file.read_bytes() for file in files]
        assert [file.read_bytes() for file in sorted(folder.iterdir())] == held
        dora.tab.get_by_role("textbox", name="Pseudonym").fill("new")
        dora.tab.get_by_role("button", name="Add", exact=True).click()
        desk.wait_for(lambda: {"new 1", "new 2"} <= {row.case.name for row in desk.store.worklist()})
        desk.wait_for(lambda: not waiting())

        dora.tab.get_by_role("radio", name="DICOM folder").or_(
            dora.tab.get_by_role("button", name="DICOM folder")
        ).first.click()
        dora.tab.get_by_text("A folder of one DICOM series.").wait_for()
        dora.tab.locator("input[webkitdirectory]").set_input_files(tmp_path / "PID-8675309")
        dora.tab.get_by_text(f"{SHAPE[2]} files are there").wait_for()
        dora.tab.get_by_role("textbox", name="Pseudonym").fill("second series")
        dora.tab.get_by_role("button", name="Add", exact=True).click()
        desk.wait_for(lambda: len(desk.store.worklist()) == len(desk.cases) + 3)
        added = desk.store.worklist()[-1].case
        assert (added.name, added.shape, added.modality) == ("second series", list(SHAPE), "CT")


def test_what_the_server_writes_down_names_nobody(desk: Desk) -> None:
    log = (desk.folder / "server.log").read_text()
    assert "Traceback" not in log
    assert not [word for word in ("Zyxwvut", "PID-8675309", "?t=", str(desk.folder / "scans")) if word in log]


def _filled(picture: np.ndarray) -> list[float]:
    """Share of each quadrant of a picture (rows, columns, 3) that is not black."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    quadrants = [picture[y : y + height, x : x + width] for y in (0, height) for x in (0, width)]
    return [float((quadrant.max(axis=2) > 20).mean()) for quadrant in quadrants]


def _share_of_hue(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Share of pixels that are tinted towards a colour, however strongly."""
    wanted = np.array(colour) - np.mean(colour)
    tint = picture - picture.mean(axis=2, keepdims=True)
    strength = np.linalg.norm(tint, axis=2)
    alike = (tint @ wanted) / (np.maximum(strength, 1e-9) * np.linalg.norm(wanted))
    return float(((strength > 25) & (alike > 0.9)).mean())
