"""The viewer in a real Chromium: what is on the screen, what the mouse paints, and what reaches the server."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
pytest.importorskip("streamlit", reason="the browser tests need the package streamlit")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-accelerated-2d-canvas",
]
SITE = Path(__file__).parent / "viewer_site"
TIMEOUT_MS = 60_000

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

SHAPE = (24, 30, 16)  # patient's axes: x, y, z
BALL, CUBE = 1, 2
AXES = {"RAS": (1, 2, 3), "LPS": (-1, -2, 3), "PIR": (-2, -3, 1), "ASL": (2, 3, -1), "tilted": (1, 2, 3)}
"""For each axis of the file the patient's axis it runs along, negative for against it."""


def patient() -> tuple[np.ndarray, np.ndarray]:
    """A scan in HU and its labels, both (x, y, z) in RAS order: a ball of 100 HU in a body of 0 HU, a labelled cube."""
    x, y, z = np.indices(SHAPE)
    image = np.where((x - 11.5) ** 2 / 110 + (y - 14.5) ** 2 / 180 + (z - 7.5) ** 2 / 50 < 1, 0, -1000)
    ball = (x - 7) ** 2 + (y - 14) ** 2 + (z - 8) ** 2 <= 9
    labels = np.zeros(SHAPE, np.uint8)
    labels[15:18, 12:15, 7:10] = CUBE
    return np.where(ball, 100, image).astype(np.int16), labels


def on_grid(array: np.ndarray, axes: tuple[int, int, int]) -> np.ndarray:
    """The array (x, y, z) in a file's order of axes."""
    turned = array.transpose([abs(axis) - 1 for axis in axes])
    return np.flip(turned, [i for i, axis in enumerate(axes) if axis < 0])


def to_file(voxel: tuple[int, int, int], axes: tuple[int, int, int]) -> tuple[int, ...]:
    """Index in the file's order of a voxel (x, y, z)."""
    return tuple(voxel[abs(a) - 1] if a > 0 else SHAPE[-a - 1] - 1 - voxel[-a - 1] for a in axes)


def affine_of(name: str) -> np.ndarray:
    """An affine of 2 mm voxels (3 mm along z), tilted by 17 degrees for one of them."""
    spacing, affine = np.array([2.0, 2.0, 3.0]), np.eye(4)
    for column, axis in enumerate(AXES[name]):
        step = spacing[abs(axis) - 1]
        affine[abs(axis) - 1, column] = np.sign(axis) * step
        affine[abs(axis) - 1, 3] -= 0 if axis > 0 else -step * (SHAPE[abs(axis) - 1] - 1)
    if name == "tilted":
        angle = np.deg2rad(17)
        turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
        affine[:3] = turn @ affine[:3]
    return affine


def spec_of(case: str, axes: str, **changes: Any) -> dict[str, Any]:
    mask = {"url": f"/files/{axes}_mask.nii.gz", "name": "mask.nii.gz", "revision": 1, "title": "version 1"}
    return {
        "case_id": case,
        "image": {"url": f"/files/{axes}.nii.gz", "name": "image.nii.gz"},
        "mask": mask,
        "labels": [
            {"value": BALL, "name": "ball", "rgb": [230, 60, 60]},
            {"value": CUBE, "name": "<b>cube</b>", "rgb": [60, 220, 90]},
        ],
        "save": {"url": f"/save/{case}", "token": "secret", "owner": "anna"},
        "layout": "mpr",
        "test": True,
        **changes,
    }


