"""MONAI Label's own server and its own client, over HTTP on the loopback address."""

from __future__ import annotations

import hashlib
import json
import socket
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medseg.inference.run import infer
from medseg.io.read import read_labels
from tests.builders import blob_scan, save_scan, tiny_bundle
from tests.label_server import Server

pytest.importorskip("monailabel", reason="MONAI Label is not installed: medseg label install")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:'cgi' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # MONAI Label's client closes neither of both
]

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NAME = "DOE-JOHN-19620312"  # an identifier as clinics give them; no log may repeat it


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("label")
    tiny_bundle(folder / "bundles")
    (folder / "studies").mkdir()
    save_scan(folder / "studies" / "one.nii.gz", blob_scan())
    save_scan(folder / "studies" / "two.nii.gz", blob_scan(seed=1), _LPS)
    running = Server(folder)
    yield running
    running.stop()


def voxels(path: Path | str) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_info_names_every_bundle_with_its_labels_and_the_ways_to_choose_the_next_image(server: Server) -> None:
    info = server.client().info()
    assert info["name"] == "medseg"
    assert {name: model["labels"] for name, model in info["models"].items()} == {
        "tiny": {"Anterior": 1, "Posterior": 2}
    }
    assert info["models"]["tiny"]["type"] == "segmentation"
    assert list(info["trainers"]) == ["tiny"]
    assert list(info["strategies"]) == ["first", "random", "uncertainty"]
    assert list(info["scoring"]) == ["uncertainty"]
    assert info["datastore"] == {"total": 2, "completed": 0, "label_tags": {}}


def test_an_uploaded_image_is_in_the_store_and_gives_the_voxels_of_medseg_infer(server: Server) -> None:
    client, scan = server.client(), save_scan(server.folder / "upload.nii.gz", blob_scan((36, 48, 33), seed=2), _LPS)
    assert client.upload_image(str(scan), _NAME) == {"image": _NAME}
    assert set(client.datastore()["objects"]) == {"one", "two", _NAME}
    path, said = client.infer("tiny", _NAME, {})
    expected = infer(scan, bundle=server.bundle)
    found = nib.load(path)
    assert found.get_data_dtype() == np.uint8
    assert np.array_equal(voxels(path), expected.label_map)
    assert len(np.unique(expected.label_map)) == 3
    assert np.array_equal(found.affine, expected.affine)
    assert said["label_names"] == {"Anterior": 1, "Posterior": 2}
    assert said["record"]["bundle"]["weights_sha256"] == sha256(server.bundle / "models" / "model.pt")


def test_raw_nrrd_for_viewers_in_a_browser_holds_the_same_labels_in_the_same_place(server: Server) -> None:
    wanted = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}
    answer = server.call("POST", "/infer/tiny?image=two&output=image", data={"params": json.dumps(wanted)})
    assert answer.status_code == 200
    path = server.folder / "two.nrrd"
    path.write_bytes(answer.content)
    head = answer.content.partition(b"\n\n")[0]
    assert b"encoding: raw" in head
    assert b"type: uint8" in head or b"type: unsigned char" in head
    expected = infer(server.studies / "two.nii.gz", bundle=server.bundle)
    labels, affine = read_labels(path)
    assert np.array_equal(labels, expected.label_map)
    assert np.allclose(affine, _LPS)


def test_a_session_holds_an_image_until_it_is_removed(server: Server) -> None:
    client, scan = server.client(), save_scan(server.folder / "private.nii.gz", blob_scan(seed=3))
    session = client.create_session(str(scan))["session_id"]
    path, _ = client.infer("tiny", "", {}, session_id=session)
    assert np.array_equal(voxels(path), infer(scan, bundle=server.bundle).label_map)
    client.remove_session(session)
    assert server.call("GET", f"/session/{session}").status_code == 404
    assert server.call("POST", f"/infer/tiny?session_id={session}").status_code == 422
    assert "private" not in client.datastore()["objects"]


