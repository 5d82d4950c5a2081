"""A real Orthanc as the place of the images: the server over HTTP, and the OHIF that it carries in a real Chromium."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest

from medseg.errors import InputError, UsageError
from medseg.inference.run import Result, infer
from medseg.label.serve import Service, serve
from medseg.report.dicom_seg import dicom_seg
from medseg.report.segmented import Segmented
from tests.builders import blob_scan, tiny_bundle
from tests.dicom_builders import IDENTITY, write_series
from tests.label_server import Server

pytest.importorskip("monailabel", reason="MONAI Label is not installed: medseg label install")
ORTHANC = shutil.which("Orthanc")
PLUGIN = next(iter(sorted(Path("/usr/lib/orthanc").glob("libOrthancDicomWeb.so*"))), None)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_S = 240

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ORTHANC or not PLUGIN, reason="needs the packages orthanc and orthanc-dicomweb"),
    pytest.mark.filterwarnings("ignore:'cgi' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # MONAI Label's client closes neither of both
]

_LOGIN = ("reader", "kX7-not-in-a-log")
_AFFINE = np.diag([-1.0, -1.2, 1.5, 1.0])


class Archive:
    """An Orthanc that asks for a login, with one series whose images are numbered against their positions."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/dicom-web"
        settings = {
            "StorageDirectory": str(folder / "archive"),
            "IndexDirectory": str(folder / "archive"),
            "HttpPort": port,
            "DicomServerEnabled": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": dict([_LOGIN]),
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))
        self._sessions: list[Any] = []
        self._log = (folder / "orthanc.txt").open("w")
        self._process = subprocess.Popen([str(ORTHANC), str(folder / "orthanc.json")], stderr=self._log)
        self._wait()
        stored = blob_scan().astype("<i2")

        self.series = folder / "series"

        def number(dataset: pydicom.Dataset, k: int) -> None:
            dataset.InstanceNumber = stored.shape[2] - k

        self.files = write_series(self.series, stored, _AFFINE, change=number)
        self.client().store_instances([pydicom.dcmread(path) for path in self.files])
        head = pydicom.dcmread(self.files[0])
        self.study, self.image = str(head.StudyInstanceUID), str(head.SeriesInstanceUID)

    def _wait(self) -> None:
        import requests

        for _ in range(600):
            try:
                assert requests.get(self.url + "/studies", timeout=10).status_code == 401  # it asks for the login
                return
            except requests.ConnectionError:
                time.sleep(0.1)

    def client(self) -> Any:
        import requests
        from dicomweb_client import DICOMwebClient

        session = requests.Session()
        session.auth = _LOGIN
        self._sessions.append(session)
        return DICOMwebClient(self.url, session=session)

    def segmentations(self) -> list[Any]:
        """The DICOM SEG objects, read by highdicom."""
        client = self.client()
        found = client.search_for_series(search_filters={"Modality": "SEG"})
        uids = [(one["0020000D"]["Value"][0], one["0020000E"]["Value"][0]) for one in found]
        return [hd.seg.Segmentation.from_dataset(client.retrieve_series(*uid)[0]) for uid in uids]

    def stop(self) -> None:
        for session in self._sessions:
            session.close()
        self._process.terminate()
        self._process.wait(60)
        self._log.close()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    running = Archive(tmp_path_factory.mktemp("orthanc"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, archive: Archive) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("label")
    tiny_bundle(folder / "bundles")
    (folder / "password").write_text(_LOGIN[1] + "\n")
    login = {
        "MONAI_LABEL_DICOMWEB_USERNAME": _LOGIN[0],
        "MONAI_LABEL_DICOMWEB_PASSWORD_FILE": str(folder / "password"),
    }
    running = Server(folder, "--studies", archive.url, environment=login)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def expected(server: Server, archive: Archive) -> Result:
    """What ``medseg infer`` makes of the same images."""
    return infer(archive.series, bundle=server.bundle)


def on_images(made: Any, expected: Result) -> np.ndarray:
    """A DICOM SEG object on the scan's grid, by the positions of its frames."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ expected.affine
    volume = made.get_volume(combine_segments=True, dtype=np.uint8)
    shape = expected.label_map.shape
    found = np.zeros(shape, np.uint8)
    corner = np.linalg.solve(lps, volume.affine @ (0, 0, 0, 1))[:3]
    steps = np.linalg.solve(lps[:3, :3], volume.affine[:3, :3])  # frames, rows, columns to voxels of the scan
    for index in np.argwhere(volume.array):
        x, y, z = np.rint(corner + steps @ index).astype(int)
        found[x, y, z] = volume.array[tuple(index)]
    assert np.allclose(corner + 0.0, np.rint(corner), atol=1e-3)
    return found


def test_a_series_of_the_server_gives_the_voxels_of_medseg_infer(
    server: Server, archive: Archive, expected: Result
) -> None:
    client = server.client()
    assert client.info()["datastore"] == {"total": 1, "completed": 0, "label_tags": {}}
    path, said = client.infer("tiny", archive.image, {})
    found = nib.load(path)
    assert np.array_equal(np.asarray(found.dataobj), expected.label_map)
    assert len(np.unique(expected.label_map)) == 3
    assert np.allclose(found.affine, _AFFINE)
    assert said["label_names"] == {"Anterior": 1, "Posterior": 2}
    assert client.next_sample("first", {})["id"] == archive.image
    assert server.call("POST", "/infer/tiny?image=1.2.3").status_code == 422


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/proxy/system"),
        ("GET", "/proxy/dicom/system"),
        ("GET", "/proxy/dicom/wado/../system"),
        ("GET", "/proxy/dicom/wado/%2e%2e/system"),
        ("GET", "/proxy/dicom/wado/studies/%2e%2e/%2e%2e/system"),
        ("GET", "/proxy/dicom/wado/studies%3f/../../system"),
        ("POST", "/proxy/dicom/wado/%2e%2e/tools/execute-script"),
        ("POST", "/proxy/dicom/wado/series"),
        ("POST", "/proxy/dicom/stow/studies"),
        ("DELETE", "/proxy/dicom/wado/studies"),
    ],
)
def test_the_viewers_way_leads_to_the_dicomweb_service_only(server: Server, method: str, path: str) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=60)
    connection.request(method, path)  # as it stands: other clients resolve the dots
    answer = connection.getresponse()
    assert answer.status in (404, 405)
    assert b"Orthanc" not in answer.read()
    connection.close()


def test_the_study_list_heeds_its_filters_without_a_login_of_its_own(server: Server, archive: Archive) -> None:
    def found(query: str) -> list[str]:
        answer = server.call("GET", f"/proxy/dicom/qido/studies?{query}", headers={"Authorization": "Bearer x"})
        assert answer.status_code == 200
        return [one["0020000D"]["Value"][0] for one in answer.json()]

    assert found("PatientName=Zyx*&limit=5") == [archive.study]
    assert found("PatientName=Nobody*") == []


def test_a_final_label_becomes_dicom_seg_on_the_server_and_what_a_model_made_alone_is_none(
    server: Server, archive: Archive, expected: Result
) -> None:
    client = server.client()
    automatic = pydicom.dcmread(io.BytesIO(dicom_seg(Segmented.of(expected))))
    archive.client().store_instances([automatic])
    turned = np.array([0, 2, 1], np.uint8)[expected.label_map]
    drawn = server.folder / "drawn.nii.gz"
    nib.save(nib.Nifti1Image(turned, expected.affine), drawn)
    nameless = server.call("PUT", f"/datastore/label?image={archive.image}", files={"label": drawn.open("rb")})
    assert (nameless.status_code, "values without a name: 1, 2" in nameless.text) == (422, True)
    assert client.info()["datastore"]["completed"] == 0
    names = [{"name": "Posterior", "idx": 1}, {"name": "Anterior", "idx": 2}]
    client.save_label(archive.image, str(drawn), params={"label_info": names})

    (made,) = [one for one in archive.segmentations() if one.SOPInstanceUID != automatic.SOPInstanceUID]
    assert np.array_equal(on_images(made, expected), turned)
    assert [str(one.SegmentLabel) for one in made.SegmentSequence] == ["Posterior", "Anterior"]
    assert str(made.StudyInstanceUID) == archive.study
    assert made.PatientID == "PID-8675309"
    assert client.info()["datastore"]["completed"] == 1
    kept = nib.load(client.download_label(archive.image, "final"))
    assert np.array_equal(np.asarray(kept.dataobj), turned)
    assert client.next_sample("first", {}) == {}


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_ohif_segments_a_study_and_its_export_is_the_new_final_label(
    server: Server, archive: Archive, expected: Result
) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
    before = {str(one.SOPInstanceUID) for one in archive.segmentations()}
    flags = ("--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=[*flags, "--ignore-gpu-blocklist"])
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        tab.set_default_timeout(PATIENCE_S * 1000)
        tab.route("**/*.googleapis.com/**", lambda route: route.abort())  # its fonts, which nothing needs

        def press(thing: Any) -> None:
            # Without a graphics card the page moves all the time, and a click would wait until it stands still.
            thing.wait_for()
            thing.evaluate("element => element.click()")

        tab.goto(f"{server.url}/ohif/")
        press(tab.get_by_text("Zyxwvut").first)
        press(tab.get_by_role("link", name="MONAI Label").first)
        tab.get_by_text("18/35").first.wait_for()  # the slice in the middle is drawn
        assert tab.locator("#monailabelServerURL").input_value() == f"{server.url}/"
        press(tab.locator(".settingsTable .actionButton"))
        press(tab.get_by_role("button", name="Run").first)
        tab.get_by_text("Running Segmentation - Successful").wait_for()
        press(tab.locator("[data-cy=panelSegmentationWithTools-btn]"))
        press(tab.locator("[data-cy=Brush]"))
        tab.get_by_text("Radius (mm)").wait_for()
        tab.get_by_role("combobox").locator("xpath=preceding::button[1]").focus()
        tab.keyboard.press("Enter")
        tab.get_by_role("menuitem", name="Export & Download").focus()
        tab.keyboard.press("ArrowRight")
        tab.get_by_role("menuitem", name="Export DICOM SEG").focus()
        tab.keyboard.press("Enter")
        press(tab.locator("button", has_text="Save"))
        tab.get_by_text("Stored on the DICOMweb server").first.wait_for()
        browser.close()
    (made,) = [one for one in archive.segmentations() if str(one.SOPInstanceUID) not in before]
    assert [str(one.SegmentLabel) for one in made.SegmentSequence] == ["Anterior", "Posterior"]
    assert np.array_equal(on_images(made, expected), expected.label_map)


def test_the_log_names_nobody_and_no_password(server: Server, archive: Archive) -> None:
    log = server.log.read_text()
    assert "tiny: " in log
    for word in (*IDENTITY, *_LOGIN, archive.study, archive.image):
        assert word not in log
    assert server.stop() == 0


def test_an_address_that_is_none_or_lets_the_password_be_read_is_refused_in_a_line(
    archive: Archive, tmp_path: Path
) -> None:
    def refusal(url: str, environment: dict[str, str] | None = None) -> str:
        bundle = tmp_path / "tiny" if (tmp_path / "tiny").exists() else tiny_bundle(tmp_path)
        service = Service(studies=url, bundles=[bundle], trained=tmp_path / "trained")
        with pytest.raises((UsageError, InputError)) as refused:
            serve(service, {**os.environ, **(environment or {})}, ready=pytest.fail)
        return str(refused.value)

    login = {"MONAI_LABEL_DICOMWEB_USERNAME": "a", "MONAI_LABEL_DICOMWEB_PASSWORD": "b"}
    assert refusal(archive.url).endswith(
        "(status 401); set MONAI_LABEL_DICOMWEB_USERNAME and MONAI_LABEL_DICOMWEB_PASSWORD"
    )
    assert "(status 401)" in refusal(archive.url, login)
    assert "in the clear; use https" in refusal("http://archive.example/dicom-web", login)
    assert "no plain address" in refusal("http://reader:secret@127.0.0.1:8042/dicom-web")
    assert "secret" not in refusal("http://reader:secret@127.0.0.1:8042/dicom-web")
    assert "no DICOMweb server answers" in refusal("http://127.0.0.1:1/dicom-web")
    missing = {"MONAI_LABEL_DICOMWEB_PASSWORD_FILE": str(tmp_path / "nowhere")}
    assert "no password can be read from it" in refusal(archive.url, missing)
