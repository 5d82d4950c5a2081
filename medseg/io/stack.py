"""Slices of a DICOM series become a grid: order, spacing and affine from positions and orientations alone.

SliceThickness, SliceLocation, SpacingBetweenSlices, InstanceNumber and file names decide nothing: they are often wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError
from medseg.io import geometry
from medseg.io.pixels import PixelError, pixel_digest
from medseg.io.series import TRAITS, Frame, public_name

UNEVEN = 0.01
"""Share of the step by which steps may differ."""

UNEVEN_MM = 0.02
"""Steps that differ by less are equal: scanners round positions."""

OFF_LINE = 0.1
"""Share of the step by which a slice may lie beside the straight line through the first and the last."""

TILT_DEGREES = 0.1
"""Angle between the step from slice to slice and the slices' normal from which on a series counts as sheared."""

_ORIENTATION = 1e-4
_SPLIT_SHARE = 0.8
_SAME_PLACE_MM = 1e-3
_PLACES_NAMED = 3
_AGAIN = "export the whole series again"


@dataclass(frozen=True)
class Stack:
    """One or more volumes on one grid.

    Attributes:
        volumes: the frames of each volume, along the third axis; more than one for a 4D series.
        trait: what tells the volumes apart ("EchoTime"); "" for one volume.
        shape: (X, Y, Z): columns, rows, slices.
        affine: to RAS mm; sheared when the slices are.
        tilt_degrees: between the step from slice to slice and the slices' normal.
        warnings: what was left out.
    """

    volumes: tuple[tuple[Frame, ...], ...]
    trait: str
    shape: tuple[int, int, int]
    affine: geometry.Affine
    tilt_degrees: float
    warnings: tuple[str, ...]


def stack(frames: Sequence[Frame], root: Path, shown: Path) -> Stack:
    """Order the frames of a series and find their grid.

    Args:
        frames: of one series.
        root: the folder or file that was read.
        shown: what messages call it.

    Raises:
        InputError: a position or orientation is missing; frames differ in size, orientation, pixel spacing or frame
            of reference; slices are missing, doubled or unevenly spaced.
    """
    _check_complete(frames, root, shown)
    kept, warnings = _one_geometry(frames, shown)
    directions = _directions(kept[0], shown)
    normal = np.cross(directions[0], directions[1])
    places = _places(kept, normal)
    trait = ""
    if any(len(place) > 1 for place in places):
        volumes, trait = _separated(places)
        if not trait:
            try:
                places, dropped = _without_copies(places)
            except (OSError, PixelError) as err:
                raise InputError(shown, f"images lie at one place, and one of them: {err}", _AGAIN) from err
            _check_single(places, normal, shown)
            warnings.append(f"{dropped} image{'s are copies' if dropped > 1 else ' is a copy'} of another and left out")
            volumes = (tuple(place[0] for place in places),)
    else:
        volumes = (tuple(place[0] for place in places),)
    if len(places) < 2:
        raise InputError(shown, "all images lie at one place; medseg reads volumes", _AGAIN)
    placed = _positions(volumes[0])
    for other in volumes[1:]:
        if np.abs(_positions(other) - placed).max() > UNEVEN_MM:
            raise InputError(shown, f"volumes of different {trait} lie at different places", "export them one by one")
    _check_steps(placed @ normal, shown)
    step = (placed[-1] - placed[0]) / (len(placed) - 1)
    length = float(np.linalg.norm(step))
    line = placed[0] + np.arange(len(placed))[:, None] * step
    off = float(np.linalg.norm(placed - line, axis=1).max())
    if off > max(OFF_LINE * length, UNEVEN_MM):
        raise InputError(shown, f"its slices do not lie on a straight line, up to {off:.3g} mm beside it", _AGAIN)
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / length, -1.0, 1.0))))
    spacing = kept[0].pixel_spacing or (0.0, 0.0)
    if min(spacing) <= 0:
        raise InputError(shown, "PixelSpacing (0028,0030) is not positive", _AGAIN)
    stated = max(abs(frame.tilt_degrees) for frame in kept)
    if stated > TILT_DEGREES >= tilt:
        warnings.append(f"a gantry tilt of {stated:.1f} degrees is stated, but the slices are not sheared")
    rows, columns = kept[0].shape
    return Stack(
        volumes=volumes,
        trait=trait,
        shape=(columns, rows, len(placed)),
        affine=geometry.from_lps(
            np.column_stack([*directions, step / length]), (spacing[1], spacing[0], length), placed[0]
        ),
        tilt_degrees=tilt,
        warnings=tuple(warnings),
    )


def _check_complete(frames: Sequence[Frame], root: Path, shown: Path) -> None:
    """Refuse frames that do not say where they lie."""
    for frame in frames:
        for value, name in (
            (frame.position, "ImagePositionPatient (0020,0032)"),
            (frame.orientation, "ImageOrientationPatient (0020,0037)"),
            (frame.pixel_spacing, "PixelSpacing (0028,0030)"),
        ):
            if value is None:
                raise InputError(shown, f"{public_name(frame.path, root, shown)} has no usable {name}", _AGAIN)


