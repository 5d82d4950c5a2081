"""Colours of labels: a few that colour-blind readers tell apart, then as many as are needed."""

from __future__ import annotations

import colorsys

Colour = tuple[int, int, int]

# Okabe and Ito's palette, ordered so that neighbours differ most, with blue and green lightened for a dark background.
_FEW: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 184, 140),
    (213, 94, 0),
    (204, 121, 167),
    (240, 228, 66),
    (70, 130, 230),
)
_GOLDEN_ANGLE = 0.381966
_LIGHTNESS = (0.62, 0.78, 0.5)


def label_colours(count: int) -> list[Colour]:
    """Colours (red, green, blue), 0 to 255, of `count` labels.

    The first ones do not depend on `count`, so a label keeps its colour from case to case. Beyond the seven that
    colour-blind readers tell apart, hues follow the golden angle and the lightness changes from one to the next.
    """
    colours = list(_FEW[:count])
    for index in range(count - len(colours)):
        red, green, blue = colorsys.hls_to_rgb(
            (0.06 + index * _GOLDEN_ANGLE) % 1.0, _LIGHTNESS[index % len(_LIGHTNESS)], 0.72
        )
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colours
