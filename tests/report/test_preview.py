"""The preview's pixels: where the overlay lies, what the marks mean, what fits."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import permutations, product

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medseg.report.palette import label_colours
from medseg.report.preview import WIDTH, render_preview

ORANGE, BLUE = label_colours(2)
Picture = NDArray[np.uint8]


def draw(
    image: NDArray[np.floating],
    labels: NDArray[np.integer],
    affine: NDArray[np.float64],
    names: dict[int, str] | None = None,
    lines: Sequence[str] = (),
) -> Picture:
    png = render_preview(image, labels, affine, names or {1: "one"}, title="scan.nii.gz", lines=lines)
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)))


def cube(n: int = 40) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A uniform cube with a small label towards the patient's right, front and top when the affine is RAS."""
    labels = np.zeros((n, n, n), dtype=np.uint8)
    labels[30:36, 26:34, 24:32] = 1
    return np.full((n, n, n), 7.0, dtype=np.float32), labels


def centres(picture: Picture) -> list[tuple[float, float]]:
    """The overlay's centre in each plane of a cube: pixels right of the middle of its third, and pixels from the top.

    The legend below the planes is left out.
    """
    outline = (picture[:530] == ORANGE).all(axis=2)
    third = WIDTH / 3
    result = []
    for number in range(3):
        rows, columns = np.nonzero(outline[:, round(number * third) : round((number + 1) * third)])
        result.append((float(columns.mean()) - third / 2, float(rows.mean())))
    return result


def test_radiological_convention_puts_the_patients_right_on_the_left_and_the_front_of_a_sagittal_plane_too() -> None:
    # RAS grows to the right, anterior, superior: the label lies right, anterior and superior of the middle.
    image, labels = cube()
    (axial, coronal, sagittal) = centres(draw(image, labels, np.eye(4)))
    assert axial[0] < -60
    assert coronal[0] < -60
    assert sagittal[0] < -40
    (flipped_axial, flipped_coronal, same_sagittal) = centres(draw(image, labels, np.diag([-1.0, 1, 1, 1])))
    assert flipped_axial[0] > 60
    assert flipped_coronal[0] > 60
    assert same_sagittal == sagittal
    (_, upside_down, _) = centres(draw(image, labels, np.diag([1.0, 1, -1, 1])))
    assert upside_down[0] == coronal[0]
    assert upside_down[1] > coronal[1] + 50


def test_the_same_scan_stored_in_any_axis_order_gives_the_same_picture() -> None:
    rng = np.random.default_rng(5)
    image = rng.normal(size=(12, 15, 9)).astype(np.float32)
    labels = np.zeros(image.shape, dtype=np.uint8)
    labels[2:5, 6:12, 3:5], labels[6:9, 3:6, 2:7] = 1, 2
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    names = {1: "one", 2: "two"}
    expected = draw(image, labels, affine, names)
    for axes, signs in product(permutations(range(3)), [(1, 1, 1), (-1, 1, 1), (1, -1, -1)]):
        # Voxel (i, j, k) of the turned array is voxel of axis axes[.] of the first, counted backwards where flipped.
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for new, (old, sign) in enumerate(zip(axes, signs, strict=True)):
            turn[old, new] = sign
            turn[old, 3] = image.shape[old] - 1 if sign < 0 else 0
        index = tuple(slice(None, None, sign) for sign in signs)
        turned = draw(image.transpose(axes)[index], labels.transpose(axes)[index], affine @ turn, names)
        np.testing.assert_array_equal(turned, expected)


