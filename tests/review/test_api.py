"""From a scan on disk to a corrected mask over HTTP: grid kept, everything else refused."""

from __future__ import annotations

import gzip
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.applications import Starlette
from starlette.testclient import TestClient

from medseg.batch.journal import Entry, Journal
from medseg.errors import InputError, UsageError
from medseg.io.files import sha256_of
from medseg.io.read import read_volume
from medseg.review import api, masks, signing
from medseg.review.saving import restore, save_draft, screenshots
from medseg.review.signing import BadClaimError, Claim, Signer
from medseg.review.store.models import User
from medseg.review.store.repo import Conflict, Saved, Store
from medseg.review.uploads import begin_part, drop_old_uploads, parts, upload_folder
from medseg.review.worklist import add_result, import_batch, import_folder, import_upload
from tests.builders import save_scan

OBLIQUE = np.array([[-0.9, 0.1, 0.3, 40], [0.1, -1.2, 0.2, -7], [-0.3, -0.1, 2.8, 3], [0, 0, 0, 1]])
NAMES = {0: "background", 2: "liver", 300: "tumour"}


class Desk:
    """A store with one case of three axes of different length, its API, and two users."""

    def __init__(self, folder: Path) -> None:
        scans = folder / "scans"
        scans.mkdir()
        self.scan = save_scan(scans / "Miller^Anna.nii.gz", np.random.default_rng(0).normal(size=(5, 6, 7)), OBLIQUE)
        self.store = Store.in_folder(folder / "data")
        self.anna: User = self.store.sign_in("local:anna", "Anna")
        self.ben: User = self.store.sign_in("local:ben", "Ben")
        (self.case,) = import_folder(self.store, scans, by=self.anna).added
        labels = np.zeros((5, 6, 7), np.uint16)
        labels[1:3, 2:4, 3:5] = 300
        labels[4, 5, 6] = 2
        self.labels = labels
        add_result(self.store, self.case, labels, names=NAMES, model="organs", by=self.anna)
        self.signer = Signer(bytes(32))
        self.http = TestClient(Starlette(routes=api.Api(self.store, self.signer, largest_upload=5000).routes()))

    def token(self, purpose: signing.Purpose, target: str | None = None, user: User | None = None) -> str:
        target = self.case if target is None else target
        return self.signer.sign(Claim(purpose, target, (user or self.anna).id))

    def save(self, body: bytes, base: object = 1, user: User | None = None, token: str | None = None) -> object:
        headers = {"X-Medseg-Token": token or self.token("save", user=user), "If-Match": f'"{base}"'}
        return self.http.post(f"{api.PREFIX}/mask/{self.case}", content=body, headers=headers)

    def get(self, purpose: signing.Purpose, target: str) -> object:
        return self.http.get(f"{api.PREFIX}/{purpose}/{target}?t={self.token(purpose, target)}")

    def drawing(self, change: int = 1) -> bytes:
        drawn = masks.to_screen(self.labels, {2: 1, 300: 2})
        drawn[0, 0, :change] = 1
        return gzip.compress(drawn.tobytes(order="F"))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path)
    yield found
    found.store.close()


