"""Several contrast phases of one patient as one scan: which file is which phase, and all of them on one grid."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medseg.bundles.spec import BundleSpec
from medseg.errors import InputError, UsageError
from medseg.inference.register import AIR_HU, Rigid, register, resample_to
from medseg.inference.suitability import unsuitable
from medseg.io import geometry
from medseg.io.discreet import discreet
from medseg.io.files import case_name
from medseg.io.patients import PATIENT_TAGS, PatientFacts, told_by_dicom
from medseg.io.read import GRID_TOLERANCE, read_volume
from medseg.io.volume import Volume

log = logging.getLogger(__name__)

Header = Mapping[str, str]
"""Elements of a DICOM header by their names, empty of another format."""

How = Literal["named", "number", "name", "description", "order", "assumed"]
"""How a file's phase is known: by --phase, a number such as _0001, a word in its name or in the description of a DICOM
series, its place, or by assumption."""

_REFERENCES = ("a", "v", "nc")
_WORDS = {
    "nc": ("nc", "plain", "unenh", "unenhanced", "native", "nativ", "noncon", "noncontrast", "precontrast"),
    "a": ("art", "arterial", "panc", "pancreatic"),
    "v": ("ven", "venous", "portal", "portovenous", "pv"),
}
_LEAST_SHARE = 0.5  # of the reference's field of view, in every other phase
_WHOLE = 0.99
_BODY_HU = -300.0
_CENTRES_MM = 15.0
_FAR_MM, _FAR_DEGREES = 40.0, 15.0  # motions beyond these are no breathing
_PROBES = 24  # along each axis of the reference


@dataclass(frozen=True)
class Phase:
    """One phase that is there.

    Attributes:
        file: its file's name, without folders.
        how: how its phase is known.
        resampled: it came on another grid than the reference's, or was registered.
        covered: share of the reference's field of view that it covers.
        motion: found by registration; None where none was asked for.
    """

    file: str
    how: How
    resampled: bool = False
    covered: float = 1.0
    motion: Rigid | None = None


@dataclass(frozen=True)
class PhaseVolume(Volume):
    """A scan with a channel for each phase of a bundle; what an absent one holds means nothing.

    Attributes:
        names: of the channels.
        phases: of each channel, None where it is absent.
        reference: channel on whose grid all lie.
        unsuited: what is not as the bundle was trained on, one sentence each.
        patient: what the headers of DICOM phases say of age and sex.
    """

    names: tuple[str, ...] = ()
    phases: tuple[Phase | None, ...] = ()
    reference: int = 0
    unsuited: tuple[str, ...] = ()
    patient: PatientFacts = field(default_factory=PatientFacts)

    @property
    def present(self) -> tuple[bool, ...]:
        """Whether each phase is there."""
        return tuple(phase is not None for phase in self.phases)


def read_phases(
    scan: str | Path | Sequence[str | Path],
    spec: BundleSpec,
    *,
    phases: Sequence[str] = (),
    align: bool = False,
    volume_index: int | None = None,
    series: str | None = None,
    fix_gantry_tilt: bool = False,
) -> PhaseVolume:
    """Read the phases that there are onto the grid of the first of arterial, venous and unenhanced that is there.

    Args:
        scan: one file that holds phases along its fourth axis, or one file for each phase that there is.
        spec: of the bundle; its channels are the phases.
        phases: the channel of each file, or of each volume of one file: "CT V" or its last word "V"; empty: by number
            or words in the files' names, by words in the descriptions of DICOM series, else by their order.
        align: register each phase rigidly to the reference before it is resampled.
        volume_index: which volume of a 4D file.
        series: see `read_volume`.
        fix_gantry_tilt: see `read_volume`.

    Raises:
        UsageError: a phase that the bundle does not have, that is named twice, or more or fewer names than files.
        InputError: as `read_volume`; or phases of different patients, or of parts of the body that hardly overlap.
    """
    paths = [Path(scan)] if isinstance(scan, str | Path) else [Path(one) for one in scan]
    named = _named(phases, spec.channels)
    alone = len(paths) == 1 and volume_index is None
    if named and not alone and len(named) != len(paths):
        raise UsageError("--phase", f"{len(named)} given for {len(paths)} scans", "give one for each scan, in order")
    digest = hashlib.sha256()

    def read(path: Path, channels: int | None) -> Volume:
        return read_volume(
            path,
            channels=channels,
            volume_index=volume_index,
            series=series,
            fix_gantry_tilt=fix_gantry_tilt,
            digest=digest,
        )

    first = read(paths[0], (len(named) if named and len(paths) == 1 else None) if alone else 1)
    volumes = _apart(first) if alone else [first, *(read(path, 1) for path in paths[1:])]
    files = paths * len(volumes) if alone else paths
    headers = [_header(one) for one in volumes]
    told: list[tuple[int, How]]
    if named:
        told = [(channel, "named") for channel in named]
    elif alone and len(volumes) == spec.in_channels > 1:
        told = [(channel, "order") for channel in range(len(volumes))]
    elif alone and len(volumes) > 1:
        remedy = f"say which ones by --phase, of {', '.join(spec.channels)}"
        raise InputError(paths[0], f"{len(volumes)} volumes; the bundle has {spec.in_channels} phases", remedy)
    else:
        told = _by_name(files, headers, spec.channels)
    _check_patients(headers, files)
    warnings = [
        text if alone else f"{file.name}: {text}"
        for file, one in zip(files, volumes, strict=True)
        for text in one.source.warnings
    ]
    if told[0][1] == "assumed":
        warnings.append(f"nothing says which phase this is; taken for {spec.channels[told[0][0]]}, --phase says it")
    unsuited = tuple(dict.fromkeys(found for one in volumes for found in unsuitable(one, spec)))
    source = replace(first.source, sha256=digest.hexdigest(), warnings=tuple(dict.fromkeys(warnings)))
    by_channel = {channel: number for number, (channel, _) in enumerate(told)}
    reference = reference_of(list(by_channel), spec.channels)
    still = volumes[by_channel[reference]]
    whole = PhaseVolume(
        np.full((spec.in_channels, *still.shape), AIR_HU, dtype=np.float32),
        still.affine,
        replace(source, path=files[by_channel[reference]], header=still.source.header, dicom=still.source.dicom),
        tuple(spec.channels),
        (None,) * spec.in_channels,
        reference,
        unsuited,
        told_by_dicom(headers[by_channel[reference]]),
    )
    found: list[Phase | None] = [None] * spec.in_channels
    for channel, number in sorted(by_channel.items()):
        name = files[number].name or files[number].resolve().name
        phase = Phase(name, told[number][1])
        if channel == reference:
            whole.data[channel] = still.data[0]
        else:
            phase = _lay(volumes[number], still, phase, files[number], whole.data[channel], align=align)
        found[channel] = phase
    warnings = [*source.warnings, *_remarks(whole, found)]
    return replace(whole, phases=tuple(found), source=replace(whole.source, warnings=tuple(warnings)))


def channel_of(word: str, channels: Sequence[str]) -> int | None:
    """The channel that a word means: its name ("CT V"), or the name's last word; None where there is none."""
    word = word.strip().casefold()
    for number, name in enumerate(channels):
        if word and word in (name.casefold(), name.casefold().split()[-1]):
            return number
    return None