def test_overlay_is_translucent_inside_full_at_the_contour_and_nowhere_else() -> None:
    image, labels = cube()
    image[...] = np.arange(40)[:, None, None]
    with_label, without = draw(image, labels, np.eye(4)), draw(image, np.zeros_like(labels), np.eye(4))
    outline = (with_label[:530, : WIDTH // 3] == ORANGE).all(axis=2)
    rows, columns = np.nonzero(outline)
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    middle = ((top + bottom) // 2, (left + right) // 2)
    blended = 0.65 * without[middle].astype(float) + 0.35 * np.array(ORANGE)
    np.testing.assert_allclose(with_label[middle], blended, atol=2)
    np.testing.assert_array_equal(with_label[top, middle[1]], ORANGE)
    # Ten pixels outside the contour the scan is as it was.
    np.testing.assert_array_equal(with_label[top - 10, left:right], without[top - 10, left:right])


def test_planes_keep_the_aspect_ratio_of_the_spacing() -> None:
    # 20 x 20 x 20 voxels of 1 x 2 x 3 mm, all labelled: the overlay covers the planes.
    labels = np.ones((20, 20, 20), dtype=np.uint8)
    picture = draw(labels.astype(np.float32), labels, np.diag([1.0, 2.0, 3.0, 1.0]))
    filled = np.ptp(picture.astype(int), axis=2) > 40
    # Runs of coloured columns above the legend, one for each plane.
    area = filled[:-110]
    used = np.flatnonzero(area.sum(axis=0) > 60)
    runs = np.split(used, np.flatnonzero(np.diff(used) > 1) + 1)
    sizes = [(run.size, int(np.count_nonzero(area[:, run[run.size // 2]]))) for run in runs]
    assert len(sizes) == 3
    for (width, height), expected in zip(sizes, (2 / 1, 3 / 1, 3 / 2), strict=True):
        assert height / width == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 64, 1), (1, 30, 30), (20, 16, 300), (34, 52, 35)])
def test_every_shape_gives_a_picture_of_full_width_with_a_margin_on_all_sides(shape: tuple[int, int, int]) -> None:
    labels = np.ones(shape, dtype=np.uint8)
    picture = draw(np.zeros(shape, dtype=np.float32), labels, np.eye(4), {1: "n" * 300}, ["line " * 100] * 3)
    assert picture.shape[1] == WIDTH
    assert 300 < picture.shape[0] < 1500
    border = np.concatenate([picture[:20].reshape(-1, 3), picture[-8:].reshape(-1, 3), picture[:, -8:].reshape(-1, 3)])
    assert (border == picture[0, 0]).all()


def test_without_a_structure_the_picture_says_so_in_place_of_the_legend() -> None:
    image, labels = cube()
    empty, full = draw(image, np.zeros_like(labels), np.eye(4)), draw(image, labels, np.eye(4))
    assert not (empty == ORANGE).all(axis=2).any()
    assert (full[530:] == ORANGE).all(axis=2).any()
    # The note is drawn in the colour of the marks; the legend holds no text of that colour.
    marks = (255, 214, 102)
    assert (empty[530:] == marks).all(axis=2).any()
    assert not (full[530:] == marks).all(axis=2).any()


def test_a_hundred_structures_fit_and_the_smallest_are_counted_instead_of_listed() -> None:
    labels = np.zeros((60, 60, 20), dtype=np.uint8)
    for value in range(1, 105):
        x, y = 5 * ((value - 1) % 11), 5 * ((value - 1) // 11)
        labels[x : x + 4, y : y + 4, 2 : 4 + value % 15] = value
    names = {value: f"structure with a long name {value}" for value in range(1, 105)}
    picture = draw(labels.astype(np.float32), labels, np.eye(4), names)
    few = draw(labels.astype(np.float32), np.minimum(labels, 1), np.eye(4), {1: "one"})
    assert picture.shape[0] - few.shape[0] <= 15 * 28 + 1
    assert len({tuple(colour) for colour in label_colours(104)}) == 104


def test_a_label_keeps_its_colour_when_another_one_is_absent() -> None:
    image, labels = cube()
    picture = draw(image, labels * np.uint8(2), np.eye(4), {1: "one", 2: "two"})
    assert (picture == BLUE).all(axis=2).any()
    assert not (picture == ORANGE).all(axis=2).any()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 2\) and \(2, 2, 3\)"):
        draw(np.zeros((2, 2, 2), dtype=np.float32), np.zeros((2, 2, 3), dtype=np.uint8), np.eye(4))