class Site:
    """A server with the viewer, a browser, and one tab that goes from case to case."""

    def __init__(self, folder: Path, port: int, browser: Any) -> None:
        self.folder = folder
        self.spec: dict[str, Any] = {}
        (folder / "spec.json").write_text(json.dumps(spec_of("first", "RAS")))
        self.tab = browser.new_page(viewport={"width": 1000, "height": 640})
        self.tab.set_default_timeout(TIMEOUT_MS)
        self.tab.on("dialog", lambda dialog: dialog.accept())
        self.tab.goto(f"http://127.0.0.1:{port}/")
        self.ready("first")

    def open(self, case: str, axes: str = "RAS", **changes: Any) -> None:
        """Show another case, and wait until all of its voxels are there."""
        self.run(case, axes, **changes)
        self.ready(case)

    def run(self, case: str, axes: str = "RAS", **changes: Any) -> None:
        """The page runs again with a spec."""
        self.spec = spec_of(case, axes, **changes)
        (self.folder / "spec.json").write_text(json.dumps(self.spec))
        self.tab.get_by_role("button", name="Run again").click()

    def ready(self, case: str, phase: str = "ready") -> None:
        self.tab.locator(f".medseg-viewer[data-case={case}][data-phase={phase}]").wait_for()

    def ask(self, expression: str) -> Any:
        return self.tab.evaluate(f"window.__medseg_test.{expression}")

    def until(self, expression: str) -> None:
        self.tab.wait_for_function(f"window.__medseg_test.{expression}")

    def drag(self, plane: str, start: tuple[int, ...], end: tuple[int, ...], button: str = "left") -> None:
        """Move the mouse with a button down between two voxels in the file's order."""
        for place, act in ((start, self.tab.mouse.down), (end, self.tab.mouse.up)):
            self.tab.mouse.move(*self.ask(f"point('{plane}', {list(place)})"), steps=2)
            act(button=button)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]

    def eventually(self, fits: Callable[[], bool]) -> None:
        """Wait until a condition holds: what is drawn comes with one of the next frames."""
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while not fits():
            assert time.monotonic() < deadline, "it never came to be"
            self.tab.wait_for_timeout(50)

    def told(self, name: str, fits: Callable[[Any], bool] = bool) -> Any:
        """What the page has heard last under a name, once it fits."""
        found: list[Any] = []

        def heard() -> bool:
            found[:] = [event[name] for event in self.events() if name in event and fits(event[name])]
            return bool(found)

        self.eventually(heard)
        return found[-1]

    def saved(self, case: str, number: int = 1) -> tuple[np.ndarray, dict[str, str]]:
        """The mask as the server got it, on the file's grid, and the request's headers."""
        self.told("saved", lambda saved: saved["case_id"] == case)
        body = gzip.decompress((self.folder / f"saved_{case}_{number}.gz").read_bytes())
        headers = json.loads((self.folder / f"saved_{case}_{number}.json").read_text())
        shape = nib.load(self.folder / Path(self.spec["image"]["url"]).name).shape
        return np.frombuffer(body, np.uint8).reshape(shape, order="F"), headers

    def picture(self, locator: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.tab.locator(locator).screenshot())).convert("RGB"), np.int16)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("viewer_site")
    image, labels = patient()
    for name, axes in AXES.items():
        nib.save(nib.Nifti1Image(on_grid(image, axes), affine_of(name)), folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(on_grid(labels, axes), affine_of(name)), folder / f"{name}_mask.nii.gz")
    moved = np.roll(labels, 2, axis=0)
    nib.save(nib.Nifti1Image(moved, affine_of("RAS")), folder / "moved_mask.nii.gz")
    nib.save(nib.Nifti1Image((labels > 0).astype(np.float32), affine_of("RAS")), folder / "map.nii.gz")
    half = image.reshape(12, 2, 15, 2, 8, 2).mean(axis=(1, 3, 5)).astype(np.int16)
    coarse = affine_of("RAS") @ np.array([[2, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 2, 0.5], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(half, coarse), folder / "half.nii.gz")
    (folder / "events.jsonl").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "VIEWER_SITE": str(folder), "OMP_NUM_THREADS": "1"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, str(SITE / "serve.py"), str(port)], env=environment, stdout=log, stderr=log
        )
    try:
        _wait_for(server, port, folder / "server.log")
        with playwright.sync_playwright() as tools:
            browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            yield Site(folder, port, browser)
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"the server did not start: {log.read_text()}")


@pytest.mark.parametrize("name", AXES)
def test_a_stroke_changes_the_same_voxels_in_the_saved_file(site: Site, name: str) -> None:
    axes = AXES[name]
    site.open(f"stroke_{name}", name)
    start, end = to_file((5, 20, 8), axes), to_file((12, 20, 8), axes)
    assert not site.ask("dirty()")
    site.ask(f"goto({list(start)})")
    assert site.ask("vox()") == list(start)
    site.tab.keyboard.press("b")
    site.drag("axial", start, end)
    site.until("dirty()")
    changed = site.ask("changed()")
    site.tab.keyboard.press("Control+s")
    mask, headers = site.saved(f"stroke_{name}")
    before = np.asarray(nib.load(site.folder / f"{name}_mask.nii.gz").dataobj)
    differs = np.argwhere(mask != before)
    assert len(differs) == changed > 5 * 7
    assert set(mask[mask != before]) == {BALL}
    in_patient = on_grid(np.arange(np.prod(SHAPE)).reshape(SHAPE), axes)[tuple(differs.T)]
    x, y, z = np.unravel_index(in_patient, SHAPE)
    assert (z == 8).all()  # one axial slice
    assert {(y.min(), y.max()), (x.min(), x.max())} == {(18, 22), (3, 14)}  # 5 across, 2 beyond each end
    assert headers["if-match"] == '"1"'
    assert headers["x-medseg-token"] == "secret"
    site.until("dirty() === false")