def test_parameters_are_brought_into_bounds_and_paths_among_them_are_not_taken(server: Server) -> None:
    def refused(params: dict[str, Any]) -> str:
        answer = server.call("POST", "/infer/tiny?image=one", data={"params": json.dumps(params)})
        assert answer.status_code == 422
        return str(answer.json()["detail"])

    asked = {"overlap": 7, "device": "cuda:99", "result_extension": ".py", "result_dtype": "object", "tta": "true"}
    answer = server.call("POST", "/infer/tiny?image=one&output=json", data={"params": json.dumps(asked)})
    parameters = answer.json()["record"]["parameters"]
    assert (parameters["overlap"], parameters["flips"], answer.json()["record"]["device"]) == (0.9, 2, "cpu")
    assert refused({"overlap": "wide"}).startswith("overlap: is not a number")
    # The one place from which files come that the store does not know is the server's own folder of uploads.
    outside = save_scan(server.folder / "outside.nii.gz", blob_scan())
    assert refused({"image": str(outside)}) == "image: no such image or session; see GET /datastore/?output=all"
    assert refused({"session": {"name": "../../x", "image": str(outside)}, "image": str(outside)}).startswith(
        "image: no"
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/infer/tiny?image={outside}", 422),
        ("POST", "/infer/tiny?session_id=../studies", 422),
        ("POST", "/infer/nothing?image=one", 404),
        ("PUT", "/datastore/label?image=one&tag=../../x", 422),
        ("PUT", "/datastore/label?image=one&tag=/tmp/x", 422),
        ("PUT", "/datastore/label?image=../one&tag=final", 404),
        ("PUT", "/datastore/image?image=../../x", 422),
        ("PUT", "/datastore/image?image=..", 422),
        ("GET", "/datastore/image?image={outside}", 404),
        ("GET", "/datastore/label?label=one&tag=../../x", 404),
        ("PUT", "/model/tiny", 403),
        ("DELETE", "/model/tiny", 403),
        ("GET", "/model/tiny", 404),
        ("PUT", "/session/?uncompress=true", 422),
        ("GET", "/proxy/dicom/wado/x", 403),
        ("POST", "/reload", 403),
    ],
)
def test_nothing_outside_the_studies_is_read_or_written(server: Server, method: str, path: str, status: int) -> None:
    outside = save_scan(server.folder / "outside.nii.gz", blob_scan())
    before = {one: sha256(one) for one in server.folder.rglob("*") if one.is_file() and one != server.log}
    image = (outside.name, outside.read_bytes())
    labels = ("l.nii.gz", outside.read_bytes())
    files = {"PUT": {"file": image, "label": labels, "files": image}}.get(method)
    answer = server.call(method, path.format(outside=outside), files=files)
    assert answer.status_code == status
    assert answer.json()["detail"]
    assert str(server.folder) not in answer.text
    after = {one: sha256(one) for one in server.folder.rglob("*") if one.is_file() and one != server.log}
    assert after == before


def test_what_is_no_scan_or_no_label_map_of_the_image_is_not_kept(server: Server) -> None:
    def put(path: str, field: str, name: str, content: bytes) -> str:
        answer = server.call("PUT", path, files={field: (name, content)})
        assert answer.status_code == 422
        return str(answer.json()["detail"])

    small = save_scan(server.folder / "small.nii.gz", np.zeros((4, 4, 4), np.uint8)).read_bytes()
    code = b"print('taken for a module of the training process')"
    assert "suffix '.py'" in put("/datastore/image?image=numpymaxflow", "file", "x.py", code)
    assert put("/datastore/image?image=text", "file", "x.nii.gz", code).startswith("image: ")
    assert "another image" in put("/datastore/image?image=one", "file", "x.nii.gz", small)
    assert "the image has (34, 52, 35)" in put("/datastore/label?image=one", "label", "x.nii.gz", small)
    archive = server.folder / "x.zip"
    with zipfile.ZipFile(archive, "w") as stream:
        stream.writestr("../../escaped.dcm", code)
    assert put("/datastore/image?image=zip", "file", "x.zip", archive.read_bytes()).startswith("image: ")
    assert set(server.client().datastore()["objects"]) == {"one", "two", _NAME}


def test_web_pages_and_names_from_elsewhere_are_turned_away(server: Server) -> None:
    def status(**headers: str) -> int:
        return int(server.call("GET", "/info/", headers=headers).status_code)

    assert status(Origin="https://evil.example") == 403
    assert status(Host="evil.example") == 400
    assert status(Origin=server.url) == 200
    answer = server.call("GET", "/info/")
    assert "access-control-allow-origin" not in answer.headers


