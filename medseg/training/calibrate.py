"""``medseg bundles calibrate``: fit a bundle's temperature, and the line from a case's score to its Dice.

Both are fitted to cases with reference labels, at best to cases that the weights have never seen: parts of the split
that were held out, or the held-out parts of cross-validation folds, each predicted by its own fold's weights.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import medseg
from medseg.bundles.ensemble import Ensemble, Member
from medseg.bundles.integrity import MANIFEST, updated_manifest
from medseg.bundles.load import ResidentBundle
from medseg.bundles.locate import shipped_bundles
from medseg.bundles.spec import Calibration, DiceFit, read_json
from medseg.bundles.weights import put_in_place
from medseg.bundles.write import calibration_config
from medseg.errors import BundleError, InputError, OutputError, UsageError
from medseg.evaluation.calibration import (
    Reliability,
    fit_line,
    fit_temperature,
    mean_probabilities,
    near,
    negative_log_likelihood,
    rank_correlation,
)
from medseg.evaluation.dice import dice
from medseg.inference.run import Result, infer
from medseg.io import geometry
from medseg.io.read import read_labels
from medseg.io.write import OutputSet, Target
from medseg.training.dataset import CaseFiles

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (predictions done, predictions in all)."""

# Voxels of a case that the temperature is fitted to, drawn at random from those near a structure.
_VOXELS = 20000
_METADATA = "configs/metadata.json"


@dataclass(frozen=True)
class Labelled:
    """Cases with reference labels, and the model that predicts them.

    Attributes:
        model: a bundle or an ensemble.
        cases: best those that its weights have not seen.
    """

    model: Ensemble
    cases: tuple[CaseFiles, ...]


@dataclass(frozen=True)
class Report:
    """How well probabilities and predicted Dice hold on some cases.

    Attributes:
        cases: how many.
        ece_before: expected calibration error at temperature 1, over voxels within the margin of a structure.
        ece_after: the same at the fitted temperature.
        nll_before: mean negative log-likelihood of those voxels, nats.
        nll_after: the same at the fitted temperature.
        dice: mean over the cases of their mean Dice.
        spearman: rank correlation of score and mean Dice of the cases; None where it is not defined.
        dice_error: mean absolute difference of predicted and true mean Dice.
        covered: share of the cases whose mean Dice lies in the predicted interval.
    """

    cases: int
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    dice: float
    spearman: float | None
    dice_error: float
    covered: float


@dataclass(frozen=True)
class Fit:
    """What was fitted, and how well it does.

    Attributes:
        calibration: temperature and line.
        margin_mm: voxels within this distance of a structure counted.
        fitted: on the cases of the fit.
        reported: on other cases, when asked for.
    """

    calibration: Calibration
    margin_mm: float
    fitted: Report
    reported: Report | None

    def to_record(self) -> dict[str, Any]:
        """Everything as values for JSON."""
        return asdict(self)


def calibrate(
    model: Ensemble,
    parts: Sequence[Labelled],
    *,
    line: Sequence[Labelled] = (),
    report: Sequence[CaseFiles] = (),
    margin_mm: float = 5.0,
    device: str = "auto",
    progress: Progress | None = None,
) -> Fit:
    """Fit a bundle's temperature and its line from score to Dice; nothing is written.

    Every case is predicted twice, at temperature 1 and at the fitted one; the second time as `infer` would.

    Args:
        model: the bundle or ensemble that will carry the result; the cases of `report` are predicted by it.
        parts: cases for the fit. One part of the model itself, or one for each fold of a cross-validation.
        line: folds whose cases give the line from score to Dice instead, so that `parts` give the temperature alone:
            the weights of short folds are less sure of themselves than the model's, and more cases make a better line.
            Their scores are those at the temperature that fits the folds.
        report: other cases, to see how well the result holds.
        margin_mm: only voxels within this distance of a reference or predicted structure count.
        device: as for `infer`.
        progress: called as the work goes on.

    Raises:
        BundleError: overlapping regions, or no weights. InputError: labels that do not fit the scan or the bundle.
        UsageError: fewer than three cases, or none of them holds a structure.
    """
    if model.spec.activation != "softmax":
        raise BundleError(model.name, "has overlapping regions", "only exclusive labels can be calibrated")
    folds = [part.model for part in (*parts, *line) if part.model is not model]
    if folds and not (model.alone and all(fold.alone for fold in folds)):
        raise BundleError(model.name, "an ensemble has no folds", "give cases that no member has seen")
    if any(fold.spec.labels != model.spec.labels for fold in folds):
        raise BundleError(model.name, "a fold has other labels", "give folds of the same task")
    counts = [sum(len(part.cases) for part in group) for group in (parts, line)]
    for option, count in zip(("--part", "--fold"), counts, strict=True):
        if count < 3 and (option == "--part" or line):
            raise UsageError(option, f"{count} cases", "three or more are needed")
    tick = _Tick(progress, 2 * (sum(counts) + len(report)))
    before, temperature, scored = _fitted(parts, margin_mm, device, tick)
    measured = _fitted(line, margin_mm, device, tick)[-1] if line else scored
    drawn = fit_line([one.score for one in measured], [one.dice for one in measured])
    fit = DiceFit(round(drawn.intercept, 5), round(drawn.slope, 5), round(drawn.deviation, 5), drawn.cases)
    reported = None
    if report:
        voxels = _Voxels(margin_mm)
        for case in report:
            voxels.add(case, _at(model, 1.0), device)
            tick()
        others = [_scored(case, _at(model, temperature), device, tick) for case in report]
        reported = _report(voxels, others, temperature, fit)
    return Fit(Calibration(temperature, fit), margin_mm, _report(before, scored, temperature, fit), reported)