def test_a_corrected_mask_lies_on_the_images_grid_to_the_bit_and_the_old_version_stays(desk: Desk) -> None:
    before = {path: path.read_bytes() for path in (desk.store.folder / desk.case).iterdir()}
    answer = desk.save(desk.drawing(3))
    assert answer.status_code == 200
    assert answer.json()["revision"] == 2
    assert answer.json()["changed_voxels"] == 3
    version = desk.store.version(desk.case, 2)
    saved, image = nib.load(desk.store.file(version.path)), nib.load(desk.scan)
    expected = desk.labels.copy()
    expected[0, 0, :3] = 2
    assert np.array_equal(np.asarray(saved.dataobj), expected)
    for field in ("srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "qoffset_x", "qform_code", "sform_code"):
        assert saved.header[field].tobytes() == image.header[field].tobytes(), field
    assert saved.header["pixdim"][:4].tobytes() == image.header["pixdim"][:4].tobytes()
    assert version.sha256 == answer.json()["sha256"] == sha256_of(desk.store.file(version.path))
    assert all(path.read_bytes() == content for path, content in before.items())

    back = restore(desk.store, desk.case, 1, base_revision=2, by=desk.ben)
    assert isinstance(back, Saved)
    assert (back.mask.revision, back.mask.restored_from, back.mask.changed_voxels) == (3, 1, 3)


def test_the_second_save_is_a_conflict_and_both_masks_are_there(desk: Desk) -> None:
    assert desk.save(desk.drawing(1)).status_code == 200
    second = desk.save(desk.drawing(4), user=desk.ben)
    assert second.status_code == 409
    told = second.json()
    assert (told["yours"], told["theirs"], told["by"]) == (1, 2, "Anna")
    draft = desk.store.mask(told["draft_id"])
    assert np.count_nonzero(nib.load(desk.store.file(draft.path)).get_fdata()[0, 0] == 2) == 4
    on_top = save_draft(desk.store, draft.id, base_revision=2, by=desk.ben)
    assert isinstance(on_top, Saved)
    assert on_top.mask.changed_voxels == 3
    assert not isinstance(on_top, Conflict)


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"not gzip", 422, "not gzip"),
        (gzip.compress(bytes(5 * 6 * 7 - 1)), 422, "209 of 210 voxels"),
        (gzip.compress(bytes(1 << 26)), 422, "more of 210 voxels"),
        (gzip.compress(bytes([3] * 210)), 422, "outside the case's table (3)"),
        (gzip.compress(bytes(210))[:-6], 422, "voxels"),
        (bytes(api.LARGEST_MASK_BYTES + 1), 413, "more than"),
    ],
    ids=["text", "short", "bomb", "label", "torn", "large"],
)
def test_a_body_that_is_no_mask_of_the_case_is_refused_and_nothing_is_kept(
    desk: Desk, body: bytes, status: int, word: str
) -> None:
    files = set((desk.store.folder / desk.case).iterdir())
    answer = desk.save(body)
    assert answer.status_code == status
    assert word in answer.json()["error"]
    assert desk.store.case(desk.case).revision == 1
    assert set((desk.store.folder / desk.case).iterdir()) == files