def test_each_quadrant_shows_something_and_structures_have_their_colours(site: Site) -> None:
    site.open("looks", layout="mpr+3d")
    site.tab.locator(".three canvas").wait_for()
    site.ask(f"goto({[16, 13, 8]})")

    def quadrants() -> list[np.ndarray]:
        picture = site.picture(".stage")
        height, width = picture.shape[0] // 2, picture.shape[1] // 2
        return [picture[y : y + height, x : x + width] for y in (0, height) for x in (0, width)]

    def green() -> float:  # of the cube in the axial plane
        red, green, blue = np.moveaxis(quadrants()[0], 2, 0)
        return float(((green > red + 40) & (green > blue + 40)).mean())

    site.eventually(lambda: all((quadrant.max(axis=2) > 20).mean() > 0.05 for quadrant in quadrants()))
    site.eventually(lambda: green() > 0.002)
    site.tab.keyboard.press("o")
    site.eventually(lambda: green() == 0)


def test_names_are_text_and_the_sheet_explains_the_keys(site: Site) -> None:
    site.open("names")
    site.tab.get_by_label("Structures: colours, visibility").click()
    assert site.tab.get_by_role("button", name="<b>cube</b>", exact=True).inner_text() == "<b>cube</b>"
    site.tab.keyboard.press("?")
    sheet = site.tab.get_by_role("dialog", name="Keyboard and mouse")
    assert "fill between painted slices" in sheet.inner_text()
    site.tab.keyboard.press("Escape")
    sheet.wait_for(state="detached")


def test_undo_redo_and_tools(site: Site) -> None:
    site.open("tools")
    press = site.tab.keyboard.press
    press("b")
    site.drag("axial", (5, 20, 8), (9, 20, 8))
    painted = site.ask("changed()")
    assert painted > 0
    press("Control+z")
    assert site.ask("changed()") == 0
    assert not site.ask("dirty()")
    press("Control+Shift+Z")
    assert site.ask("changed()") == painted
    press("Control+z")

    # The ball of 100 HU in a body of 0 HU is one region.
    press("g")
    site.ask("goto([7, 14, 8])")
    site.tab.get_by_label("Brush and region growing reach into neighbouring slices").check()
    site.drag("axial", (7, 14, 8), (7, 14, 8))
    image, labels = patient()
    assert site.ask(f"count({BALL})") == (image == 100).sum()
    press("Control+z")
    site.tab.get_by_label("Brush and region growing reach into neighbouring slices").uncheck()
    site.drag("axial", (7, 14, 8), (7, 14, 8))
    assert site.ask(f"count({BALL})") == (image[:, :, 8] == 100).sum()
    press("Control+z")

    # An outline around 7 x 5 voxels.
    press("f")
    mouse = site.tab.mouse
    for number, corner in enumerate([(4, 18, 8), (10, 18, 8), (10, 22, 8), (4, 22, 8), (4, 18, 8)]):
        mouse.move(*site.ask(f"point('axial', {list(corner)})"), steps=3)
        if number == 0:
            mouse.down()
    mouse.up()
    assert site.ask(f"count({BALL})") == 7 * 5
    press("Control+z")

    # Only values of the ball, with a brush that reaches beyond it.
    press("b")
    site.tab.get_by_label("Paint only where the value of the scan lies in this range").check()
    for field, value in (("Lowest value to paint", "90"), ("Highest value to paint", "110")):
        site.tab.get_by_label(field).fill(value)
        site.tab.get_by_label(field).press("Enter")
    site.drag("axial", (3, 14, 8), (14, 14, 8))
    assert 0 < site.ask(f"count({BALL})") <= (image[:, :, 8] == 100).sum()
    assert site.ask("label([12, 14, 8])") == 0
    press("Control+z")
    site.tab.get_by_label("Paint only where the value of the scan lies in this range").uncheck()

    # Over the background only: the cube stays.
    site.tab.get_by_label("Paint over").select_option("background")
    site.drag("axial", (12, 13, 8), (20, 13, 8))
    assert site.ask(f"count({CUBE})") == (labels == CUBE).sum()
    assert site.ask(f"count({BALL})") > 0
    press("Control+z")

    # The eraser takes the cube's slice away.
    site.tab.get_by_label("Paint over").select_option("all")
    press("e")
    site.drag("axial", (16, 13, 8), (16, 13, 8))
    assert site.ask(f"count({CUBE})") == (labels == CUBE).sum() - 9
    press("Control+z")
    assert site.ask("changed()") == 0

    # The same disc on slices 6 and 10: those between are filled with it.
    press("b")
    for level in (6, 10):
        site.ask(f"goto([7, 20, {level}])")
        site.drag("axial", (7, 20, level), (7, 20, level))
    disc = site.ask(f"count({BALL})") // 2
    press("i")
    assert site.ask(f"count({BALL})") == 5 * disc
    assert [site.ask(f"label([7, 20, {level}])") for level in range(5, 12)] == [0, 1, 1, 1, 1, 1, 0]


