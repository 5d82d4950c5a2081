"""A confusion matrix as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from medseg.report.preview import BACKGROUND, MARGIN, MUTED, PLANE_FRAME, TEXT, fit, font

_CELL = 78
_NAMES = 130
_TOP = 150
_FULL = np.array((86, 180, 233))
_RIGHT = np.array((0, 184, 140))


def render_confusion(matrix: NDArray[np.integer], codes: Sequence[str], *, title: str, lines: Sequence[str]) -> bytes:
    """Draw patients by true class (rows) and named class (columns), the darker the fewer of the row.

    Args:
        matrix: (classes, classes) patients.
        codes: of the classes.
        title: headline.
        lines: smaller lines at the bottom.

    Returns:
        A PNG file's bytes.
    """
    count = len(codes)
    left, top = MARGIN + _NAMES, _TOP
    width = left + count * _CELL + _CELL + MARGIN
    height = top + count * _CELL + 30 + 26 * len(lines) + MARGIN
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text(
        (MARGIN, MARGIN + 24),
        fit(f"Confusion matrix: {title}", font(28), width - 2 * MARGIN),
        TEXT,
        font(28),
        anchor="ls",
    )
    draw.text((left + count * _CELL // 2, top - 52), "named class", MUTED, font(17), anchor="ms")
    draw.text((MARGIN, top - 14), "true class", MUTED, font(17), anchor="ls")
    draw.text((left + count * _CELL + _CELL // 2, top - 14), "found", MUTED, font(17), anchor="ms")
    totals = matrix.sum(axis=1)
    background = np.array(BACKGROUND)
    for row, code in enumerate(codes):
        y = top + row * _CELL
        draw.text((MARGIN, y + _CELL // 2), fit(code, font(19), _NAMES - 10), TEXT, font(19), anchor="lm")
        name = fit(code, font(17), _CELL - 6)
        draw.text((left + row * _CELL + _CELL // 2, top - 14), name, TEXT, font(17), anchor="ms")
        for column in range(count):
            x = left + column * _CELL
            share = matrix[row, column] / totals[row] if totals[row] else 0.0
            full = _RIGHT if row == column else _FULL
            strength = 0.12 + 0.88 * share if share else 0.0
            red, green, blue = np.rint(background + strength * (full - background)).astype(int).tolist()
            draw.rectangle((x + 1, y + 1, x + _CELL - 2, y + _CELL - 2), fill=(red, green, blue), outline=PLANE_FRAME)
            if matrix[row, column]:
                shade = (16, 19, 24) if share > 0.5 else TEXT
                middle = x + _CELL // 2, y + _CELL // 2
                draw.text(middle, str(int(matrix[row, column])), shade, font(20), anchor="mm")
        found = f"{100 * matrix[row, row] / totals[row]:.0f} %" if totals[row] else "-"
        draw.text((left + count * _CELL + _CELL // 2, y + _CELL // 2), found, TEXT, font(19), anchor="mm")
    below = top + count * _CELL + 30
    for number, line in enumerate(lines):
        place = (MARGIN, below + 26 * number)
        draw.text(place, fit(line, font(17), width - 2 * MARGIN), MUTED, font(17), anchor="ls")
    file = io.BytesIO()
    canvas.save(file, format="PNG")
    return file.getvalue()
