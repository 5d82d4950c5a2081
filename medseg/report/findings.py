"""The diagnosis of a patient in lines of text, and as a strip for the preview: every phase, and the classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from medseg.io.geometry import AxisOrder, spacing
from medseg.report.palette import Colour
from medseg.report.preview import (
    BACKGROUND,
    MUTED,
    PLANE_FRAME,
    TEXT,
    WINDOW_HU,
    Caliper,
    Focus,
    fit,
    font,
    picture_plane,
)

if TYPE_CHECKING:
    from medseg.inference.phases import PhaseVolume
    from medseg.inference.record import DiagnosisRecord, FindingRecord, Record

_NEXT = 3  # classes named beside the most probable one
_LISTED = 4  # findings that have a line of their own
_HEIGHT = 250  # of a phase's picture at most
_GAP = 16
_CAPTION = 26
_BARS = 470  # width of the bars' part
_WITH: Colour = (86, 180, 233)
_WITHOUT: Colour = (110, 118, 130)


def diagnosis_lines(record: Record) -> list[str]:
    """What the record says of the patient, a line for the class, one for what was used and one for each lesion."""
    found = record.diagnosis
    if found is None:
        return []
    lines = [
        f"Class {found.named}, {found.classes[found.named]}: {_ranked(found.probabilities)}",
        f"Without age and sex: {_ranked(found.probabilities_without_metadata)}",
        _used(found),
    ]
    for number, finding in enumerate(found.findings[:_LISTED], start=1):
        lines.append(f"Lesion {number}: {_measured(finding)}")
    if len(found.findings) > _LISTED:
        lines.append(f"{len(found.findings) - _LISTED} more lesions are in the record")
    return lines


def focus_on(record: DiagnosisRecord, volume: PhaseVolume) -> Focus | None:
    """The slices of the largest lesion's diameters, with the diameters; None without a lesion."""
    if not record.findings:
        return None
    order = AxisOrder.to_canonical(volume.affine)
    centre, calipers = [0, 0, 0], []
    for diameter in record.findings[0].diameters:
        through = {"axial": 2, "coronal": 1, "sagittal": 0}[diameter.plane]
        source = order.axes[through]
        index = diameter.slice_index
        centre[through] = volume.shape[source] - 1 - index if order.flips[through] else index
        calipers.append(Caliper(diameter.plane, diameter.longest_ends_mm))
        calipers.append(Caliper(diameter.plane, diameter.short_ends_mm))
    return Focus((centre[0], centre[1], centre[2]), tuple(calipers))


def diagnosis_strip(record: DiagnosisRecord, volume: PhaseVolume, width: int) -> Image.Image:
    """The axial slice of the largest lesion in each phase, and a bar for each class.

    Args:
        record: the diagnosis.
        volume: the phases.
        width: of the picture in pixels.
    """
    order, names = AxisOrder.to_canonical(volume.affine), volume.names
    size = spacing(order.affine(volume.affine, volume.shape))
    images = order.apply(volume.data)
    focus = focus_on(record, volume)
    level = focus.centre[2] if focus else images.shape[3] // 2
    room = (width - _BARS - _GAP * len(names)) // len(names)
    extent = np.array(images.shape[1:3]) * size[:2]
    scale = min(room / extent[0], _HEIGHT / extent[1])
    pixels = max(1, round(extent[0] * scale)), max(1, round(extent[1] * scale))
    rows = 22 * len(record.classes)
    strip = Image.new("RGB", (width, _CAPTION + max(pixels[1] + 2, rows)), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for number, (name, phase) in enumerate(zip(names, volume.phases, strict=True)):
        left = number * (room + _GAP)
        if phase is None:
            draw.text((left, 17), f"{name}: absent", MUTED, font(16), anchor="ls")
            draw.rectangle((left, _CAPTION, left + pixels[0], _CAPTION + pixels[1]), outline=PLANE_FRAME)
            continue
        caption = name + (", reference" if number == volume.reference else "")
        if phase.motion is not None:
            caption += f", moved {phase.motion.distance_mm:.1f} mm"
        draw.text((left, 17), fit(caption, font(16), room), TEXT, font(16), anchor="ls")
        image = images[number, :, :, level]
        strip.paste(picture_plane(image, np.zeros(image.shape, np.uint8), pixels, WINDOW_HU, {}), (left, _CAPTION))
    _draw_bars(draw, record, width - _BARS)
    return strip


def _draw_bars(draw: ImageDraw.ImageDraw, record: DiagnosisRecord, left: int) -> None:
    """Two bars for each class: with all that is known, and without age and sex."""
    draw.text((left, 17), "probability", TEXT, font(16), anchor="ls")
    draw.text((left + 100, 17), "with age and sex", _WITH, font(15), anchor="ls")
    draw.text((left + 240, 17), "without", _WITHOUT, font(15), anchor="ls")
    start, full = left + 75, _BARS - 75 - 55
    for number, code in enumerate(record.classes):
        top = _CAPTION + 22 * number
        draw.text((left, top + 9), fit(code, font(15), 70), TEXT, font(15), anchor="lm")
        for values, colour, low, high in (
            (record.probabilities, _WITH, 2, 11),
            (record.probabilities_without_metadata, _WITHOUT, 12, 17),
        ):
            draw.rectangle((start, top + low, start + max(1, round(full * values[code])), top + high), fill=colour)
        value = f"{record.probabilities[code]:.2f}"
        draw.text((left + _BARS, top + 9), value, TEXT if code == record.named else MUTED, font(15), anchor="rm")


def _ranked(probabilities: dict[str, float]) -> str:
    best = sorted(probabilities.items(), key=lambda item: -item[1])[: 1 + _NEXT]
    return ", ".join(f"{code} {value:.2f}" for code, value in best)


def _used(found: DiagnosisRecord) -> str:
    """Phases and what was missing."""
    moved = [
        f"{phase.name} moved by {np.linalg.norm(phase.shift_mm):.1f} mm and {phase.rotation_degrees:.1f} degrees"
        for phase in found.phases
        if phase.shift_mm is not None
    ]
    names = ", ".join(phase.name for phase in found.phases)
    text = f"Phases {names}" + (f" ({'; '.join(moved)})" if moved else "")
    return f"{text}; missing: {', '.join(found.missing) or 'nothing'}"


def _measured(finding: FindingRecord) -> str:
    """Type, volume, place, diameters and contrast of a lesion."""
    sizes = ", ".join(f"{one.plane} {one.longest_mm:.0f} x {one.short_mm:.0f}" for one in finding.diameters)
    text = f"{finding.type}, {finding.volume_ml:.1f} ml, {finding.part}; {sizes} mm"
    if finding.contrast_hu:
        against = ", ".join(f"{name} {value:+.0f}" for name, value in finding.contrast_hu.items())
        text += f"; against the organ {against} HU"
    return text