def test_window_slices_zoom_and_goto(site: Site) -> None:
    lesions = [{"id": 7, "label": CUBE, "vox": list(to_file((16, 13, 8), AXES["PIR"]))}]
    site.open("looking", "PIR", lesions=lesions)
    site.tab.keyboard.press("4")
    site.until("window()[1] === 2500")
    assert site.ask("window()") == [480, 2500]
    assert site.told("window", lambda window: window[1] == 2500) == [480, 2500]
    wide = site.picture(".stage")
    site.tab.keyboard.press("5")
    site.eventually(lambda: bool(np.abs(site.picture(".stage") - wide).max() > 50))
    site.drag("axial", to_file((5, 5, 8), AXES["PIR"]), to_file((15, 5, 8), AXES["PIR"]), button="right")
    assert site.ask("window()[1]") != 80

    cmd = {"id": 3, "type": "goto", "vox": list(to_file((4, 25, 3), AXES["PIR"]))}
    site.run("looking", "PIR", cmd=cmd, lesions=lesions)
    site.until(f"vox().join() === '{','.join(map(str, cmd['vox']))}'")
    site.tab.mouse.move(*site.ask(f"point('axial', {cmd['vox']})"))
    site.tab.mouse.wheel(0, 100)
    site.until(f"vox().join() === '{','.join(map(str, to_file((4, 25, 2), AXES['PIR'])))}'")
    site.run("looking", "PIR", cmd=cmd, lesions=lesions, opacity=0.9)  # the same command again: done once
    site.tab.keyboard.press("k")
    site.until(f"vox().join() === '{','.join(map(str, to_file((16, 13, 8), AXES['PIR'])))}'")
    assert site.told("lesion") == 7
    site.eventually(lambda: "<b>cube</b>" in site.tab.locator(".readout").inner_text())


def test_mm_of_a_tilted_scan_are_those_of_nibabel(site: Site) -> None:
    site.open("mm", "tilted")
    site.ask("goto([4, 25, 3])")
    x, y, z = affine_of("tilted")[:3] @ [4, 25, 3, 1]
    site.eventually(lambda: f"mm {x:.1f}, {y:.1f}, {z:.1f} (RAS)" in site.tab.locator(".readout").inner_text())


def test_of_two_who_save_the_second_keeps_the_drawing_and_may_save_it_on_top(site: Site) -> None:
    site.open("twice")
    theirs = {"yours": 1, "theirs": 2, "by": "Ben <i>", "at": "2026-01-01T10:00:00Z", "draft_id": "d1"}
    (site.folder / "conflict_twice.json").write_text(json.dumps(theirs))
    site.tab.keyboard.press("b")
    site.drag("axial", (5, 20, 8), (9, 20, 8))
    changed = site.ask("changed()")
    site.tab.keyboard.press("Control+s")
    assert site.told("conflict") == {"case_id": "twice", **theirs}
    assert "Ben <i> has saved version 2" in site.tab.locator(".notice").inner_text()
    assert site.ask("dirty()")
    assert site.ask("changed()") == changed
    site.tab.get_by_role("button", name="Save mine as version 3").click()
    mask, headers = site.saved("twice", number=2)
    assert headers["if-match"] == '"2"'
    assert headers["x-medseg-draft"] == "d1"
    assert (mask == BALL).sum() == changed
    site.until("base() === 3")