def _fitted(
    parts: Sequence[Labelled], margin_mm: float, device: str, tick: Callable[[], None]
) -> tuple[_Voxels, float, list[_Scored]]:
    """Voxels at temperature 1, the temperature that fits them, and the cases' scores at it."""
    before = _Voxels(margin_mm)
    for part in parts:
        bare = _at(part.model, 1.0)
        for case in part.cases:
            before.add(case, bare, device)
            tick()
    temperature = round(before.fit(), 4)
    log.info("temperature %.4f from %d voxels", temperature, before.count)
    scored = []
    for part in parts:
        warm = _at(part.model, temperature)
        scored += [_scored(case, warm, device, tick) for case in part.cases]
    return before, temperature, scored


def write_calibration(model: Ensemble, fit: Fit, *, output: Path | None = None, overwrite: bool = False) -> Path:
    """Write what was fitted into the bundle's metadata.json, and the manifest with it; both or neither.

    Args:
        model: what was calibrated; a bundle's folder, or an ensemble bundle's.
        fit: what was fitted.
        output: folder that gets a copy of the bundle; None: the bundle itself is changed.
        overwrite: replace a bundle of that name there.

    Returns:
        The folder of the calibrated bundle.

    Raises:
        OutputError: an installed bundle, or one that cannot be written; the copy exists.
    """
    root = check_writable(model, output=output, overwrite=overwrite)
    source = model.root if model.root is not None else root
    metadata = read_json(source / _METADATA)
    entry = calibration_config(fit.calibration).get("calibration", {})
    entry["fitted"] = {
        "cases": fit.fitted.cases,
        "margin_mm": fit.margin_mm,
        "ece_before": round(fit.fitted.ece_before, 5),
        "ece_after": round(fit.fitted.ece_after, 5),
        "spearman": None if fit.fitted.spearman is None else round(fit.fitted.spearman, 4),
        "medseg": medseg.__version__,
    }
    metadata.setdefault("medseg", {})["calibration"] = entry
    content = (json.dumps(metadata, indent=2) + "\n").encode()
    if root == source:
        _write(source, content)
        return root
    aside = root.with_name(f".{root.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, aside, ignore=shutil.ignore_patterns("eval", "tensorboard", "last.pt"))
        _write(aside, content)
        put_in_place(aside, root)
    except OSError as err:
        raise OutputError(root, f"cannot be written ({err.strerror or err})", "choose another folder") from err
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return root


def check_writable(model: Ensemble, *, output: Path | None, overwrite: bool) -> Path:
    """The folder that the calibrated bundle will have, checked before the work begins.

    Raises:
        UsageError: bundles that were put together for one run. OutputError: as `write_calibration`.
    """
    if model.root is None:
        raise UsageError("NAME", "several bundles", "make a bundle of them with medseg bundles ensemble")
    root = model.root.resolve()
    if output is not None:
        target = output / root.name
        if target.resolve() == root:
            raise OutputError(target, "is the bundle itself", "leave --output away to change it")
        if target.exists() and not overwrite:
            raise OutputError(target, "exists", "use --overwrite, or another --output")
        return target
    installed = root.parent == shipped_bundles().resolve() and root.parent.name == "_bundles"
    if installed or not os.access(root / "configs", os.W_OK) or not os.access(root, os.W_OK):
        problem = "an installed bundle, which stays as it is" if installed else "cannot be written to"
        raise OutputError(root, problem, "use --output FOLDER for a calibrated copy")
    return model.root


def _write(root: Path, content: bytes) -> None:
    manifest = updated_manifest(root, _METADATA, content)
    with OutputSet() as files:
        files.add_bytes(Target(root / _METADATA, overwrite=True), content)
        if manifest is not None:
            files.add_bytes(Target(root / MANIFEST, overwrite=True), manifest)


def _at(model: Ensemble, temperature: float) -> Ensemble:
    """The model at a temperature of its own, without a line, its networks kept in memory.

    A bundle alone takes the temperature for itself; an ensemble beside those of its members.
    """
    members = []
    for member in model.members:
        own = Calibration(temperature) if model.alone else member.bundle.spec.calibration
        members.append(Member(_resident(member, replace(member.bundle.spec, calibration=own)), member.weight))
    return replace(model, members=tuple(members), calibration=Calibration(temperature))


def _resident(member: Member, spec: Any) -> ResidentBundle:
    return ResidentBundle.of(replace(member.bundle, spec=spec))


class _Voxels:
    """Probabilities at temperature 1 and true classes of voxels near a structure."""

    def __init__(self, margin_mm: float) -> None:
        self._margin_mm = margin_mm
        self._logs: list[NDArray[np.float32]] = []
        self._targets: list[NDArray[np.integer]] = []
        self._weights: list[float] | None = None

    @property
    def count(self) -> int:
        """How many voxels there are."""
        return sum(map(len, self._targets))

    def add(self, case: CaseFiles, model: Ensemble, device: str) -> None:
        """Predict a case by each member, and keep some of its voxels."""
        results = [
            infer(_scan(case), bundle=member.bundle, device=device, probabilities=True, force=True)
            for member in model.members
        ]
        reference, known = _reference(case, results[0], model)
        inside = near(
            [np.where(known, reference, 0), *(one.label_map for one in results)],
            geometry.spacing(results[0].affine).tolist(),
            margin_mm=self._margin_mm,
        )
        place = np.flatnonzero(inside & known)
        if len(place) > _VOXELS:
            random = np.random.default_rng([len(self._targets), len(place)])
            place = random.choice(place, _VOXELS, replace=False)
        self._weights = [member.weight for member in model.members]
        self._targets.append(reference.ravel()[place].astype(np.int64))
        self._logs.append(np.stack([_logs(one, place) for one in results]))

    def fit(self) -> float:
        """The temperature that makes the true classes most likely.

        Raises:
            UsageError: no voxel of any case lies near a structure.
        """
        if not self.count:
            raise UsageError("--part", "no case holds a structure, nor does a prediction", "give other cases")
        return fit_temperature(*self._all())

    def at(self, temperature: float) -> tuple[float, float]:
        """Expected calibration error and negative log-likelihood."""
        logs, weights, targets = self._all()
        probabilities, bins = mean_probabilities(logs, weights, temperature), Reliability()
        bins.add(probabilities, targets)
        return bins.error, negative_log_likelihood(probabilities, targets)

    def _all(self) -> tuple[NDArray[np.float32], list[float], NDArray[np.integer]]:
        return np.concatenate(self._logs, axis=1), self._weights or [1.0], np.concatenate(self._targets)


@dataclass(frozen=True, slots=True)
class _Scored:
    """A case's score, and the mean Dice that it really has."""

    score: float
    dice: float


def _scored(case: CaseFiles, model: Ensemble, device: str, tick: Callable[[], None]) -> _Scored:
    result = infer(_scan(case), bundle=model, device=device, uncertainty=True, force=True)
    reference, known = _reference(case, result, model)
    found = [
        dice((result.label_map == value) & known, (reference == value) & known) for value in model.spec.labels if value
    ]
    applicable = [one for one in found if not np.isnan(one)]
    tick()
    score = 0.0 if result.record.uncertainty is None else result.record.uncertainty.score
    return _Scored(score, float(np.mean(applicable)) if applicable else 1.0)


def _report(voxels: _Voxels, scored: Sequence[_Scored], temperature: float, fit: DiceFit) -> Report:
    (ece_before, nll_before), (ece_after, nll_after) = voxels.at(1.0), voxels.at(temperature)
    scores, dices = [one.score for one in scored], [one.dice for one in scored]
    rank = rank_correlation(scores, dices)
    predicted = [fit.predict(score) for score in scores]
    inside = [lower <= true <= upper for (_, lower, upper), true in zip(predicted, dices, strict=True)]
    return Report(
        cases=len(scored),
        ece_before=ece_before,
        ece_after=ece_after,
        nll_before=nll_before,
        nll_after=nll_after,
        dice=float(np.mean(dices)),
        spearman=None if np.isnan(rank) else rank,
        dice_error=float(np.mean([abs(mean - true) for (mean, _, _), true in zip(predicted, dices, strict=True)])),
        covered=float(np.mean(inside)),
    )


def _reference(case: CaseFiles, result: Result, model: Ensemble) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
    """The reference labels of a case on the scan's grid, and where they are known.

    A value that the bundle does not name, such as an ignore label, is not known.

    Raises:
        InputError: the grids differ, or no value of the file is one of the bundle's.
    """
    labels, affine = read_labels(case.label)
    if labels.shape != result.label_map.shape or not np.allclose(affine, result.affine, atol=1e-2):
        raise InputError(
            case.label, f"grid {labels.shape} differs from its scan's {result.label_map.shape}", "resample it"
        )
    known = np.isin(labels, list(model.spec.labels))
    if not known.any():
        raise InputError(case.label, "holds none of the bundle's labels", "give the data set the bundle is for")
    return labels, known


def _logs(result: Result, place: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logarithms of the probabilities (n, K) of voxels, flat in (X, Y, Z)."""
    if result.probabilities is None:
        raise ValueError("no probabilities were kept")
    values = result.probabilities.reshape(len(result.probabilities), -1)[:, place].T
    return np.log(np.maximum(values, np.finfo(np.float32).tiny))


def _scan(case: CaseFiles) -> Path | list[Path]:
    return list(case.images) if len(case.images) > 1 else case.images[0]


class _Tick:
    """Counts predictions."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        """One more is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
