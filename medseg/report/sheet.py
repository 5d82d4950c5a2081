"""A sheet of cases: each a row of its phases and its labels, for a look over a data set."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from medseg.io.geometry import AxisOrder, spacing
from medseg.report.palette import label_colours
from medseg.report.preview import BACKGROUND, MUTED, TEXT, fit, font, picture_plane

_PANEL = 300  # width in pixels
_GAP = 8
_TOP = 92
_CAPTION = 40


@dataclass(frozen=True)
class Row:
    """One case of a sheet.

    Attributes:
        images: (C, X, Y, Z), one channel for each phase.
        labels: (X, Y, Z).
        affine: voxel index to RAS mm, (4, 4).
        caption: a line above the pictures.
    """

    images: NDArray[np.number]
    labels: NDArray[np.integer]
    affine: NDArray[np.float64]
    caption: str


def render_sheet(
    rows: Sequence[Row],
    *,
    columns: Sequence[str],
    names: Mapping[int, str],
    title: str,
    line: str,
    window: tuple[float, float] = (-110.0, 240.0),
) -> bytes:
    """Draw one row for each case: axial pictures of all phases through its rarest labels, then the labels.

    Args:
        rows: the cases, at least one.
        columns: name of each phase.
        names: name of each label value.
        title: headline.
        line: a smaller line below it.
        window: values shown as black and white.

    Returns:
        A PNG file's bytes.
    """
    values = sorted(value for value in names if value)
    colours = dict(zip(values, label_colours(len(values)), strict=True))
    pictures = [_pictures(row, window, colours) for row in rows]
    width = (len(columns) + 1) * (_PANEL + _GAP) + 3 * _GAP
    height = _TOP + sum(row[0].height + _CAPTION for row in pictures) + _GAP
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((2 * _GAP, 34), fit(title, font(26), width - 4 * _GAP), TEXT, font(26), anchor="ls")
    draw.text((2 * _GAP, 60), fit(line, font(16), width - 4 * _GAP), MUTED, font(16), anchor="ls")
    for number, name in enumerate((*columns, "labels")):
        draw.text((2 * _GAP + number * (_PANEL + _GAP), _TOP - 6), name, MUTED, font(16), anchor="ls")
    top = _TOP
    for row, panels in zip(rows, pictures, strict=True):
        text = fit(row.caption, font(16), width - 4 * _GAP)
        draw.text((2 * _GAP, top + 26), text, TEXT, font(16), anchor="ls")
        for number, panel in enumerate(panels):
            canvas.paste(panel, (2 * _GAP + number * (_PANEL + _GAP), top + _CAPTION - 6))
        top += panels[0].height + _CAPTION
    file = io.BytesIO()
    canvas.save(file, format="PNG")
    return file.getvalue()


def _pictures(row: Row, window: tuple[float, float], colours: Mapping[int, tuple[int, int, int]]) -> list[Image.Image]:
    """The panels of a row."""
    order = AxisOrder.to_canonical(row.affine)
    size = spacing(order.affine(row.affine, row.labels.shape))
    labels = order.apply(row.labels)
    found = labels == labels.max() if labels.any() else np.ones(labels.shape, bool)
    level = int(np.argmax(found.sum(axis=(0, 1))))
    pixels = (_PANEL, round(_PANEL * labels.shape[1] * size[1] / (labels.shape[0] * size[0])))
    empty = np.zeros_like(labels[..., level])
    phases = [order.apply(image)[..., level] for image in row.images]
    panels = [picture_plane(image, empty, pixels, window, colours) for image in phases]
    return [*panels, picture_plane(phases[min(1, len(phases) - 1)], labels[..., level], pixels, window, colours)]