def test_tokens_hold_for_one_purpose_one_target_one_key_and_a_short_time(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in (
        "",
        "x.y.z",
        desk.token("volume"),
        desk.token("save", "another case"),
        Signer(bytes([1]) * 32).sign(Claim("save", desk.case, desk.anna.id)),
        desk.signer.sign(Claim("save", desk.case, "nobody")),
    ):
        answer = desk.save(desk.drawing(), token=token or "-")
        assert (answer.status_code, answer.json()["error"].split(";")[0]) == (403, "the link is not valid any more")
    assert desk.save(desk.drawing(), base="x").status_code == 428
    good = desk.token("volume")
    assert desk.http.get(f"{api.PREFIX}/volume/{desk.case}?t={good}").status_code == 200
    monkeypatch.setitem(signing.MAX_AGE_S, "volume", -1)
    assert desk.http.get(f"{api.PREFIX}/volume/{desk.case}?t={good}").status_code == 403
    with pytest.raises(BadClaimError):
        desk.signer.verify(good, "volume", desk.case, cookies={})


def test_a_reader_sees_but_cannot_save_or_upload(desk: Desk) -> None:
    reader = desk.store.sign_in("local:rita", "Rita", role="reader")
    token = desk.token("volume", user=reader)
    answer = desk.http.get(f"{api.PREFIX}/volume/{desk.case}?t={token}")
    assert answer.status_code == 200
    assert answer.content == desk.scan.read_bytes()
    assert (answer.headers["content-encoding"], answer.headers["cache-control"]) == ("identity", "private, no-store")
    assert desk.save(desk.drawing(), user=reader).status_code == 403
    upload = {"X-Medseg-Token": desk.token("upload", "u1", reader), "X-Medseg-Part": "1"}
    assert desk.http.post(f"{api.PREFIX}/upload/u1", content=b"x", headers=upload).status_code == 403


def test_the_viewer_gets_a_dense_table_for_labels_above_255(desk: Desk) -> None:
    answer = desk.get("labels", f"{desk.case}.{desk.store.version(desk.case, 1).id}")
    drawn = np.frombuffer(gzip.decompress(answer.content)[352:], np.uint8).reshape((5, 6, 7), order="F")
    assert np.array_equal(drawn, masks.to_screen(desk.labels, {2: 1, 300: 2}))
    assert set(np.unique(drawn)) == {0, 1, 2}
    with pytest.raises(UsageError, match="256 of them"):
        masks.screen_values(range(1000, 1256))


def test_models_uncertainty_differences_and_the_reduced_image_come_each_by_its_own_claim(desk: Desk) -> None:
    unsure = np.linspace(0, 1, desk.labels.size, dtype=np.float32).reshape(desk.labels.shape)
    made = add_result(
        desk.store,
        desk.case,
        desk.labels,
        names={300: "tumour", 2: "Liver"},
        model="b",
        uncertainty=unsure,
        by=desk.anna,
    )
    version = desk.store.version(desk.case, 1).id
    targets = {
        "labels": f"{desk.case}.{made.id}",
        "uncertainty": made.id,
        "difference": f"{desk.case}.{version}.{made.id}",
        "reduced": desk.case,
        "volume": desk.case,
        "poster": desk.case,
    }
    answers = {purpose: desk.get(purpose, target) for purpose, target in targets.items()}
    assert {purpose: answer.status_code for purpose, answer in answers.items()} == dict.fromkeys(targets, 200)

    def voxels(purpose: str) -> np.ndarray:
        return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(answers[purpose].content)).dataobj)

    assert np.array_equal(voxels("labels"), masks.to_screen(desk.labels, {2: 1, 300: 2}))
    assert np.allclose(voxels("uncertainty"), unsure, atol=2e-5)
    assert np.array_equal(voxels("difference"), 3 * (desk.labels > 0))
    assert voxels("reduced").shape == (3, 3, 4)
    one = desk.get("difference", f"{targets['difference']}.2")
    assert np.count_nonzero(nib.Nifti1Image.from_bytes(gzip.decompress(one.content)).dataobj) == 1
    for purpose, target in targets.items():
        foreign = desk.token("volume" if purpose != "volume" else "poster", target)
        assert desk.http.get(f"{api.PREFIX}/{purpose}/{target}?t={foreign}").status_code == 403
        assert desk.http.get(f"{api.PREFIX}/{purpose}/{target}").status_code == 403
    for purpose, target in (
        ("labels", f"{desk.case}.reference"),
        ("labels", desk.case),
        ("labels", f"another.{made.id}"),
        ("difference", f"{desk.case}.{version}.nobody"),
        ("difference", f"{desk.case}.{version}.{made.id}.x"),
        ("difference", f"{desk.case}.{version}.{made.id}.2.2"),
        ("uncertainty", desk.store.predictions(desk.case)[-1].id),
        ("reduced", "../review.sqlite"),
    ):
        assert desk.get(purpose, target).status_code == 404, (purpose, target)


def test_pictures_of_the_screen_are_judged_stripped_and_kept_for_the_version(desk: Desk) -> None:
    def send(body: bytes, user: User | None = None) -> int:
        headers = {"X-Medseg-Token": desk.token("screenshot", user=user)}
        return desk.http.post(f"{api.PREFIX}/screenshot/{desk.case}", content=body, headers=headers).status_code

    told = PngInfo()
    told.add_text("Comment", "Miller^Anna")
    packed = io.BytesIO()
    Image.new("RGBA", (40, 30), (255, 0, 0, 255)).save(packed, format="PNG", pnginfo=told)
    assert send(packed.getvalue()) == 201
    (kept,) = screenshots(desk.store, desk.case, 1)
    with Image.open(kept) as picture:
        assert (picture.size, picture.getpixel((5, 5)), picture.info) == ((40, 30), (255, 0, 0), {})
    huge = io.BytesIO()
    Image.new("1", (9000, 10)).save(huge, format="PNG")
    jpeg = io.BytesIO()
    Image.new("RGB", (4, 4)).save(jpeg, format="JPEG")
    for body in (b"", b"<svg/>", packed.getvalue()[:60], huge.getvalue(), jpeg.getvalue()):
        assert send(body) == 422
    assert send(bytes(api.LARGEST_SCREENSHOT_BYTES + 1)) == 413
    assert send(packed.getvalue(), desk.store.sign_in("local:rita", "Rita", role="reader")) == 403
    assert screenshots(desk.store, desk.case, 1) == [kept]
    assert [line.action for line in desk.store.trail(case_id=desk.case)][-1] == "screenshot"


