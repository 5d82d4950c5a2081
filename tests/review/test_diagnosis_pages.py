"""A patient in three files on the pages: phases, age and sex are asked for, the diagnosis stands beside the viewer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from streamlit.testing.v1 import AppTest

from medseg.batch.run import run_batch
from medseg.batch.worker import Settings as Asked
from medseg.errors import InputError, UsageError
from medseg.phantom.pancreas import make_case
from medseg.review import server
from medseg.review.api import Api
from medseg.review.compare import REFERENCE, segmentation
from medseg.review.exports import export_case
from medseg.review.runnable import holds_phases
from medseg.review.saving import save_labels
from medseg.review.settings import Settings
from medseg.review.signing import Claim
from medseg.review.store.models import Prediction
from medseg.review.structures import measurements
from medseg.review.worklist import import_batch, import_folder
from tests.builders import save_scan
from tests.review.serving import wait_for

BUNDLE = "mdpformer_pancreas"
TRUTH = make_case(5, 6)


class Desk:
    """A data folder with one patient's phases as a case each, the venous one with slices twice as thick."""

    def __init__(self, folder: Path) -> None:
        scans = folder / "scans"
        scans.mkdir()
        affine = TRUTH.grid.affine
        save_scan(scans / "p_plain.nii.gz", TRUTH.phases[0], affine)
        save_scan(scans / "p_arterial.nii.gz", TRUTH.phases[1], affine)
        save_scan(scans / "p_arterial_label.nii.gz", TRUTH.labels, affine)
        save_scan(scans / "p_venous.nii.gz", TRUTH.phases[2][:, :, ::2], affine @ np.diag([1, 1, 2, 1]))
        self.services = server.Services.open(Settings(folder / "data"))
        server.share(self.services)
        self.store = self.services.store
        self.anna = self.store.sign_in("local:anna", "Anna")
        import_folder(self.store, scans, by=self.anna)
        self.cases = {row.case.name: row.case.id for row in self.store.worklist()}

    def page(self, view: str, case: str, **state: Any) -> AppTest:
        """A view of the page with one case open."""
        found = AppTest.from_file(str(server.app_folder() / "page.py"), default_timeout=120)
        found.session_state["user_id"] = self.anna.id
        found.session_state["case_id"] = self.cases[case]
        for name, value in state.items():
            found.session_state[name] = value
        found.run()
        found._page_hash = found.session_state["pages"][view]._script_hash
        found.run()
        assert not found.exception
        return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    found = Desk(tmp_path_factory.mktemp("patient"))
    yield found
    found.store.close()


@pytest.fixture(scope="module")
def made(desk: Desk) -> Prediction:
    """The patient's diagnosis, asked for on the page and computed by the queue."""
    page = desk.page("run", "p_venous")
    page.selectbox[1].set_value(BUNDLE).run()
    venous = desk.cases["p_venous"]

    def phase(name: str) -> Any:
        return page.selectbox(key=f"phase_{venous}_CT {name}")

    assert [phase(name).value for name in ("NC", "A", "V")] == ["", "", venous]  # the case's name tells the phase
    assert "kept with `p_venous`" in told(page)
    phase("V").set_value("").run()
    assert page.button(key="run").disabled
    assert "Choose a case for one phase at least" in told(page)
    phase("A").set_value(desk.cases["p_arterial"])
    phase("V").set_value(desk.cases["p_arterial"]).run()
    assert "One case stands for two phases" in told(page)
    assert page.button(key="run").disabled
    phase("V").set_value(venous).run()
    assert "CT A is the reference: the result is kept with `p_arterial`" in told(page)
    page.number_input(key=f"age_{venous}").set_value(float(TRUTH.patient.age))
    page.selectbox(key=f"sex_{venous}").set_value("M" if TRUTH.patient.sex == "male" else "F")
    page.checkbox(key=f"align_{venous}").check()
    page.button(key="run").click().run()
    assert not page.exception
    (job,) = desk.store.jobs()
    assert job.case_id == desk.cases["p_arterial"]
    assert job.options["phases"] == {"CT A": desk.cases["p_arterial"], "CT V": venous}
    assert job.options["patient"] == {"age": TRUTH.patient.age, "sex": "M" if TRUTH.patient.sex == "male" else "F"}
    desk.services.queue.start()
    wait_for(lambda: desk.store.job(job.id).state not in {"queued", "running"}, "the run did not end")
    desk.services.queue.stop()
    ended = desk.store.job(job.id)
    assert (ended.state, ended.message) == ("done", "")
    assert "patient" not in ended.options
    return desk.store.prediction(str(ended.prediction_id))


