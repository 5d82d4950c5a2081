"""The picture beside a result: three planes through the largest structure, with overlay and legend.

Everything is drawn with Pillow: no display, no plotting library, well under a second for a large scan.
"""

from __future__ import annotations

import io
import math
import unicodedata
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medseg.evaluation.volumes import label_boxes, voxel_volume_ml
from medseg.io.geometry import AxisOrder, spacing
from medseg.report.palette import Colour, label_colours

WIDTH = 1280
"""Width of the picture in pixels."""

MARGIN = 36
FOOTER = "Research use only, not for diagnosis"
_GAP = 18
_GUTTER = 26  # around a plane, for the orientation marks
_CAPTION = 30  # above a plane
_MIN_CELL = 190  # a plane's caption fits
_MAX_PLANE_HEIGHT = 860
_LEGEND_ROW = 28
_LEGEND_ROWS = 16
_LISTED_ABSENT = 6
_FILL = 0.35

_AIR_HU = -500.0
WINDOW_HU = (-160.0, 240.0)
_LUNG_WINDOW = (-1350.0, 150.0)

BACKGROUND: Colour = (16, 19, 24)
PLANE_FRAME: Colour = (52, 58, 68)
TEXT: Colour = (236, 239, 244)
MUTED: Colour = (148, 156, 168)
_MARK: Colour = (255, 214, 102)

# What the built-in font lacks and decomposition does not give.
_SPELLED = str.maketrans({"ß": "ss", "µ": "u", "–": "-", "—": "-", "’": "'", "æ": "ae", "ø": "o", "×": "x", "·": "|"})

