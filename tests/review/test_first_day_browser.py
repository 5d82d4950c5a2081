"""What a new user does with the page: a shipped bundle on a shipped sample, corrected, signed and taken home."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import medseg
from tests.review.serving import CHROMIUM

pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
pytest.importorskip("streamlit", reason="the page needs the package streamlit")

from tests.review.test_browser import opened

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
SAMPLE = Path(__file__).parents[2] / "data" / "samples" / "hippocampus_003.nii.gz"


def test_a_model_runs_on_a_scan_and_its_result_is_corrected_signed_and_exported(tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    scan = Path(shutil.copy(SAMPLE, scans))
    with opened(tmp_path, scans, revisions=[0]) as desk:
        case = desk.cases["hippocampus_003"]
        with desk.person("Anna") as anna:
            anna.tab.get_by_role("link", name="Run").click()
            anna.tab.locator(".st-key-run button").click()
            anna.tab.locator("[class*=st-key-open_] button").click()  # there when the run has ended
            anna.tab.locator(".medseg-viewer[data-phase=ready]").wait_for()
            made = np.asarray(desk.mask(case, 1).dataobj)
            assert np.array_equal(made, medseg.infer(scan, bundle=desk.store.worklist()[0].model).label_map)

            middle = made.shape[2] // 2
            assert not made[:14, :10, middle].any()
            painted = anna.paint([6, 5, middle], [9, 5, middle])
            anna.tab.keyboard.press("Control+s")
            desk.wait_for(lambda: desk.store.case(case).revision == 2)
            anna.until("dirty() === false")
            anna.show_tab("Verdict")
            anna.tab.get_by_role("button", name="Sign as Anna").click()
            desk.wait_for(lambda: desk.store.case(case).state == "accepted")
            anna.show_tab("Export")
            taken = tmp_path / "taken.nii.gz"
            taken.write_bytes(anna.export("Labels (NIfTI)"))
            assert anna.export("Report (PDF)").startswith(b"%PDF")
        found = nib.load(taken)
        assert np.count_nonzero(np.asarray(found.dataobj) != made) == painted > 0
        assert np.array_equal(found.affine, nib.load(scan).affine)
        assert desk.store.reviews(case)[0].mask_sha256 == desk.store.version(case, 2).sha256
        assert desk.store.check_trail().broken_at is None