def told(page: AppTest) -> str:
    kinds = ("markdown", "caption", "error", "info", "warning")
    return "\n".join(str(element.value) for kind in kinds for element in page.get(kind))


def spec(page: AppTest) -> dict[str, Any]:
    """What the viewer was given."""
    found: list[dict[str, Any]] = [json.loads(element.proto.json) for element in page.get("bidi_component")]
    (content,) = (one for one in found if "case_id" in one)
    return content


def test_a_label_map_beside_a_scan_is_its_reference_and_no_case(desk: Desk) -> None:
    assert sorted(desk.cases) == ["p_arterial", "p_plain", "p_venous"]
    found = segmentation(desk.store, desk.cases["p_arterial"], REFERENCE)
    kept = np.asarray(nib.load(desk.store.file(found.path)).dataobj)
    assert np.array_equal(kept, TRUTH.labels)


def test_a_run_of_several_cases_keeps_maps_and_phases_on_the_references_grid_and_forgets_the_patient(
    desk: Desk, made: Prediction
) -> None:
    diagnosis = made.record["diagnosis"]
    assert diagnosis["missing"] == ["phase CT NC"]
    assert [phase["file"] for phase in diagnosis["phases"]] == ["p_arterial.nii.gz", "p_venous.nii.gz"]
    assert diagnosis["phases"][1]["shift_mm"] is not None
    assert diagnosis["evidence"]["stands_for"] == diagnosis["named"]
    assert list(made.phase_paths) == ["CT A", "CT V"]
    maps = [made.mask_path, made.uncertainty_path, made.evidence_path, *made.phase_paths.values()]
    for image in (nib.load(desk.store.file(path)) for path in maps):
        assert image.shape == TRUTH.grid.shape
        np.testing.assert_allclose(image.affine, TRUTH.grid.affine, atol=1e-4)
    arterial = np.asarray(nib.load(desk.store.file(made.phase_paths["CT A"])).dataobj)
    assert np.array_equal(arterial, TRUTH.phases[1])
    evidence = nib.load(desk.store.file(made.evidence_path)).get_fdata()
    assert evidence[TRUTH.labels > 1].mean() > evidence[TRUTH.labels == 0].mean() + 0.5
    version = segmentation(desk.store, desk.cases["p_arterial"], desk.store.version(desk.cases["p_arterial"], 1).id)
    (organ, *_) = measurements(desk.store, version).structures
    labels = np.asarray(nib.load(desk.store.file(made.mask_path)).dataobj)
    assert organ.mean == pytest.approx(TRUTH.phases[1][labels == 1].mean(), abs=0.01)


def test_the_page_shows_classes_findings_and_the_evidence_over_either_phase(desk: Desk, made: Prediction) -> None:
    page = desk.page("review", "p_arterial", panel="Lesions")
    diagnosis, text = made.record["diagnosis"], told(page)
    assert f"**{diagnosis['classes'][diagnosis['named']]}** ({diagnosis['named']}) is the most probable class" in text
    assert "Trained on synthetic data, not for clinical use" in text
    assert "Not known: phase CT NC." in text
    assert "before it was corrected" not in text
    (bars,) = (element.proto.body for element in page.get("html") if "all that is known" in element.proto.body)
    order = sorted(diagnosis["probabilities"], key=diagnosis["probabilities"].__getitem__, reverse=True)
    places = [bars.index(diagnosis["classes"][code]) for code in order]
    assert places == sorted(places)
    assert f"{diagnosis['probabilities_without_metadata'][order[0]]:.1%}" in bars
    table = page.dataframe[0].value
    finding = diagnosis["findings"][0]
    assert (table["type"][0], table["part"][0]) == (finding["type"], finding["part"])
    axial = next(one for one in finding["diameters"] if one["plane"] == "axial")
    assert table["axial mm"][0] == f"{axial['longest_mm']:.0f} x {axial['short_mm']:.0f}"

    shown = spec(page)
    maps = {overlay["kind"]: overlay for overlay in shown["overlays"]}
    assert set(maps) == {"uncertainty", "evidence"}
    assert not maps["evidence"]["visible"]
    page.toggle(key="evidence").set_value(True).run()
    assert {overlay["kind"]: overlay["visible"] for overlay in spec(page)["overlays"]} == {
        "uncertainty": False,
        "evidence": True,
    }
    page.session_state["panel"] = "Verdict"  # the switch is out of sight and stays
    page.run()
    page.run()
    assert spec(page)["overlays"][1]["visible"]

    http = TestClient(Starlette(routes=Api(desk.store, desk.services.signer).routes()))
    (phases,) = (group for group in page.get("button_group") if group.label == "Phase")
    assert phases.value == "CT A"
    phases.set_value("CT V").run()
    other = spec(page)
    assert other["image"]["source"] != shown["image"]["source"]
    for one, name in ((shown, "CT A"), (other, "CT V")):
        answer = http.get(one["image"]["url"])
        assert answer.content == desk.store.file(made.phase_paths[name]).read_bytes()
    answer = http.get(maps["evidence"]["url"])
    assert answer.content == desk.store.file(made.evidence_path).read_bytes()
    assert http.get(maps["evidence"]["url"].replace("/evidence/", "/uncertainty/")).status_code == 403
    target = f"{made.id}.7"
    wrong = desk.services.signer.sign(Claim("phase", target, desk.anna.id))
    assert http.get(f"/medseg/api/v1/phase/{target}?t={wrong}").status_code == 404

    labels = np.asarray(nib.load(desk.store.file(made.mask_path)).dataobj).copy()
    labels[0, 0, 0] = 1
    save_labels(desk.store, made.case_id, labels, base_revision=1, by=desk.anna)
    page.session_state["panel"] = "Lesions"
    assert "before it was corrected" in told(page.run())