def channel_in_name(name: str, channels: Sequence[str]) -> int | None:
    """The channel that a file's name without suffix tells, by a number such as _0001 or a word; None: it tells none."""
    found = _guess(name, channels)
    return None if found is None else found[0]


def reference_of(there: Sequence[int], channels: Sequence[str]) -> int:
    """The channel on whose grid all lie: the first of arterial, venous and unenhanced that is there."""
    preferred = [channel_of(kind, channels) for kind in _REFERENCES]
    return next((channel for channel in preferred if channel in there and channel is not None), min(there))


def _named(words: Sequence[str], channels: Sequence[str]) -> list[int]:
    """The channels that --phase names, each once."""
    numbers = []
    for word in words:
        number = channel_of(word, channels)
        if number is None:
            raise UsageError("--phase", f"{word!r} is no phase of the bundle", f"it has {', '.join(channels)}")
        if number in numbers:
            raise UsageError("--phase", f"{word!r} is given twice", "name each phase once")
        numbers.append(number)
    return numbers


def _by_name(files: Sequence[Path], headers: Sequence[Header], channels: Sequence[str]) -> list[tuple[int, How]]:
    """The channel of each file by its name or description; with none in any of them, their order, or venous for one."""
    found = [
        _guess(case_name(file), channels) or _described(header, channels)
        for file, header in zip(files, headers, strict=True)
    ]
    if not any(found):
        if len(files) == 1:
            venous = channel_of("v", channels)
            return [(len(channels) - 1 if venous is None else venous, "assumed")]
        if len(files) == len(channels):
            return [(number, "order") for number in range(len(files))]
    known: list[tuple[int, How]] = []
    for file, guess in zip(files, found, strict=True):
        if guess is None:
            raise UsageError(file, "its phase is not in its name", f"name the phases by --phase: {', '.join(channels)}")
        if guess[0] in [channel for channel, _ in known]:
            raise UsageError(file, f"a second file for {channels[guess[0]]}", "name the phases by --phase")
        known.append(guess)
    return known


