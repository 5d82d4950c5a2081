"""Clearance: which back ends a bundle's labels were compared on, and whether they agree well enough to be chosen.

It stands in metadata.json under ``medseg.validated_backends``, bound to the SHA-256 of the weights and to the version
family of the back end. What counts is computed from the figures; there is no field that says "cleared".
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from medseg.bundles.integrity import write_manifest
from medseg.bundles.load import Bundle, load_bundle
from medseg.bundles.locate import shipped_bundles
from medseg.bundles.weights import put_in_place
from medseg.errors import BundleError, OutputError

Accuracy = Literal["exact", "fast", "reduced"]

DICE_BOUNDS: Mapping[Accuracy, float] = {"fast": 0.999, "reduced": 0.998}
"""Dice against the plain network that every label of every case must reach; the exact class needs no clearance."""

_KEY = "validated_backends"


@dataclass(frozen=True, slots=True)
class Method:
    """A way to compute a network.

    Attributes:
        backend: eager, onnxruntime or openvino.
        precision: fp32 or bf16.
    """

    backend: str
    precision: str

    @property
    def accuracy(self) -> Accuracy:
        """How far logits may lie from the plain network's: rounding, a little more, or that of bfloat16."""
        if self.precision == "bf16":
            return "reduced"
        return "fast" if self.backend == "openvino" else "exact"

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Dice of one label between a back end and the plain network: of the worst case, and the mean over the cases."""

    lowest: float
    mean: float


@dataclass(frozen=True, slots=True)
class Clearance:
    """What a comparison with the plain network gave.

    Attributes:
        backend: as in `Method`.
        precision: as in `Method`.
        version: the back end's version family, see `version_family`.
        weights_sha256: of the weights that were compared.
        cases: how many.
        dice: for each label that occurs, background left out.
        speed: CPU time of the plain network over the back end's.
        max_logit_difference: over the windows that were compared.
    """

    backend: str
    precision: str
    version: str
    weights_sha256: str
    cases: int
    dice: Mapping[str, Agreement]
    speed: float
    max_logit_difference: float

    @property
    def method(self) -> Method:
        """What was compared."""
        return Method(self.backend, self.precision)

    @property
    def passed(self) -> bool:
        """Whether every label agreed well enough in every case."""
        bound = DICE_BOUNDS.get(self.method.accuracy, 1.0)
        return bool(self.dice) and self.cases > 0 and all(one.lowest >= bound for one in self.dice.values())


def version_family(version: str) -> str:
    """The first two parts of a version: what a clearance is bound to."""
    return ".".join(version.split("-")[0].split("+")[0].split(".")[:2])


def read_clearances(metadata: Mapping[str, Any]) -> list[Clearance]:
    """The clearances of a metadata.json.

    Raises:
        ValueError: an entry is malformed.
    """
    try:
        return [_parse(entry) for entry in metadata.get("medseg", {}).get(_KEY, ())]
    except (KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"malformed ({err!r})") from err


def _parse(entry: Mapping[str, Any]) -> Clearance:
    dice = {
        str(label): Agreement(float(one["lowest"]), float(one["mean"])) for label, one in dict(entry["dice"]).items()
    }
    if not all(0 <= value <= 1 for one in dice.values() for value in (one.lowest, one.mean)):
        raise ValueError("a Dice is not in [0, 1]")
    texts = [str(entry[key]) for key in ("backend", "precision", "version", "weights_sha256")]
    return Clearance(
        texts[0],
        texts[1],
        texts[2],
        texts[3],
        int(entry["cases"]),
        dice,
        float(entry["speed"]),
        float(entry["max_logit_difference"]),
    )


def cleared(bundle: Bundle, method: Method, version: str) -> tuple[bool, str]:
    """Whether a bundle may be computed by a method without being asked to.

    Args:
        bundle: the bundle.
        method: the method.
        version: of the back end that is installed.

    Returns:
        The answer, and a warning where there is an entry that does not count; empty otherwise.
    """
    if method.accuracy == "exact":
        return True, ""
    try:
        found = [entry for entry in read_clearances(bundle.metadata) if entry.method == method]
    except ValueError as err:
        return False, f"{bundle.name}: {_KEY} in metadata.json is {err}; it is ignored"
    if not found:
        return False, ""
    mine = [entry for entry in found if entry.weights_sha256 == bundle.sha256]
    if not mine:
        return False, f"{bundle.name}: cleared for {method} with other weights; that clearance is ignored"
    same = [entry for entry in mine if entry.version == version_family(version)]
    if not same:
        return False, (
            f"{bundle.name}: cleared for {method} {mine[0].version}, {version_family(version)} is installed; "
            "that clearance is ignored"
        )
    return same[-1].passed, ""


def write_clearances(
    bundle: Bundle, found: Sequence[Clearance], folder: Path | None = None, *, overwrite: bool = False
) -> Path:
    """Put clearances into a bundle's metadata.json and bring its manifest up to date; whole or not at all.

    Entries of other methods with the same weights stay.

    Args:
        bundle: the bundle.
        found: what the comparisons gave.
        folder: gets a copy of the bundle with the clearances; None: the bundle itself is changed.
        overwrite: replace a bundle of that name in `folder`.

    Returns:
        The folder of the bundle that holds them.

    Raises:
        OutputError: the bundle is a shipped one, exists in `folder`, or cannot be written.
    """
    check_writable(bundle, folder, overwrite=overwrite)
    target = bundle.root.resolve() if folder is None else folder / bundle.name
    aside = target.parent / f".{bundle.name}.clearing"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(bundle.root, aside)
        path = aside / "configs" / "metadata.json"
        metadata = json.loads(path.read_text(encoding="utf-8"))
        own = metadata.setdefault("medseg", {})
        own[_KEY] = [*_kept(metadata, bundle.sha256, found), *(asdict(entry) for entry in found)]
        path.write_text(json.dumps(metadata, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        write_manifest(aside)
        load_bundle(aside)
        put_in_place(aside, target)
    except OSError as err:
        raise OutputError(target, f"cannot be written ({err.strerror or err})", "give a folder with -o") from err
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def check_writable(bundle: Bundle, folder: Path | None, *, overwrite: bool) -> None:
    """Refuse what `write_clearances` could not write, before the cases are computed.

    Raises:
        OutputError: the bundle is a shipped one, exists in `folder`, or its folder cannot be written.
        BundleError: it has no weights.
    """
    if bundle.weights is None:
        raise BundleError(bundle.name, "has no weights", bundle.how_to_get_weights())
    if folder is None:
        root = bundle.root.resolve()
        if root.is_relative_to(shipped_bundles().resolve()):
            raise OutputError(bundle.name, "is a shipped bundle, which stays as it is", "give a folder with -o")
        return
    target = folder / bundle.name
    if target.exists() and not overwrite:
        raise OutputError(target, "exists", "use --overwrite, or another -o")


def _kept(metadata: Mapping[str, Any], sha256: str, found: Sequence[Clearance]) -> list[dict[str, Any]]:
    try:
        earlier = read_clearances(metadata)
    except ValueError:
        return []
    renewed = {entry.method for entry in found}
    return [asdict(entry) for entry in earlier if entry.weights_sha256 == sha256 and entry.method not in renewed]


def agreement(values: Sequence[float]) -> Agreement | None:
    """Lowest and mean of the Dice of one label over the cases, cases without the label left out."""
    present = [value for value in values if not math.isnan(value)]
    return Agreement(min(present), sum(present) / len(present)) if present else None