def test_what_is_exported_says_what_the_model_was_trained_on_and_what_it_said(desk: Desk, made: Prediction) -> None:
    report = json.loads(export_case(desk.store, made.case_id, "json", by=desk.anna).content)
    assert "Trained on synthetic data, not for clinical use" in report["model_disclaimer"]
    assert report["diagnosis"] == made.record["diagnosis"]
    page = export_case(desk.store, made.case_id, "html", by=desk.anna).content.decode()
    assert "Trained on synthetic data, not for clinical use" in page
    assert page.index("Model&#x27;s diagnosis (not known: phase CT NC)") < page.index("Model&#x27;s findings")
    assert f"<td>{made.record['diagnosis']['findings'][0]['part']}</td>" in page


def test_what_is_asked_wrongly_is_refused_before_it_waits(desk: Desk) -> None:
    case, before = desk.cases["p_plain"], len(desk.store.jobs())
    with pytest.raises(UsageError, match="no age between 0 and 120 years"):
        desk.services.queue.submit(case, BUNDLE, by=desk.anna, age=121.0)
    with pytest.raises(InputError, match="no such case"):
        desk.services.queue.submit(case, BUNDLE, by=desk.anna, phases={"CT A": "nobody"})
    assert len(desk.store.jobs()) == before


def test_what_a_batch_made_of_phases_comes_with_the_references_picture_and_its_maps(desk: Desk, tmp_path: Path) -> None:
    scans, output = tmp_path / "scans", tmp_path / "results"
    scans.mkdir()
    for number in (0, 2):  # numbered files, the arterial phase is missing
        save_scan(scans / f"q_{number:04}.nii.gz", TRUTH.phases[number], TRUTH.grid.affine)
    save_scan(scans / "r.nii.gz", np.moveaxis(TRUTH.phases, 0, -1), TRUTH.grid.affine)
    run_batch([scans], output, bundle=BUNDLE, settings=Asked(device="cpu", evidence=True, uncertainty=True))
    found = import_batch(desk.store, output, [scans], by=desk.anna)
    assert found.problems == ()
    cases = {case.name: case for case in map(desk.store.case, found.added)}
    for name, channel in (("q", 2), ("r", 1)):
        shown = np.asarray(nib.load(desk.store.file(cases[name].image_path)).dataobj)
        assert np.array_equal(shown, TRUTH.phases[channel])
        (made,) = desk.store.predictions(cases[name].id)
        assert made.evidence_path
        assert made.uncertainty_path
    assert [Path(source).name for source in cases["q"].sources] == ["q_0000.nii.gz", "q_0002.nii.gz"]
    single = desk.store.case(desk.cases["p_plain"])
    assert [holds_phases(desk.store, case, 3) for case in (cases["q"], cases["r"], single)] == [True, True, False]
    page = desk.page("run", "p_plain", case_id=cases["r"].id)
    page.selectbox[1].set_value(BUNDLE).run()
    assert "CT A" not in {box.label for box in page.selectbox}
    page.button(key="run").click().run()
    job = desk.store.jobs()[-1]
    assert (job.case_id, job.options["phases"], job.options["evidence"]) == (cases["r"].id, {}, True)
    assert "patient" not in job.options