def test_the_image_that_the_model_is_least_sure_of_comes_first_and_then_another(server: Server) -> None:
    client = server.client()
    early = server.call("POST", "/activelearning/uncertainty")
    assert (early.status_code, "has scored none of the 3 images" in early.json()["detail"]) == (422, True)
    scored = server.call("POST", "/scoring/uncertainty?run_sync=true").json()
    weights = sha256(server.bundle / "models" / "model.pt")
    assert scored == {"model": "tiny", "weights_sha256": weights, "scored": 3, "failed": 0}
    assert server.call("POST", "/scoring/uncertainty?run_sync=true").json()["scored"] == 0
    objects = client.datastore()["objects"]
    scores = {name: one["image"]["info"]["medseg_uncertainty"][weights] for name, one in objects.items()}
    expected = infer(server.studies / "one.nii.gz", bundle=server.bundle, uncertainty=True).record.uncertainty
    assert expected is not None
    assert scores["one"]["uncertainty"] == pytest.approx(1 - expected.score, abs=1e-6)
    order = sorted(scores, key=lambda name: -scores[name]["uncertainty"])
    first = client.next_sample("uncertainty", {})
    assert (first["id"], first["model_sha256"]) == (order[0], weights)
    assert client.next_sample("uncertainty", {})["id"] == order[1]
    assert client.next_sample("first", {})["id"] == order[2]  # the only one that was not given out a moment ago
    assert client.next_sample("random", {})["id"] in order


def test_submitted_labels_train_a_new_version_beside_the_old_one(server: Server) -> None:
    client = server.client()
    before = {path: sha256(path) for path in server.bundle.rglob("*") if path.is_file()}
    first, _ = client.infer("tiny", "one", {})
    # As 3D Slicer sends it: values in the order of its segments, and what they are called.
    turned = np.array([0, 2, 1], np.uint8)[voxels(first)]
    drawn = save_scan(server.folder / "drawn.nii.gz", turned, nib.load(first).affine)
    names = [{"name": "Posterior", "idx": 1}, {"name": "anterior", "idx": 2}]
    assert client.save_label("one", str(drawn), params={"label_info": names}) == {"image": "one", "label": "one"}
    kept = client.download_label("one", "final")
    assert np.array_equal(voxels(kept), turned)
    stored = client.datastore()["objects"]["one"]["labels"]["final"]["info"]
    assert stored["sha256"] == sha256(drawn)
    client.save_label("one", str(drawn), params={"label_info": names})
    assert [path.name for path in (server.studies / ".medseg" / "earlier").iterdir()] == ["one.1.nii.gz"]

    task = client.train_start("tiny", {"steps": 3, "batch_size": 1, "bundle_path": str(server.studies)})
    assert task["request"]["bundle_path"] != str(server.studies)
    while client.train_status(check_if_running=True) or client.train_status()["status"] in ("SUBMITTED", "RUNNING"):
        time.sleep(0.5)
    ended = client.train_status()
    assert ended["status"] == "DONE", ended["details"]
    new = server.trained / "tiny_v2"
    assert [path.name for path in server.trained.iterdir()] == ["tiny_v2"]
    metadata = json.loads((new / "configs" / "metadata.json").read_text())
    assert metadata["version"] == "0.2.0"
    origin = {"name": "tiny", "version": "0.1.0", "weights_sha256": before[server.bundle / "models" / "model.pt"]}
    assert metadata["medseg"]["finetuned_from"] == {**origin, "cases": 1, "steps": 3}
    assert {path: sha256(path) for path in server.bundle.rglob("*") if path.is_file()} == before

    assert list(client.info()["models"]) == ["tiny", "tiny_v2"]
    again, said = client.infer("tiny_v2", "one", {})
    assert np.array_equal(voxels(again), infer(server.studies / "one.nii.gz", bundle=new).label_map)
    assert said["record"]["bundle"]["weights_sha256"] == sha256(new / "models" / "model.pt")
    old, _ = client.infer("tiny", "one", {})
    assert np.array_equal(voxels(old), np.array([0, 2, 1])[turned])
    # Scores of the old weights say nothing about the new ones.
    assert server.call("POST", "/activelearning/uncertainty").status_code == 422


def test_a_batch_saves_a_label_map_for_each_image_that_has_none(server: Server) -> None:
    asked = {"label_tag": "model", "max_workers": 64}
    answer = server.call("POST", "/batch/infer/tiny?images=unlabeled&run_sync=true", json=asked)
    assert set(answer.json()) == {"two", _NAME}
    labels = read_labels(server.studies / "labels" / "model" / "two.nii.gz")[0]
    assert np.array_equal(labels, infer(server.studies / "two.nii.gz", bundle=server.bundle).label_map)


def test_the_log_names_no_image_and_the_server_ends_with_all_it_started(server: Server) -> None:
    log = server.log.read_text()
    assert "tiny: " in log
    assert _NAME not in log
    assert "one.nii.gz" not in log
    assert str(server.studies) not in log
    assert server.stop() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))).close()