def test_a_draft_survives_a_reload(site: Site) -> None:
    site.open("draft")
    site.tab.keyboard.press("b")
    site.drag("axial", (5, 20, 8), (9, 20, 8))
    changed = site.ask("changed()")
    site.ask("draft()")
    site.tab.reload()
    site.ready("draft")
    assert site.ask("changed()") == 0
    site.tab.get_by_role("button", name="Restore them").click()
    site.until(f"changed() === {changed}")
    assert site.ask("dirty()")
    site.tab.keyboard.press("Control+s")
    mask, _ = site.saved("draft")
    assert (mask == BALL).sum() == changed
    site.run("elsewhere")
    site.ready("elsewhere")
    site.open("draft")
    site.until("drafts() === 'none'")
    assert site.tab.get_by_role("button", name="Restore them").count() == 0


def test_another_case_and_another_version(site: Site) -> None:
    site.open("switch")
    site.tab.keyboard.press("b")
    site.drag("axial", (5, 20, 8), (9, 20, 8))
    # The page shows version 2: unsaved changes are not lost without a question.
    moved = {"url": "/files/moved_mask.nii.gz", "name": "m.nii.gz", "revision": 2, "title": "version 2"}
    site.run("switch", mask=moved)
    site.tab.get_by_role("button", name="Show version 2 and keep mine as a draft").click()
    site.until("label([19, 13, 8]) === 2")
    assert site.ask(f"count({BALL})") == 0
    assert site.ask("base()") == 2
    site.open("other", "LPS")
    assert site.ask(f"label({list(to_file((16, 13, 8), AXES['LPS']))})") == CUBE
    assert site.ask("vox()") == list(to_file((12, 15, 8), AXES["LPS"]))


def test_compare_difference_and_maps(site: Site) -> None:
    first = {"url": "/files/RAS_mask.nii.gz", "name": "m.nii.gz", "revision": 1, "title": "mine"}
    second = {"url": "/files/moved_mask.nii.gz", "name": "m.nii.gz", "revision": 2, "title": "theirs"}
    overlay = {"id": "u", "url": "/files/map.nii.gz", "name": "u.nii.gz", "kind": "uncertainty", "title": "Uncertainty"}
    site.open("compare", layout="compare", compare={"first": first, "second": second}, overlays=[overlay], save=None)
    site.until("overlays() === 1")
    site.ask("goto([16, 13, 8])")
    site.tab.get_by_role("button", name="Difference").click()
    site.tab.locator(".legend").wait_for()
    readout = site.tab.locator(".readout")
    site.eventually(lambda: "<b>cube</b> | –" in readout.inner_text())  # the second's cube is two voxels away
    assert "Uncertainty: 1" in readout.inner_text()

    def blue() -> list[int]:  # "right only", which both sides show
        halves = np.array_split(site.picture(".stage"), 2, axis=1)
        return [int(((half[..., 2] > half[..., 0] + 40) & (half[..., 0] < 160)).sum()) for half in halves]

    site.eventually(lambda: min(blue()) > 50)
    assert site.tab.get_by_label("Brush (B)").is_disabled()


def test_the_reduced_copy_is_shown_until_the_full_scan_is_there(site: Site) -> None:
    image = {"url": "/files/slow_RAS.nii.gz", "name": "i.nii.gz", "preview_url": "/files/half.nii.gz"}
    site.run("large", image=image)
    site.ready("large", "preview")
    site.eventually(lambda: "drawing starts then" in site.tab.locator(".status").inner_text())
    assert site.tab.get_by_label("Brush (B)").is_disabled()
    site.eventually(lambda: bool((site.picture(".stage").max(axis=2) > 20).mean() > 0.05))
    assert abs(site.ask("value([7, 14, 8])") - 100) < 60
    (site.folder / "go").touch()
    site.ready("large")
    assert site.ask("value([7, 14, 8])") == 100
    site.eventually(lambda: bool(site.tab.get_by_label("Brush (B)").is_enabled()))


def test_a_scan_that_cannot_be_read_is_said_so(site: Site) -> None:
    (site.folder / "broken.nii.gz").write_bytes(gzip.compress(b"x" * 400))
    site.run("broken", image={"url": "/files/broken.nii.gz", "name": "broken.nii.gz"})
    site.ready("broken", "error")
    assert "The case cannot be shown: not a NIfTI file" in site.tab.locator(".poster").inner_text()
    assert site.told("failed", lambda failed: failed["case_id"] == "broken")["code"] == "image"