# Name, the two canonical axes that the picture's columns and rows follow, and the marks left, right, top, bottom.
# Radiological convention: the patient's right is on the left. In RAS every axis grows to the left or upwards, so each
# plane is flipped along both.
_PLANES = (
    ("Axial", (0, 1), "RLAP"),
    ("Coronal", (0, 2), "RLSI"),
    ("Sagittal", (1, 2), "APSI"),
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One label of the legend."""

    name: str
    colour: Colour
    volume_ml: float


@dataclass(frozen=True, slots=True)
class Caliper:
    """A measured length, drawn on one plane.

    Attributes:
        plane: axial, coronal or sagittal.
        ends_mm: both ends in RAS mm.
    """

    plane: str
    ends_mm: tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class Focus:
    """What the planes go through, where it is not the largest structure.

    Attributes:
        centre: index of the slice along each canonical (RAS) axis.
        calipers: lengths to draw.
    """

    centre: tuple[int, int, int]
    calipers: tuple[Caliper, ...] = ()


def render_preview(
    image: NDArray[np.floating],
    labels: NDArray[np.integer],
    affine: NDArray[np.float64],
    names: Mapping[int, str],
    *,
    title: str,
    lines: Sequence[str] = (),
    focus: Focus | None = None,
    strip: Image.Image | None = None,
    footer: str = FOOTER,
) -> bytes:
    """Draw three planes of a scan with its segmentation.

    Args:
        image: scan (X, Y, Z), finite, in any orientation.
        labels: label map (X, Y, Z) on the same grid; 0 is background.
        affine: voxel index to RAS millimetres, (4, 4).
        names: name of each label value; a value without a name is called ``label V``.
        title: headline.
        lines: smaller lines below it; cut at the picture's width.
        focus: where the planes lie, and lengths to draw; None: through the largest structure.
        strip: a picture below the planes, up to `WIDTH` less two margins wide.
        footer: a line at the bottom.

    Returns:
        A PNG file's bytes, `WIDTH` pixels wide, as high as the content needs.

    Raises:
        ValueError: image and labels differ in shape or are not three-dimensional.
    """
    if image.ndim != 3 or image.shape != labels.shape:
        raise ValueError(f"image and labels must have one shape (X, Y, Z), got {image.shape} and {labels.shape}")
    order, shape = AxisOrder.to_canonical(affine), image.shape
    size = spacing(order.affine(affine, shape))
    image, labels = order.apply(image), order.apply(labels)
    boxes = label_boxes(labels)
    voxels = {value: int(np.count_nonzero(labels[box] == value)) for value, box in boxes.items()}
    centre = focus.centre if focus is not None else _centre(labels, boxes, voxels)

    values = sorted({*boxes, *(value for value in names if value > 0)})
    colours = dict(zip(values, label_colours(len(values)), strict=True))
    voxel_ml = voxel_volume_ml(affine)
    entries = [
        _Entry(names.get(value, f"label {value}"), colours[value], voxels.get(value, 0) * voxel_ml) for value in values
    ]
    window = _window(image, labels)
    extent = np.asarray(image.shape) * size
    scale = _scale(extent)
    planes = []
    inverse = np.linalg.inv(order.affine(affine, shape))
    for name, (column, row), _ in _PLANES:
        through = 3 - column - row
        index = [slice(None), slice(None), slice(None)]
        pixels = (max(1, round(extent[column] * scale)), max(1, round(extent[row] * scale)))
        cut = tuple(centre[axis] if axis == through else index[axis] for axis in range(3))
        planes.append(picture_plane(image[cut], labels[cut], pixels, window, colours))
        for caliper in focus.calipers if focus is not None else ():
            if caliper.plane == name.lower():
                ends = [(inverse[:3, :3] @ end + inverse[:3, 3])[[column, row]] for end in caliper.ends_mm]
                _draw_caliper(planes[-1], ends, (image.shape[column], image.shape[row]))
    return _compose(planes, entries, centre, image.shape, scale, title, lines, strip, footer)


def _centre(
    labels: NDArray[np.integer], boxes: Mapping[int, tuple[slice, slice, slice]], voxels: Mapping[int, int]
) -> tuple[int, int, int]:
    """Index of the slice to show along each axis of labels (X, Y, Z).

    In the middle half of the largest label, the slice with most labelled voxels; the scan's middle without a label.
    """
    if not boxes:
        x, y, z = (n // 2 for n in labels.shape)
        return x, y, z
    largest = max(boxes, key=lambda value: voxels[value])
    box = boxes[largest]
    own = labels[box] == largest
    result = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        area = np.count_nonzero(own, axis=others)
        position = np.arange(area.size)
        centroid = float(area @ position / area.sum())
        near = (np.abs(position - centroid) <= max(1.0, area.size / 4)) & (area > 0)
        if not near.any():
            near = area == area.max()
        slab = [slice(None), slice(None), slice(None)]
        slab[axis] = box[axis]
        foreground = np.count_nonzero(labels[tuple(slab)], axis=others)
        # Of slices with equally many voxels, the one nearest to the centroid.
        rank = np.where(near, foreground - np.abs(position - centroid) / (1 + area.size), -np.inf)
        result.append(box[axis].start + int(rank.argmax()))
    return result[0], result[1], result[2]


def _window(image: NDArray[np.floating], labels: NDArray[np.integer]) -> tuple[float, float]:
    """Grey values shown as black and white.

    Values far below zero mean Hounsfield units: the soft tissue window then, or the lung window when the structures
    are mostly air. Everything else gets robust percentiles of what is not background.

    Args:
        image: scan (X, Y, Z).
        labels: label map (X, Y, Z).
    """
    step = max(1, math.ceil((image.size / 2_000_000) ** (1 / 3)))
    sample = np.asarray(image[::step, ::step, ::step], dtype=np.float64)
    low, high = (float(v) for v in np.percentile(sample, (0.5, 99.5)))
    if low < _AIR_HU and high > 0:
        labelled = sample[labels[::step, ::step, ::step] > 0]
        airy = labelled.size > 0 and float(np.median(labelled)) < _AIR_HU
        return _LUNG_WINDOW if airy else WINDOW_HU
    body = sample[sample > low + 0.05 * (high - low)]
    if body.size:
        low, high = (float(v) for v in np.percentile(body, (1.0, 99.5)))
        low -= 0.05 * (high - low)  # keeps the darkest tissue off pure black
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _scale(extent: NDArray[np.float64]) -> float:
    """Pixels per millimetre, one for all three planes: the largest at which they fit side by side.

    Args:
        extent: the scan's size (3,) in mm along the canonical axes.
    """
    low, high = 0.0, 4096.0 / float(extent.max())
    for _ in range(40):
        middle = (low + high) / 2
        if sum(_cells(extent * middle)) + 2 * _GAP <= WIDTH - 2 * MARGIN and max(extent[1:]) * middle <= (
            _MAX_PLANE_HEIGHT
        ):
            low = middle
        else:
            high = middle
    return low


def _cells(pixels: NDArray[np.float64]) -> list[int]:
    """Width in pixels that each plane takes, gutters included, for a scan of `pixels` (3,) along the canonical axes."""
    return [max(math.ceil(pixels[column]) + 2 * _GUTTER, _MIN_CELL) for _, (column, _), _ in _PLANES]


def picture_plane(
    image: NDArray[np.floating],
    labels: NDArray[np.integer],
    pixels: tuple[int, int],
    window: tuple[float, float],
    colours: Mapping[int, Colour],
) -> Image.Image:
    """One plane as a picture.

    Args:
        image: slice (columns, rows) of the canonical scan.
        labels: slice (columns, rows) of the canonical label map.
        pixels: width and height of the picture.
        window: grey values shown as black and white.
        colours: colour of each label.
    """
    low, high = window
    grey = np.clip((np.asarray(image[::-1, ::-1].T, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    smooth = Image.fromarray(grey).resize(pixels, Image.Resampling.BICUBIC)
    canvas = np.repeat(np.clip(np.asarray(smooth), 0.0, 1.0)[:, :, None] * 255.0, 3, axis=2)

    flipped = labels[::-1, ::-1].T
    rows = ((np.arange(pixels[1]) + 0.5) * flipped.shape[0] / pixels[1]).astype(np.intp)
    columns = ((np.arange(pixels[0]) + 0.5) * flipped.shape[1] / pixels[0]).astype(np.intp)
    enlarged = np.asarray(flipped[np.ix_(rows, columns)])
    contour = _contour(enlarged)
    for value in np.unique(enlarged):
        if value == 0:
            continue
        colour = np.array(colours[int(value)], dtype=np.float32)
        inside = enlarged == value
        canvas[inside] = (1 - _FILL) * canvas[inside] + _FILL * colour
        canvas[inside & contour] = colour
    return Image.fromarray(np.round(canvas).astype(np.uint8))


def _draw_caliper(plane: Image.Image, ends: Sequence[NDArray[np.float64]], shape: tuple[int, int]) -> None:
    """Draw a length on a plane's picture; ends (column, row) in voxels of a canonical slice of this shape."""
    width, height = plane.width / shape[0], plane.height / shape[1]
    points = [((shape[0] - 0.5 - x) * width, (shape[1] - 0.5 - y) * height) for x, y in ends]
    draw = ImageDraw.Draw(plane)
    for colour, thickness in (((0, 0, 0), 4), (_MARK, 2)):
        draw.line([points[0], points[1]], colour, thickness)


def _contour(labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Pixels (rows, columns) within two pixels of another label."""
    edge = np.zeros(labels.shape, dtype=bool)
    for step in (1, 2):
        for axis in (0, 1):
            first, second = [slice(None)] * 2, [slice(None)] * 2
            first[axis], second[axis] = slice(step, None), slice(None, -step)
            differs = labels[tuple(first)] != labels[tuple(second)]
            edge[tuple(first)] |= differs
            edge[tuple(second)] |= differs
    return edge


def _compose(
    planes: Sequence[Image.Image],
    entries: Sequence[_Entry],
    centre: Sequence[int],
    shape: Sequence[int],
    scale: float,
    title: str,
    lines: Sequence[str],
    strip: Image.Image | None,
    footer: str,
) -> bytes:
    """Put title, planes, strip, legend and footer on one canvas; returns the PNG's bytes."""
    planes_height = max(plane.height for plane in planes) + 2 * _GUTTER + _CAPTION
    row_height = planes_height + (strip.height + _GAP if strip is not None else 0)
    legend, note = _legend(entries)
    legend_height = _LEGEND_ROW * max((len(column) for column in legend), default=0) + (_LEGEND_ROW + 6 if note else 0)
    top = MARGIN + 44 + 26 * len(lines) + 18
    height = top + row_height + 20 + legend_height + 28 + 30 + MARGIN // 2
    canvas = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN + 24), fit(title, font(30), WIDTH - 2 * MARGIN), TEXT, font(30), anchor="ls")
    for number, line in enumerate(lines):
        place = (MARGIN, MARGIN + 58 + 26 * number)
        draw.text(place, fit(line, font(17), WIDTH - 2 * MARGIN), MUTED, font(17), anchor="ls")

    widths = [max(plane.width + 2 * _GUTTER, _MIN_CELL) for plane in planes]
    left = (WIDTH - sum(widths) - 2 * _GAP) // 2
    for plane, width, (name, (column, row), marks) in zip(planes, widths, _PLANES, strict=True):
        through = 3 - column - row
        _draw_plane(canvas, plane, (left, top, width), name, f"{centre[through] + 1} / {shape[through]}", marks)
        left += width + _GAP

    if strip is not None:
        canvas.paste(strip, (MARGIN, top + planes_height + _GAP))
    below = top + row_height + 20
    _draw_legend(draw, legend, below)
    if note:
        place = (MARGIN, below + legend_height - _LEGEND_ROW // 2)
        draw.text(place, note, MUTED if legend else _MARK, font(17), anchor="lm")
    foot = height - MARGIN // 2 - 18
    draw.line((MARGIN, foot - 22, WIDTH - MARGIN, foot - 22), PLANE_FRAME)
    draw.text((MARGIN, foot), fit(footer, font(15), 0.7 * WIDTH), MUTED, font(15), anchor="lm")
    _draw_scale_bar(draw, scale, foot)
    file = io.BytesIO()
    canvas.save(file, format="PNG", compress_level=6)
    return file.getvalue()


def _draw_plane(
    canvas: Image.Image, plane: Image.Image, cell: tuple[int, int, int], name: str, slice_text: str, marks: str
) -> None:
    """Draw a plane at the top of its cell (left, top, width), its caption and its orientation marks."""
    draw = ImageDraw.Draw(canvas)
    left, top, width = cell
    x = left + (width - plane.width) // 2
    y = top + _CAPTION + _GUTTER
    canvas.paste(plane, (x, y))
    draw.rectangle((x - 1, y - 1, x + plane.width, y + plane.height), outline=PLANE_FRAME)
    label = font(18)
    draw.text((left + _GUTTER, top + 16), name, TEXT, label, anchor="ls")
    draw.text((left + width - _GUTTER, top + 16), slice_text, MUTED, font(16), anchor="rs")
    middle_x, middle_y = x + plane.width // 2, y + plane.height // 2
    half = _GUTTER // 2
    for mark, place in zip(
        marks,
        (
            (x - half, middle_y),
            (x + plane.width + half, middle_y),
            (middle_x, y - half),
            (middle_x, y + plane.height + half),
        ),
        strict=True,
    ):
        draw.text(place, mark, _MARK, label, anchor="mm")


def _legend(entries: Sequence[_Entry]) -> tuple[list[list[_Entry | str]], str]:
    """Columns of the legend, and a line below it.

    Structures stand in the table's order; when there is no room for all, the largest ones stand there by size.
    """
    found = [entry for entry in entries if entry.volume_ml > 0]
    absent = [_printable(entry.name) for entry in entries if entry.volume_ml == 0]
    if not found:
        return [], "no structure found"
    columns = _legend_columns(found)
    room = columns * _LEGEND_ROWS
    shown: list[_Entry | str] = list(found)
    if len(found) > room:
        by_size = sorted(found, key=lambda entry: -entry.volume_ml)
        shown = [*by_size[: room - 1], f"+{len(found) - room + 1} more"]
    rows = math.ceil(len(shown) / columns)
    note = ""
    if absent:
        listed = ", ".join(absent) if len(absent) <= _LISTED_ABSENT else f"{len(absent)} of {len(entries)} structures"
        note = fit(f"not found: {listed}", font(17), WIDTH - 2 * MARGIN)
    return [shown[start : start + rows] for start in range(0, len(shown), rows)], note


def _legend_columns(entries: Sequence[_Entry]) -> int:
    """Number of columns: few and wide for few structures, at most four."""
    return max(1, min(4, len(entries), (WIDTH - 2 * MARGIN) // _legend_width(entries)))


def _legend_width(entries: Sequence[_Entry]) -> int:
    """Width in pixels of a column that holds the longest name and volume, up to half the picture."""
    text = font(17)
    widest = max(
        text.getlength(_printable(entry.name)) + text.getlength(_millilitres(entry.volume_ml)) for entry in entries
    )
    return min(math.ceil(widest) + 28 + 32 + 48, (WIDTH - 2 * MARGIN) // 2)


def _draw_legend(draw: ImageDraw.ImageDraw, legend: Sequence[Sequence[_Entry | str]], top: int) -> None:
    """Draw the legend's columns: swatch, name, volume."""
    if not legend:
        return
    text = font(17)
    shown = [entry for column in legend for entry in column if isinstance(entry, _Entry)]
    width = min(_legend_width(shown), (WIDTH - 2 * MARGIN) // len(legend))
    for number, column in enumerate(legend):
        left = MARGIN + number * width
        for row, entry in enumerate(column):
            middle = top + row * _LEGEND_ROW + _LEGEND_ROW // 2
            if isinstance(entry, str):
                draw.text((left + 28, middle), entry, MUTED, text, anchor="lm")
                continue
            draw.rounded_rectangle((left, middle - 8, left + 16, middle + 8), 3, entry.colour)
            volume = _millilitres(entry.volume_ml)
            room = width - 28 - 32 - 48 - text.getlength(volume)
            name = fit(entry.name, text, room)
            draw.text((left + 28, middle), name, TEXT, text, anchor="lm")
            draw.text((left + width - 48, middle), volume, MUTED, text, anchor="rm")


def _draw_scale_bar(draw: ImageDraw.ImageDraw, scale: float, middle: int) -> None:
    """Draw a bar of a round length in millimetres at the right end of the footer."""
    length = max((mm for mm in (1, 2, 5, 10, 20, 50, 100, 200) if mm * scale <= 180), default=1)
    right = WIDTH - MARGIN
    left = right - round(length * scale)
    draw.line((left, middle, right, middle), TEXT, 2)
    for x in (left, right):
        draw.line((x, middle - 5, x, middle + 5), TEXT, 2)
    draw.text((left - 12, middle), f"{length} mm", MUTED, font(15), anchor="rm")


def _millilitres(volume: float) -> str:
    """A volume with three significant digits or so."""
    if volume < 0.01:
        return "< 0.01 ml"
    return f"{volume:.2f} ml" if volume < 10 else f"{volume:.1f} ml" if volume < 100 else f"{volume:.0f} ml"


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same on every machine."""
    return ImageFont.load_default(size)


def fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text on one line, cut with an ellipsis when it is wider than `width` pixels."""
    text = _printable(text)
    if font.getlength(text) <= width:
        return text
    fits = bisect_left(range(len(text)), width, key=lambda end: font.getlength(text[: end + 1] + "..."))
    return text[:fits].rstrip() + "..."


def _printable(text: str) -> str:
    """The text on one line in the letters that Pillow's font has: accents go, unknown letters become ``?``."""
    plain = unicodedata.normalize("NFKD", " ".join(text.split()).translate(_SPELLED))
    letters = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return letters.encode("ascii", "replace").decode("ascii")