def _guess(name: str, channels: Sequence[str]) -> tuple[int, How] | None:
    """The channel that a file's name tells: a number such as _0001 at its end, or one word for a phase."""
    if (numbered := re.search(r"_(\d{4})$", name)) and int(numbered[1]) < len(channels):
        return int(numbered[1]), "number"
    channel = _spoken(name, channels)
    return None if channel is None else (channel, "name")


def _described(header: Header, channels: Sequence[str]) -> tuple[int, How] | None:
    """The channel that the description of a DICOM series tells; the text itself is kept nowhere."""
    channel = _spoken(header.get("SeriesDescription", ""), channels)
    return None if channel is None else (channel, "description")


def _spoken(text: str, channels: Sequence[str]) -> int | None:
    """The channel that a text means by one word for a phase, or by two ("non contrast")."""
    single = re.split(r"[\W_]+", text.casefold())
    words = {*single, *(first + second for first, second in pairwise(single))}
    kinds = [kind for kind, known in _WORDS.items() if words & set(known)]
    return channel_of(kinds[0], channels) if len(kinds) == 1 else None


def _apart(volume: Volume) -> list[Volume]:
    """The channels of a volume as volumes."""
    return [replace(volume, data=volume.data[number : number + 1]) for number in range(len(volume.data))]


def _check_patients(headers: Sequence[Header], files: Sequence[Path]) -> None:
    """Refuse DICOM series that say they are of different patients; who they are stays in the files."""
    known = [(one["PatientID"], file) for one, file in zip(headers, files, strict=True) if one.get("PatientID")]
    for patient, file in known[1:]:
        if patient != known[0][0]:
            raise InputError(file, f"of another patient than {known[0][1].name}", "give phases of one examination")


def _header(volume: Volume) -> Header:
    """What the first file of a DICOM series says of phase and patient; nothing of another scan."""
    from medseg.io.dicom import opened

    origin = volume.source.dicom
    if origin is None:
        return {}
    import pydicom

    tags = ["SeriesDescription", "PatientID", *PATIENT_TAGS]
    with discreet(), opened(volume.source.path) as root:
        found = pydicom.dcmread(root / origin.files[0], specific_tags=tags, stop_before_pixels=True)
        return {tag: str(found.get(tag) or "").strip() for tag in tags}