@pytest.mark.parametrize("path", ["../../etc/passwd", "%2e%2e%2freview.sqlite", "review.sqlite", "nobody"])
def test_ids_never_become_paths(desk: Desk, path: str) -> None:
    answer = desk.http.get(f"{api.PREFIX}/volume/{path}?t={desk.token('volume', path)}")
    assert answer.status_code in {403, 404}
    assert b"SQLite" not in answer.content


def test_uploads_lie_on_disk_are_limited_and_named_by_medseg(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="medseg.review")
    folder = upload_folder(desk.store.folder, "u1")

    def send(part: str, content: bytes | Iterator[bytes], upload: str = "u1") -> int:
        headers = {"X-Medseg-Token": desk.token("upload", "u1"), "X-Medseg-Part": part}
        return int(desk.http.post(f"{api.PREFIX}/upload/{upload}", content=content, headers=headers).status_code)

    assert send("1", bytes(4000)) == 201
    assert send("2", bytes(900)) == 201
    assert send("3", bytes(200)) == 413  # announced
    assert send("3", (bytes(100) for _ in range(2))) == 413  # counted
    assert send("3", bytes(100)) == 201
    assert [file.stat().st_size for file in parts(folder)] == [4000, 900, 100]
    assert (send("0", b"x"), send("x", b"x"), send("", b"x"), send("1", b"x", "u2")) == (422, 422, 422, 403)
    assert send("1", desk.scan.read_bytes()) == 201  # begins anew
    (file,) = parts(folder)
    assert (folder.stat().st_mode & 0o777, file.read_bytes()) == (0o700, desk.scan.read_bytes())
    case = import_upload(desk.store, file, name="one", by=desk.anna)
    assert np.allclose(nib.load(desk.store.file(case.image_path)).affine, OBLIQUE, atol=1e-5)
    os.utime(folder, (0, 0))
    drop_old_uploads(desk.store.folder)
    assert not folder.exists()
    token = desk.token("poster")
    picture = desk.http.get(f"{api.PREFIX}/poster/{desk.case}?t={token}")
    assert picture.content.startswith(b"\x89PNG")
    assert "Miller" not in caplog.text
    assert str(desk.store.folder) not in caplog.text


def test_all_channels_of_an_upload_are_kept_for_runs(desk: Desk, tmp_path: Path) -> None:
    upload = save_scan(tmp_path / "two.nii", np.random.default_rng(1).normal(size=(5, 6, 7, 2)).astype("f4"), OBLIQUE)
    case = import_upload(desk.store, upload, name="two", by=desk.anna)
    expected = upload.read_bytes()[-5 * 6 * 7 * 2 * 4 :]
    upload.unlink()
    (source,) = (read_volume(desk.store.file(path)) for path in case.sources)
    assert b"".join(channel.tobytes(order="F") for channel in source.data) == expected
    assert read_volume(desk.store.file(case.image_path)).data.shape == (1, 5, 6, 7)


