"""What one process of a training run does, from the files of the cases to the last step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from medseg.bundles.integrity import check_manifest
from medseg.bundles.locate import find_bundle, weights_of
from medseg.bundles.spec import BundleSpec
from medseg.checkpoints.state import PretrainedReport
from medseg.errors import BundleError, UsageError
from medseg.training.config import TrainingConfig
from medseg.training.data import SoftLabels, cache_cases
from medseg.training.dataset import CaseFiles
from medseg.training.loop import Progress
from medseg.training.rank import ALONE, Rank
from medseg.training.segmentation import SegmentationTrainer

log = logging.getLogger(__name__)

START_FILE = "weights.txt"
"""File of a run's folder that names the tensors taken from `weights`, and those that were not."""


@dataclass(frozen=True)
class Job:
    """A run that is prepared: its folder holds the configuration, its cases are known.

    Attributes:
        config: the settings.
        spec: network, preprocessing, window and labels.
        output: the run's folder.
        learn: cases to learn from.
        held_out: cases that choose the best weights.
        ignore: label value of voxels that were not annotated, or None.
        resume: go on from last.pt.
    """

    config: TrainingConfig
    spec: BundleSpec
    output: Path
    learn: Sequence[CaseFiles]
    held_out: Sequence[CaseFiles]
    ignore: int | None = None
    resume: bool = False


@dataclass(frozen=True)
class Start:
    """What a run began with.

    Attributes:
        weights: the bundle or file.
        report: the tensors taken and not taken.
        frozen: how many of them stay as they are at first.
        steps: for how many steps.
    """

    weights: str
    report: PretrainedReport
    frozen: int
    steps: int


@dataclass(frozen=True)
class Listeners:
    """Who hears of the progress; None hears nothing.

    Attributes:
        prepare: (stage, cases done, all cases).
        start: what was taken of the weights to start from.
        step: (progress, share of the run done), after each step.
    """

    prepare: Callable[[str, int, int], None] | None = None
    start: Callable[[Start], None] | None = None
    step: Callable[[Progress, float], None] | None = None


def train_cases(job: Job, device: torch.device, listeners: Listeners, rank: Rank = ALONE) -> Progress:
    """Build or resume the network, read the cases, and train to the end; see `medseg.training.loop.Trainer.run`."""
    trainer = SegmentationTrainer(job.config, job.spec, job.output, device, rank)
    if job.resume:
        trainer.resume()
    elif job.config.weights is not None:
        start = _start(trainer, job.config)
        if rank.leads:
            (job.output / START_FILE).write_text(_names(start), encoding="utf-8")
            if listeners.start is not None:
                listeners.start(start)
    cases = [*job.learn, *job.held_out[rank.number :: rank.count]]
    prepare = listeners.prepare
    stage = None if prepare is None else lambda done, total: prepare("preprocess", done, total)
    cached = cache_cases(cases, job.spec, stage, ignore=job.ignore, soft=_soft_labels(job))
    return trainer.run(cached[: len(job.learn)], cached[len(job.learn) :], listeners.step)


def _soft_labels(job: Job) -> SoftLabels | None:
    if job.config.soft_labels is None:
        return None
    if job.spec.regions:
        raise UsageError("--soft-labels", "is for exclusive labels, not for overlapping regions", "leave it out")
    soft = SoftLabels(Path(job.config.soft_labels), job.config.soft_share)
    soft.check([*job.learn, *job.held_out])
    return soft


def weights_file(name: str) -> Path:
    """The file that `TrainingConfig.weights` means: a file itself, or the weights of a bundle.

    Raises:
        BundleError: neither, or the bundle is damaged or ships without weights.
    """
    path = Path(name)
    if path.is_file():
        return path
    try:
        root = find_bundle(name)
    except BundleError as err:
        raise BundleError(f"--weights {name}", f"no such file, and no bundle: {err.problem}", err.remedy) from err
    found = weights_of(root)
    if found is None:
        raise BundleError(f"bundle {root.name}", "ships without weights", "see medseg weights import --help")
    check_manifest(root, names=(found.relative_to(root).as_posix(),))
    return found


def _start(trainer: SegmentationTrainer, config: TrainingConfig) -> Start:
    name = str(config.weights)
    report = trainer.start_from(weights_file(name))
    if config.freeze_encoder and not trainer.frozen:
        remedy = "leave --freeze-encoder out, or give weights that hold the encoder"
        raise UsageError("--freeze-encoder", f"{name} gave no tensor to the encoder", remedy)
    start = Start(name, report, len(trainer.frozen), config.freeze_encoder)
    log.info("start: %s", report)
    if start.frozen:
        log.info("encoder: %d tensors stay as they are for the first %d steps", start.frozen, start.steps)
    return start


def _names(start: Start) -> str:
    """Every tensor by name, under what became of it."""
    report = start.report
    kinds = {
        "taken": report.taken,
        "adapted": report.adapted,
        "left at their initial values": report.left,
        "not used": report.unused,
        "notes": report.notes,
    }
    lines = [f"weights: {start.weights}", f"frozen: {start.frozen} tensors for the first {start.steps} steps"]
    for kind, names in kinds.items():
        lines += ["", f"{kind}: {len(names)}", *(f"  {name}" for name in names)]
    return "\n".join(lines) + "\n"