def _one_geometry(frames: Sequence[Frame], shown: Path) -> tuple[list[Frame], list[str]]:
    """The frames of one size, orientation, pixel spacing and space; a few others are left out with a warning."""
    groups: list[list[Frame]] = []
    for frame in frames:
        fitting = next((group for group in groups if _same_plane(group[0], frame)), None)
        if fitting is None:
            groups.append([frame])
        else:
            fitting.append(frame)
    groups.sort(key=len, reverse=True)
    if len(groups) == 1:
        return groups[0], []
    rest = len(frames) - len(groups[0])
    if len(groups[0]) < _SPLIT_SHARE * len(frames):
        counts = ", ".join(
            f"{len(group)} of {group[0].shape[1]} x {group[0].shape[0]}" for group in groups[:_PLACES_NAMED]
        )
        problem = f"images of {len(groups)} sizes, orientations, spacings or frames of reference in one series"
        raise InputError(shown, f"{problem} ({counts}{', ...' if len(groups) > _PLACES_NAMED else ''})", _AGAIN)
    return groups[0], [f"left out: {rest} image{'s' if rest > 1 else ''} of another size, orientation or spacing"]


def _same_plane(one: Frame, other: Frame) -> bool:
    return (
        one.shape == other.shape
        and one.frame_of_reference == other.frame_of_reference
        and np.allclose(one.orientation or (), other.orientation or (), rtol=0, atol=_ORIENTATION)
        and np.allclose(one.pixel_spacing or (), other.pixel_spacing or (), rtol=_ORIENTATION, atol=0)
    )


def _directions(frame: Frame, shown: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors (3,) of growing column and row index, LPS."""
    both = np.array(frame.orientation, dtype=np.float64).reshape(2, 3)
    lengths = np.linalg.norm(both, axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(both[0] @ both[1]) > 0.01:
        raise InputError(shown, "ImageOrientationPatient (0020,0037) is no pair of right-angled directions", _AGAIN)
    row, column = both / lengths[:, None]
    return row, column


def _positions(frames: Sequence[Frame]) -> NDArray[np.float64]:
    """Centres of the first pixels (n, 3), LPS mm."""
    return np.array([frame.position for frame in frames], dtype=np.float64)


def _places(frames: Sequence[Frame], normal: NDArray[np.float64]) -> list[list[Frame]]:
    """Frames along the normal; those at one place together."""
    along = _positions(frames) @ normal
    order = np.argsort(along, kind="stable")
    steps = np.diff(along[order])
    real = steps[steps > _SAME_PLACE_MM]
    same = max(_SAME_PLACE_MM, UNEVEN * float(np.median(real))) if real.size else np.inf
    places = [[frames[order[0]]]]
    for index, step in zip(order[1:], steps, strict=True):
        if step > same:
            places.append([])
        places[-1].append(frames[index])
    return places


def _separated(places: Sequence[Sequence[Frame]]) -> tuple[tuple[tuple[Frame, ...], ...], str]:
    """Volumes of a 4D series and the element that tells them apart; nothing when no single element does."""
    count = len(places[0])
    if any(len(place) != count for place in places):
        return (), ""
    for trait in TRAITS:
        by_value = [{frame.traits.get(trait, ""): frame for frame in place} for place in places]
        values = by_value[0].keys()
        if len(values) == count and all(one.keys() == values for one in by_value):
            ordered = sorted(values, key=_as_number)
            return tuple(tuple(one[value] for one in by_value) for value in ordered), trait
    return (), ""


def _as_number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return 0.0, text


def _without_copies(places: Sequence[Sequence[Frame]]) -> tuple[list[list[Frame]], int]:
    """Each place without images that repeat another's identifier or pixels; how many those are."""
    result, dropped = [], 0
    for place in places:
        kept: list[Frame] = []
        for frame in place:
            copy = any(
                (frame.uid and frame.uid == other.uid and frame.number == other.number)
                or pixel_digest(frame.path, frame.number) == pixel_digest(other.path, other.number)
                for other in kept
            )
            dropped += copy
            if not copy:
                kept.append(frame)
        result.append(kept)
    return result, dropped


def _check_single(places: Sequence[Sequence[Frame]], normal: NDArray[np.float64], shown: Path) -> None:
    """Refuse places with several images."""
    doubled = [place for place in places if len(place) > 1]
    if not doubled:
        return
    one, other = doubled[0][:2]
    differing = [name for name in TRAITS if one.traits.get(name) != other.traits.get(name)]
    where = float(_positions([one])[0] @ normal)
    raise InputError(
        shown,
        f"{len(doubled)} of {len(places)} places hold several images, the first at {where:.2f} mm along the normal"
        + (f"; they differ in {', '.join(differing[:_PLACES_NAMED])}" if differing else ""),
        "export each phase, echo or reconstruction as a series of its own",
    )


def _check_steps(along: NDArray[np.float64], shown: Path) -> None:
    """Refuse gaps and uneven steps.

    Args:
        along: places along the normal in mm, ascending.
        shown: what messages call the series.
    """
    steps = np.diff(along)
    median = float(np.median(steps))
    if np.abs(steps - median).max() <= max(UNEVEN * median, UNEVEN_MM):
        return
    smallest = float(steps.min())
    multiples = steps / smallest
    if np.abs(multiples - np.round(multiples)).max() <= max(UNEVEN, UNEVEN_MM / smallest):
        wide = [(low, high) for low, high in pairwise(along) if high - low > 1.5 * smallest]
        missing = int(np.round(multiples).sum()) - len(steps)
        gaps = ", ".join(f"{low:.2f} and {high:.2f}" for low, high in wide[:_PLACES_NAMED])
        more = ", ..." if len(wide) > _PLACES_NAMED else ""
        what = f"{missing} slice{' is' if missing == 1 else 's are'} missing"
        raise InputError(
            shown, f"{what}, between {gaps}{more} mm along the normal (step {smallest:.3g} mm)", "send the series again"
        )
    raise InputError(
        shown,
        f"slices are unevenly spaced, steps from {smallest:.3g} over {median:.3g} (median) to {steps.max():.3g} mm",
        "export a reconstruction with even steps",
    )
