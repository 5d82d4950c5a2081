"""What the tables beside the viewer say, segmentations side by side, and files that follow from others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.errors import InputError
from medseg.io.geometry import world
from medseg.review import compare, derived
from medseg.review.compare import difference, difference_file, legend, overlaps, segmentation, segmentations
from medseg.review.saving import restore, save_labels
from medseg.review.store.models import User
from medseg.review.store.repo import Store
from medseg.review.structures import measurements
from medseg.review.worklist import add_reference, add_result, import_folder
from tests.builders import save_scan

OBLIQUE = np.array([[-0.9, 0.1, 0.3, 40], [0.1, -1.2, 0.2, -7], [-0.3, -0.1, 2.8, 3], [0, 0, 0, 1]])
SHAPE = (7, 6, 5)


class Desk:
    """A case with an image, two models, a correction and a reference."""

    def __init__(self, folder: Path) -> None:
        self.image = np.random.default_rng(0).integers(-900, 900, SHAPE).astype(np.int16)
        (folder / "scans").mkdir()
        (folder / "labelsTr").mkdir()
        save_scan(folder / "scans" / "a.nii.gz", self.image, OBLIQUE)
        self.labels = np.zeros(SHAPE, np.uint8)
        self.labels[1:3, 2:4, 1:3] = 1
        self.labels[5, 5, 4] = 1
        self.labels[6, 0, 0] = 2
        reference = self.labels.copy()
        reference[0, 0, 0] = 7
        save_scan(folder / "labelsTr" / "a.nii.gz", reference, OBLIQUE)
        self.store = Store.in_folder(folder / "data")
        self.anna: User = self.store.sign_in("local:anna", "Anna")
        found = import_folder(self.store, folder / "scans", by=self.anna, references=folder / "labelsTr")
        assert found.problems == ()
        (self.case,) = found.added
        self.unsure = np.linspace(0, 1, self.labels.size, dtype=np.float32).reshape(SHAPE)
        self.first = add_result(
            self.store,
            self.case,
            self.labels,
            names={1: "liver", 2: "tumour"},
            model="organs",
            uncertainty=self.unsure,
            by=self.anna,
        )
        other = np.where(self.labels == 1, 5, 0).astype(np.uint8)  # another table: liver is 5, cyst is 2
        other[5, 5, 4] = 0
        other[6, 0, 0] = 2
        self.second = add_result(
            self.store, self.case, other, names={2: "cyst", 5: "Liver"}, model="abdomen", by=self.anna
        )
        self.corrected = self.labels.copy()
        self.corrected[0, :2, 4] = 1
        self.corrected[5, 5, 4] = 2
        save_labels(self.store, self.case, self.corrected, base_revision=1, by=self.anna)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path)
    yield found
    found.store.close()


def test_structures_and_lesions_of_any_segmentation_are_measured_on_the_image(desk: Desk) -> None:
    version = segmentation(desk.store, desk.case, desk.store.version(desk.case, 2).id)
    found = measurements(desk.store, version)
    liver, tumour = found.structures
    values = desk.image[desk.corrected == 1].astype(float)
    assert (liver.name, liver.voxels, liver.components) == ("liver", 10, 2)
    assert liver.mean == pytest.approx(values.mean())
    assert liver.sd == pytest.approx(values.std())
    assert liver.volume_ml == pytest.approx(10 * abs(np.linalg.det(OBLIQUE)) / 1000)
    assert (tumour.voxels, tumour.components) == (2, 2)
    # The version was made from the first model's prediction, whose uncertainty therefore stands beside it.
    assert found.lesions[0].max_uncertainty == pytest.approx(desk.unsure[2, 3, 2], abs=1e-4)
    assert measurements(desk.store, version) is found
    assert (
        measurements(desk.store, segmentation(desk.store, desk.case, desk.second.id)).lesions[0].max_uncertainty is None
    )


def test_a_version_knows_the_prediction_it_comes_from_through_corrections_and_restores(desk: Desk) -> None:
    found = desk.store.origin(desk.case, 2)
    assert found is not None
    assert found.id == desk.first.id
    restore(desk.store, desk.case, 1, base_revision=2, by=desk.anna)
    again = desk.store.origin(desk.case, 3)
    assert again is not None
    assert again.id == desk.first.id


def test_two_models_are_compared_by_the_names_of_their_labels(desk: Desk) -> None:
    kinds = [found.kind for found in segmentations(desk.store, desk.case)]
    assert kinds == ["version", "version", "prediction", "prediction", "reference"]
    rows = {row.name: row for row in overlaps(desk.store, desk.case, desk.first.id, desk.second.id)}
    assert rows["liver"].dice == pytest.approx(2 * 8 / (9 + 8))
    assert (rows["tumour"].dice, rows["tumour"].second_ml) == (0.0, 0.0)
    assert (rows["cyst"].dice, rows["cyst"].first_ml) == (0.0, 0.0)
    with_reference = overlaps(desk.store, desk.case, desk.first.id, compare.REFERENCE)
    assert [(row.name, row.dice) for row in with_reference] == [("liver", 1.0), ("tumour", 1.0), ("label 7", 0.0)]
    drawn = {row.name: row for row in legend(desk.store, desk.case, {2: "cyst", 5: "Liver"})}
    own = {row.name: row for row in desk.store.labels(desk.case)}
    assert drawn["Liver"].screen_value == own["liver"].screen_value == 1
    assert (drawn["Liver"].r, drawn["Liver"].g) == (own["liver"].r, own["liver"].g)
    assert drawn["cyst"].screen_value == 3
    shown = nib.load(compare.shown_labels(desk.store, segmentation(desk.store, desk.case, desk.second.id)))
    assert np.array_equal(np.asarray(shown.dataobj) == 1, desk.labels * (np.indices(SHAPE)[0] < 5) == 1)
    assert np.asarray(shown.dataobj)[6, 0, 0] == 3


def test_a_difference_shows_which_voxels_are_whose_on_the_grid_of_the_image(desk: Desk) -> None:
    one, two = (desk.store.version(desk.case, revision).id for revision in (1, 2))
    path = difference_file(desk.store, desk.case, one, two)
    saved = nib.load(path)
    found = np.asarray(saved.dataobj)
    expected = np.where(desk.labels > 0, compare.BOTH, 0)
    expected[0, :2, 4] = compare.ONLY_SECOND
    expected[5, 5, 4] = compare.OTHER_LABEL
    assert saved.get_data_dtype() == np.uint8
    assert np.array_equal(found, expected)
    assert np.allclose(saved.affine, OBLIQUE, atol=1e-5)
    assert difference_file(desk.store, desk.case, one, two) == path
    only = difference(desk.labels, desk.corrected, value=2)
    assert (only[6, 0, 0], only[5, 5, 4], np.count_nonzero(only)) == (compare.BOTH, compare.ONLY_SECOND, 2)
    for wrong in ("nobody", desk.case):
        with pytest.raises(InputError, match="no such"):
            difference_file(desk.store, desk.case, one, wrong)


def test_the_reduced_image_holds_means_of_blocks_each_at_the_middle_of_its_voxels(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = derived.reduced_image(desk.store, desk.store.case(desk.case))
    saved = nib.load(path)
    small = np.asarray(saved.dataobj)
    assert (small.shape, small.dtype) == ((4, 3, 3), np.dtype("int16"))
    block = np.indices(SHAPE).reshape(3, -1).T
    inside = block[(block // 2 == (1, 2, 0)).all(axis=1)]
    assert len(inside) == 8
    assert small[1, 2, 0] == pytest.approx(desk.image[tuple(inside.T)].mean(), abs=0.51)
    assert np.allclose(world(saved.affine, (1, 2, 0)), world(OBLIQUE, inside).mean(axis=0), atol=1e-4)
    assert small[3, 0, 2] == pytest.approx(desk.image[6, :2, 4].mean(), abs=0.51)  # the odd ends
    stamp = path.stat().st_mtime_ns
    assert derived.reduced_image(desk.store, desk.store.case(desk.case)).stat().st_mtime_ns == stamp
    assert not list(path.parent.glob(".*"))
    monkeypatch.setattr("medseg.review.worklist.LARGE_VOXELS", 10)
    folder = tmp_path / "large"
    folder.mkdir()
    save_scan(folder / "b.nii.gz", desk.image, OBLIQUE)
    (large,) = import_folder(desk.store, folder, by=desk.anna).added
    made = nib.load(desk.store.folder / large / derived.REDUCED)
    assert np.array_equal(np.asarray(made.dataobj), small)


def test_a_reference_on_another_grid_is_refused_and_nothing_is_left(desk: Desk, tmp_path: Path) -> None:
    before = set((desk.store.folder / desk.case).iterdir())
    wrong = save_scan(tmp_path / "wrong.nii.gz", desk.labels, np.eye(4))
    with pytest.raises(InputError, match="not on the scan's grid"):
        add_reference(desk.store, desk.case, wrong, by=desk.anna)
    reader = desk.store.sign_in("local:rita", "Rita", role="reader")
    right = save_scan(tmp_path / "right.nii.gz", desk.labels, OBLIQUE)
    with pytest.raises(PermissionError):
        add_reference(desk.store, desk.case, right, by=reader)
    assert set((desk.store.folder / desk.case).iterdir()) == before
