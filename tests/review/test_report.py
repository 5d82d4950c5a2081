"""Reports: right numbers, who signed what, and no letter that becomes markup."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medseg.errors import UsageError
from medseg.review.report import case_report
from medseg.review.saving import save_labels, save_screenshot
from medseg.review.store.repo import BANNER, Store
from medseg.review.worklist import add_result, import_folder
from tests.builders import blob_scan, save_scan


def test_all_four_forms_tell_version_verdict_and_measurements(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    save_scan(tmp_path / "scans" / "<b>scan.nii.gz", blob_scan(), np.diag([1.0, 2.0, 3.0, 1.0]))
    store = Store.in_folder(tmp_path / "data")
    anna = store.sign_in("local:anna", "Anna <i>")
    (case,) = import_folder(store, tmp_path / "scans", by=anna).added
    with pytest.raises(UsageError, match="no segmentation yet"):
        case_report(store, case)
    labels = np.zeros(blob_scan().shape, np.uint8)
    labels[2:6, 3, 4] = 1
    add_result(store, case, labels, names={1: "=tumour"}, model="organs", version="1.2", by=anna)
    corrected = labels.copy()
    corrected[20, 20, 20] = 1
    save_labels(store, case, corrected, base_revision=1, by=anna)
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), (0, 200, 0)).save(picture, format="PNG")
    save_screenshot(store, case, picture.getvalue(), by=anna)
    comment = "</td><script>alert(1)</script>"
    store.add_review(case, 2, "rejected", comment=comment, by=anna)
    report = case_report(store, case)

    found = json.loads(report.to_json())
    assert (found["disclaimer"], found["revision"], found["verdict"]) == (BANNER, 2, "rejected")
    assert (found["model"], found["model_version"], found["reviewer"]) == ("organs", "1.2", "Anna <i>")
    assert found["structures"][0]["mean"] == pytest.approx(float(blob_scan()[corrected > 0].mean()), rel=1e-5)
    assert found["mask_sha256"] == store.version(case, 2).sha256
    assert found["structures"][0]["volume_ml"] == pytest.approx(5 * 6 / 1000)
    assert [lesion["voxels"] for lesion in found["lesions"]] == [4, 1]
    assert found["compared_with_prediction"][0]["dice"] == pytest.approx(8 / 9)
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["kind"] for row in rows] == ["structure", "lesion", "lesion"]
    assert {row["name"] for row in rows} == {"'=tumour"}
    assert all(row["disclaimer"] == BANNER and row["case_id"] == case for row in rows)
    page = report.to_html()
    assert "<script>" not in page
    assert "<i>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page
    assert BANNER in page
    assert page.count("data:image/png;base64,iVBOR") == 2  # three planes, and the picture that was taken
    assert "data:image/png;base64,iVBOR" in page
    assert "http" not in page
    pdf = report.to_pdf()
    assert pdf.startswith(b"%PDF")
    assert b"/Subtype /Image" in pdf
    store.close()
