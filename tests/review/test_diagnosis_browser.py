"""A diagnosis in a real Chromium: classes, a finding that moves the crosshair, the evidence over the lesion, phases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.review.store.models import Prediction
from medseg.review.store.repo import Store
from tests.review.serving import CHROMIUM, FLAGS, free_port, serving, wait_for

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
pytest.importorskip("streamlit", reason="the page needs the package streamlit")

from tests.review.test_browser import Page  # noqa: E402 - after the packages that it needs
from tests.review.test_diagnosis_pages import BUNDLE, TRUTH, Desk  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
SIZES = ((1366, 768), (1920, 1080))


@dataclass
class Shown:
    """A server over a store that holds one diagnosis, and a browser."""

    store: Store
    made: Prediction
    address: str
    browser: Any


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("diagnosis")
    desk = Desk(folder)
    phases = {"CT A": desk.cases["p_arterial"], "CT V": desk.cases["p_venous"]}
    asked = {"uncertainty": True, "evidence": True, "phases": phases, "sex": "M", "device": "cpu"}
    job = desk.services.queue.submit(phases["CT A"], BUNDLE, by=desk.anna, **asked)
    desk.services.queue.start()
    wait_for(lambda: desk.store.job(job.id).state not in {"queued", "running"}, "the run did not end")
    desk.services.stop()
    port = free_port()
    arguments = ("review", "--data", str(folder / "data"), "--port", str(port))
    test = {"MEDSEG_REVIEW_TEST": "1"}
    with serving(folder / "server.log", *arguments, port=port, ready="/medseg/healthz", environment=test):
        store = Store.in_folder(folder / "data")
        made = store.prediction(str(store.job(job.id).prediction_id))
        with playwright.sync_playwright() as tools:
            browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            yield Shown(store, made, f"http://127.0.0.1:{port}", browser)
            browser.close()
        store.close()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_evidence_lies_over_the_lesion_that_a_finding_leads_to(
    shown: Shown, width: int, height: int, tmp_path: Path
) -> None:
    diagnosis = shown.made.record["diagnosis"]
    peak = diagnosis["findings"][0]["peak_voxel"]
    context = shown.browser.new_context(viewport={"width": width, "height": height})
    tab = context.new_page()
    try:
        page = Page(tab, shown.address, "Anna")
        page.open(shown, shown.made.case_id)
        page.show_tab("Lesions")
        tab.get_by_text("is the most probable class").wait_for()
        tab.get_by_text("Trained on synthetic data, not for clinical use").wait_for()
        table = tab.locator(".st-key-panel_column [data-testid=stDataFrame]").first
        places = [tab.locator("[data-testid=stHtml]").get_by_text(name) for name in diagnosis["classes"].values()]
        assert all(_inside(place, width) for place in (*places, table))
        panel = tab.locator(".st-key-panel_column")  # it scrolls by itself, and the viewer beside it stays
        assert _bottom(panel) < height
        tab.get_by_text("A click moves the crosshair").scroll_into_view_if_needed()
        assert _bottom(tab.get_by_text("A click moves the crosshair")) < height
        assert tab.locator(".medseg-viewer").bounding_box()["y"] > 0
        table.scroll_into_view_if_needed()
        box = table.bounding_box()
        tab.mouse.click(box["x"] + 70, box["y"] + 52)
        page.until(f"vox().join() === '{','.join(map(str, peak))}'")

        # The map is yellow where it is high; far away it is not shown at all.
        page.until("overlays() === 2")
        far = [1, 1, peak[2]]
        plain = [_colour(page, voxel) for voxel in (peak, far)]
        tab.get_by_text(f"Evidence: {diagnosis['named']}").click()
        wait_for(lambda: _yellow(_colour(page, peak)) > _yellow(plain[0]) + 40, "the evidence is not shown")
        assert abs(_yellow(_colour(page, far)) - _yellow(plain[1])) < 5
        tab.screenshot(path=tmp_path / f"evidence_{width}.png")

        # Another phase: the same place, other grey values.
        assert page.ask(f"value({peak})") == TRUTH.phases[1][tuple(peak)]
        before = page.ask("vox()")
        tab.get_by_role("radio", name="CT V").or_(tab.get_by_role("button", name="CT V")).click()
        page.until(f"value({peak}) !== {TRUTH.phases[1][tuple(peak)]}")
        assert page.ask("vox()") == before
        assert not page.ask("dirty()")
    except BaseException:
        tab.screenshot(path=tmp_path / "failed.png")
        raise
    finally:
        context.close()


def _inside(place: Any, width: int) -> bool:
    """Whether something is drawn whole between the window's left and right edge."""
    box = place.first.bounding_box()
    return box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width


def _bottom(place: Any) -> float:
    box = place.bounding_box()
    return float(box["y"] + box["height"])


def _colour(page: Page, voxel: list[int]) -> np.ndarray:
    """Mean colour around a voxel of the axial plane, a few pixels off the crosshair."""
    x, y = page.ask(f"point('axial', {voxel})")
    stage = page.tab.locator(".stage").bounding_box()
    left, top = round(x - stage["x"]), round(y - stage["y"])
    patch = page.picture()[max(top - 12, 0) : top + 12, max(left - 12, 0) : left + 12]
    return np.asarray(patch.reshape(-1, 3).mean(axis=0))


def _yellow(colour: np.ndarray) -> float:
    return float(min(colour[0], colour[1]) - colour[2])
