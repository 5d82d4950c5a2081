"""What page and viewer tell each other, and the files that the component is made of."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

pytest.importorskip("streamlit", reason="the viewer is a component of Streamlit")

APP = Path(__file__).parents[2] / "app" / "streamlit"

PAGE = f"""
import sys
sys.path.insert(0, {str(APP)!r})
import json
import streamlit as st
from viewer import ViewerSpec, viewer
events = viewer(ViewerSpec.model_validate(st.session_state.spec), key="viewer")
st.json(events.model_dump_json(exclude_none=True))
"""


@pytest.fixture
def component(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(APP))
    sys.modules.pop("viewer", None)
    import viewer

    return viewer


def spec(labels: int = 1) -> dict[str, object]:
    table = [{"value": i, "name": f"structure number {i}", "rgb": [i, 0, 255]} for i in range(1, labels + 1)]
    return {"case_id": "c", "image": {"url": "/v", "name": "image.nii.gz"}, "labels": table}


def test_a_spec_with_all_organs_stays_small(component: ModuleType) -> None:
    lesions = [{"id": i, "label": 1, "vox": [100, 200, 300]} for i in range(500)]
    made = component.ViewerSpec.model_validate({**spec(117), "lesions": lesions})
    assert len(made.model_dump_json()) < 50_000


@pytest.mark.parametrize(
    "change",
    [
        {"image": {"url": "/v", "name": "image.png"}},
        {"labels": [{"value": 0, "name": "background", "rgb": [0, 0, 0]}]},
        {"labels": [{"value": 1, "name": "liver", "rgb": [0, 0, 256]}]},
        {"opacity": 50},
        {"colour": "red"},
    ],
)
def test_a_wrong_spec_is_refused(component: ModuleType, change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        component.ViewerSpec.model_validate({**spec(), **change})


def test_events_that_do_not_fit_are_left_out(component: ModuleType) -> None:
    saved = {"case_id": "c", "revision": 3, "changed_voxels": 7, "sha256": "ab", "more": 1}
    events = component.read_events({"saved": saved, "dirty": [], "window": [40, "wide"], "tool": None, "other": 1})
    assert events == component.ViewerEvents(
        saved=component.Saved(case_id="c", revision=3, changed_voxels=7, sha256="ab")
    )


def test_the_built_scripts_are_those_of_the_manifest(component: ModuleType) -> None:
    manifest = json.loads((component.STATIC / "manifest.json").read_text())
    names = {path.name for path in component.STATIC.iterdir()} - {"manifest.json"}
    assert component.static_files() == set(manifest["files"]) == names
    assert manifest["entry"] in names
    assert all(re.fullmatch(r"(viewer|part)\.[A-Z0-9]{8}\.js", name) for name in names)
    imported = re.compile(r"""(?:from|import|import\()["']\./([\w.]+)["']""")
    for name in names:
        assert set(imported.findall((component.STATIC / name).read_text(encoding="utf-8"))) <= names
    assert component.bundle_url() == f"/medseg/static/{manifest['entry']}"
    assert component.bundle_url("/behind/proxy/") == f"/behind/proxy/medseg/static/{manifest['entry']}"


def test_the_licences_of_what_is_inside_are_there(component: ModuleType) -> None:
    text = (component.STATIC.parent / "THIRD_PARTY.txt").read_text(encoding="utf-8")
    for package in ("@niivue/niivue", "gl-matrix", "fflate", "nifti-reader-js"):
        assert f"\n{package} " in text
    assert "Redistributions in binary form must reproduce" in text


def test_the_page_gets_events_once() -> None:
    from streamlit.testing.v1 import AppTest

    page = AppTest.from_string(PAGE, default_timeout=60)
    page.session_state["spec"] = spec()
    page.run()
    assert not page.exception
    (shown,) = page.get("bidi_component")
    sent = json.loads(shown.proto.json)
    assert sent["case_id"] == "c"
    assert sent["bundle"].startswith("/medseg/static/viewer.")
    page.session_state["viewer"] = {"dirty": True, "saved": {"case_id": "c"}}
    page.run()
    assert json.loads(page.json[0].value) == {"dirty": True}  # `saved` lacks its fields