def test_a_folder_is_imported_once_with_the_results_beside_it(desk: Desk, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    save_scan(folder / "a.nii.gz", np.ones((4, 5, 6), np.int16), OBLIQUE)
    save_scan(folder / "a_seg.nii.gz", np.ones((4, 5, 6), np.uint8), OBLIQUE)
    save_scan(folder / "b.nii.gz", np.ones((4, 5, 6), np.int16), OBLIQUE)
    save_scan(folder / "b_seg.nii.gz", np.ones((4, 5, 6), np.uint8), np.eye(4))
    (folder / "c.nii.gz").write_bytes(b"nothing")
    first = import_folder(desk.store, folder, by=desk.anna)
    assert len(first.added) == 2
    assert [desk.store.case(case).revision for case in first.added] == [1, 0]
    assert any("not on the scan's grid" in problem for problem in first.problems)
    assert any(problem.startswith("c:") for problem in first.problems)
    again = import_folder(desk.store, folder, by=desk.anna)
    assert (again.added, again.known) == ((), 2)


def test_looking_for_scans_in_the_data_folder_leaves_the_databases_locks_alone(desk: Desk) -> None:
    save_scan(desk.store.folder / "own.nii.gz", np.ones((4, 5, 6), np.int16), OBLIQUE)
    assert len(import_folder(desk.store, desk.store.folder, by=desk.anna).added) == 1
    # The last connection that is closed removes the log beside the database; another process is not the last.
    look = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
    look += "print(c.execute('SELECT count(*) FROM cases').fetchone())"
    database = desk.store.folder / "review.sqlite"
    log = database.with_name("review.sqlite-wal")
    before = log.stat().st_ino
    for count in (2, 3):
        told = subprocess.run(
            [sys.executable, "-c", f"{look}; c.close()", database], capture_output=True, text=True, check=True
        )
        assert told.stdout == f"({count},)\n"
        assert log.stat().st_ino == before
        import_upload(desk.store, desk.scan, name=f"case {count}", by=desk.anna)


def test_a_batchs_finished_cases_are_imported(desk: Desk, tmp_path: Path) -> None:
    scans, output = tmp_path / "in", tmp_path / "out"
    scans.mkdir()
    output.mkdir()
    for name in ("a", "b"):
        save_scan(scans / f"{name}.nii.gz", np.ones((4, 5, 6), np.int16), OBLIQUE)
        save_scan(output / f"{name}_seg.nii.gz", np.ones((4, 5, 6), np.uint8), OBLIQUE)
    with pytest.raises(InputError, match="no finished case of medseg batch"):
        import_batch(desk.store, output, [scans], by=desk.anna)
    journal = Journal.read(output)
    journal.begin({})
    for case, event in (("a", "done"), ("b", "failed"), ("gone", "done")):
        journal.append(Entry(event=event, case=case))
    journal.close()
    found = import_batch(desk.store, output, [scans], by=desk.anna)
    assert [desk.store.case(case).name for case in found.added] == ["a"]
    assert desk.store.case(found.added[0]).revision == 1
    assert found.problems == ("gone: its scan was not found",)


def test_pieces_are_measured_in_millimetres_and_masks_compared() -> None:
    labels = np.zeros((10, 10, 6), np.uint8)
    labels[1:5, 2, 3] = 1  # 4 voxels along x: 3 steps of 2 mm
    labels[8, 8, 0] = 1
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    sure = np.zeros(labels.shape, np.float32)
    sure[4, 2, 3] = 0.75
    large, small = masks.lesions(labels, affine, {1: "tumour"}, uncertainty=sure)
    assert (large.number, large.voxels, large.axial_diameter_mm, large.max_uncertainty) == (1, 4, 6.0, 0.75)
    assert large.volume_ml == pytest.approx(0.024)
    assert large.centroid_mm == (5.0, 2.0, 9.0)
    assert large.voxel in {(2, 2, 3), (3, 2, 3)}
    assert (small.voxels, small.voxel, small.axial_diameter_mm) == (1, (8, 8, 0), 0.0)
    other = labels.copy()
    other[1:3, 2, 3] = 0
    (found, absent) = masks.compare(labels, other, affine, {1: "tumour", 2: "cyst"})
    assert found.dice == pytest.approx(2 * 3 / 8)
    assert found.difference_percent == pytest.approx(100 * 2 / 3)
    assert absent.dice is None
    with pytest.raises(InputError, match="shapes"):
        masks.compare(labels, other[1:], affine, {1: "tumour"})


def test_what_still_comes_of_a_cancelled_choice_touches_nothing_of_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "upload"
    kept, _ = begin_part(folder, 1, 5)
    kept.write_bytes(b"new")
    for number in (1, 2):
        with pytest.raises(InputError, match="other files were chosen since"):
            begin_part(folder, number, 4)
    assert parts(folder) == [kept]
    assert begin_part(folder, 2, 5)[1] == 3
    begin_part(folder, 1, 6)
    assert parts(folder) == []