def _lay(volume: Volume, still: Volume, phase: Phase, file: Path, target: NDArray[np.float32], *, align: bool) -> Phase:
    """Fill `target` (X, Y, Z) with a phase on the reference's grid."""
    same = volume.shape == still.shape and (
        geometry.corner_shift(still.shape, still.affine, volume.affine)
        <= GRID_TOLERANCE * geometry.spacing(still.affine).min()
    )
    covered = 1.0 if same else _covered(still, volume)
    if covered < _LEAST_SHARE:
        raise InputError(
            file,
            f"covers {100 * covered:.0f} % of the field of view of {still.source.path.name}, at least "
            f"{100 * _LEAST_SHARE:.0f} % are needed ({_offset(still, volume)})",
            "give phases of one examination and of the same part of the body",
        )
    if same and not align:
        target[...] = volume.data[0]
        return phase
    motion = None
    if align:
        try:
            motion = register(still.data[0], still.affine, volume.data[0], volume.affine)
        except ValueError as err:
            raise InputError(
                file, f"cannot be registered to {still.source.path.name} ({err})", "see --register"
            ) from err
        log.info("registered: %.2f mm, %.2f degrees", motion.distance_mm, motion.degrees)
    target[...] = resample_to(volume.data[0], volume.affine, still.shape, still.affine, motion)
    return replace(phase, resampled=True, covered=round(covered, 3), motion=motion)


def _covered(still: Volume, other: Volume) -> float:
    """Share of one scan's field of view that lies in another's."""
    axes = [np.linspace(-0.5, n - 0.5, _PROBES) for n in still.shape]
    places = geometry.world(still.affine, np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))
    index = geometry.world(np.asarray(np.linalg.inv(other.affine), dtype=np.float64), places)
    inside = ((index >= -0.5 - 1e-6) & (index <= np.array(other.shape) - 0.5 + 1e-6)).all(axis=1)
    return float(inside.mean())


def _offset(still: Volume, other: Volume) -> str:
    """How far apart the middles of two fields of view lie, and how large both are."""
    middles = [geometry.world(one.affine, (np.array(one.shape) - 1) / 2) for one in (still, other)]
    away = math.dist(*middles)
    sizes = [
        " x ".join(f"{mm:.0f}" for mm in geometry.extent_mm(one.shape, one.affine, canonical=True))
        for one in (other, still)
    ]
    return f"{sizes[0]} mm against {sizes[1]} mm, middles {away:.0f} mm apart"


def _remarks(whole: PhaseVolume, phases: Sequence[Phase | None]) -> list[str]:
    """What a reader should know of the phases, one sentence each."""
    found, channels = [], whole.names
    for channel, phase in enumerate(phases):
        if phase is None:
            found.append(f"phase {channels[channel]} is absent: reduced confidence")
            continue
        if phase.covered < _WHOLE:
            share = f"{100 * phase.covered:.0f} % of the field of view of {channels[whole.reference]}"
            found.append(f"phase {channels[channel]} covers {share}; the rest counts as air")
        if phase.motion is not None and (phase.motion.distance_mm > _FAR_MM or phase.motion.degrees > _FAR_DEGREES):
            moved = f"{phase.motion.distance_mm:.0f} mm and {phase.motion.degrees:.0f} degrees"
            found.append(f"phase {channels[channel]} was moved by {moved}; check the alignment")
        apart = 0.0 if channel == whole.reference else _bodies_apart(whole, channel)
        if apart > _CENTRES_MM:
            found.append(
                f"the body in phase {channels[channel]} lies {apart:.0f} mm from that in {channels[whole.reference]}"
                "; --register aligns them"
            )
    return found


def _bodies_apart(whole: PhaseVolume, channel: int) -> float:
    """Distance of the body's centres of mass in two phases, mm, over the field of view that both cover."""
    step = [max(1, n // 64) for n in whole.shape]
    thin = (slice(None, None, step[0]), slice(None, None, step[1]), slice(None, None, step[2]))
    one, other = whole.data[whole.reference][thin], whole.data[channel][thin]
    both = other > AIR_HU
    centres = []
    for image in (one, other):
        index = np.argwhere(both & (image > _BODY_HU))
        if not len(index):
            return 0.0
        centres.append(geometry.world(whole.affine, index.mean(axis=0) * step))
    return math.dist(*centres)
