"""Training a network that segments and diagnoses: patients.csv beside the images, one diagnosis for each patient."""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from medseg.bundles.spec import BundleSpec, ScaleIntensityRange, Suitability
from medseg.bundles.write import write_configs
from medseg.checkpoints.load import load_pretrained
from medseg.errors import InputError, Interrupted, OutputError, UsageError
from medseg.evaluation.classification import balanced_accuracy, confusion_matrix
from medseg.evaluation.dice import dice
from medseg.inference.diagnosis import LESION, ORGAN, PatientData, centre_of, diagnose, roi_at
from medseg.inference.preprocess import preprocess, to_model_grid
from medseg.io.read import read_labels, read_volume
from medseg.networks.fit import fit
from medseg.networks.mdpformer import MDPFormer
from medseg.training.config import TrainingConfig
from medseg.training.dataset import CaseFiles, Dataset
from medseg.training.diagnosis_losses import DiagnosisLoss, class_weights
from medseg.training.job import weights_file
from medseg.training.loop import Progress, learning_rate, save_tensors, stop_signals
from medseg.training.patients import Patient, frequencies, leave_out, read_classes, read_patients

log = logging.getLogger(__name__)

_SPACING = (3.0, 3.0, 3.0)
_REGION = (64, 48, 32)  # voxels: left-right, front-back, up-down
_WINDOW_HU, _ZERO_HU, _UNIT_HU = (-150.0, 400.0), 60.0, 90.0
_SHIFT_VOXELS = 3
_GAIN, _OFFSET = 0.08, 0.08
_CLASSIFICATION_WEIGHT = 2.0  # with 1 the type of lesion is learned much later than its place
_SAVE_SECONDS = 120.0

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PatientCase:
    """A preprocessed patient in memory.

    Attributes:
        name: the case's name.
        image: (C, X', Y', Z') float16 on the model grid.
        label: (X', Y', Z') uint8: 0 background, 1 organ, 2 lesion.
        centre: voxel around which the region is cut out, from the label map.
        patient: class, age, sex.
    """

    name: str
    image: Tensor
    label: Tensor
    centre: tuple[int, int, int]
    patient: Patient


@dataclass
class Standing(Progress):
    """Where a run stands, with what its last validation found.

    Attributes:
        accuracy: share of the held-out patients that were named rightly.
        balanced_accuracy: mean of the classes' own shares.
        accuracy_without_metadata: with age and sex unknown.
    """

    accuracy: float = math.nan
    balanced_accuracy: float = math.nan
    accuracy_without_metadata: float = math.nan


def derive_spec(config: TrainingConfig, dataset: Dataset, classes: int) -> BundleSpec:
    """Preprocessing, region and network; what is None in the settings is that of the small network at 3 mm.

    Raises:
        UsageError: settings that this kind of training does not have, or that the network refuses.
    """
    usual = TrainingConfig.model_fields
    for name, wrong in (
        ("--bundle", config.bundle is not None),
        ("--freeze-encoder", config.freeze_encoder > 0),
        ("--slice-axis", config.slice_axis is not None or config.neighbours > 0 or config.resize != "none"),
        ("--mirror", bool(config.mirror_axes)),
        ("--optimizer", config.optimizer != "adamw"),
        ("--augment", config.augmentation != usual["augmentation"].default),
        ("--intensity", config.intensity is not None),
        ("--workers", config.workers > 0),
        ("loss", config.loss != usual["loss"].default),
    ):
        if wrong:
            raise UsageError(name, "not for a network that diagnoses", "leave it out; see docs/pancreas.md")
    try:
        fitted = fit(
            config.architecture,
            config.roi_size or _REGION,
            in_channels=len(dataset.channels),
            out_channels=LESION + 1,
            given={"patient_classes": classes, **config.network},
        )
        MDPFormer(**fitted.arguments)
    except (ValueError, TypeError) as err:
        raise UsageError(config.architecture, str(err), "see medseg networks show, and --network") from err
    if fitted.arguments["patient_classes"] != classes:
        raise UsageError("--network", f"patient_classes is not {classes}", "dataset.json names the classes")
    x, y, z = fitted.size
    low, high = ((bound - _ZERO_HU) / _UNIT_HU for bound in _WINDOW_HU)
    return BundleSpec(
        network=config.architecture,
        network_args=fitted.arguments,
        channels=dataset.channels,
        labels={0: "background", ORGAN: dataset.labels[ORGAN], LESION: "lesion"},
        spacing=config.spacing or _SPACING,
        intensity=(ScaleIntensityRange(*_WINDOW_HU, low, high),),
        roi_size=(x, y, z),
        padding_value=low,
        suitability=Suitability(modality="CT"),
    )


def cache_patient(case: CaseFiles, patient: Patient, spec: BundleSpec) -> PatientCase:
    """Read and preprocess one patient as inference does; label values above 1 are lesions.

    Raises:
        InputError: unreadable, or grids that differ.
    """
    volume = read_volume(case.images if len(case.images) > 1 else case.images[0], channels=spec.in_channels)
    labels, affine = read_labels(case.label)
    if labels.shape != volume.shape or not np.allclose(affine, volume.affine, atol=1e-2):
        raise InputError(case.label, f"grid {labels.shape} differs from its image's {volume.shape}", "resample it")
    label = to_model_grid(np.minimum(labels, LESION), affine, spec)
    centre = centre_of(label.numpy() > 0) or centre_of(np.ones(label.shape, dtype=bool)) or (0, 0, 0)
    return PatientCase(case.name, preprocess(volume, spec).image.half(), label, centre, patient)


def sample(cases: Sequence[PatientCase], spec: BundleSpec, seed: int, number: int) -> dict[str, Tensor]:
    """Training region `number`: the same one in every run with the same seed, each patient once an epoch.

    Returns:
        image (C, D, H, W) float32, label (1, D, H, W) int64, target () int64, age () float32, sex () int64,
        phases (C,) float32.
    """
    epoch, place = divmod(number, len(cases))
    order = np.random.default_rng([seed, 1, epoch]).permutation(len(cases))
    case, random = cases[int(order[place])], np.random.default_rng([seed, 3, number])
    moved = random.integers(-_SHIFT_VOXELS, _SHIFT_VOXELS + 1, 3)
    centre = [int(middle + step) for middle, step in zip(case.centre, moved, strict=True)]
    image = roi_at(case.image, centre, spec.roi_size, spec.padding_value).float()
    gain, offset = 1 + _GAIN * random.uniform(-1, 1), _OFFSET * random.uniform(-1, 1)
    told = leave_out(random, case.patient, len(image))
    return {
        "image": image * gain + offset,
        "label": roi_at(case.label[None], centre, spec.roi_size, 0).long(),
        "target": torch.tensor(case.patient.target),
        "age": torch.tensor(told.age, dtype=torch.float32),
        "sex": torch.tensor(told.sex),
        "phases": torch.tensor(told.phases, dtype=torch.float32),
    }


class DiagnosisTrainer:
    """One run in one folder.

    Args:
        config: the settings.
        spec: see `derive_spec`.
        weights: of the classes in the loss.
        output: folder of the run; gets models/model.pt (best average weights), last.pt and metrics.csv.
        device: where the network trains.
    """

    def __init__(
        self, config: TrainingConfig, spec: BundleSpec, weights: Tensor, output: Path, device: torch.device
    ) -> None:
        self.config, self.spec, self.output, self.device = config, spec, output, device
        torch.manual_seed(config.seed)
        self.network = MDPFormer(**spec.network_args).to(device)
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))  # type: ignore[no-untyped-call]
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.loss = DiagnosisLoss(weights, classification=_CLASSIFICATION_WEIGHT).to(device)
        self.standing = Standing()
        self._names = {ORGAN: spec.labels[ORGAN], LESION: spec.labels[LESION]}

    def start_from(self, weights: Path) -> None:
        """Take what fits of another run's weights, e.g. of an S-path trained alone.

        Raises:
            BundleError: it cannot be read, or holds nothing for this network.
        """
        report = load_pretrained(self.network, weights)
        self.average.module.load_state_dict(self.network.state_dict())
        log.info("start: %s", report)

    def resume(self) -> None:
        """Go on from last.pt."""
        state = torch.load(self.output / "last.pt", map_location=self.device, weights_only=True)  # noqa: TID251
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        self.standing = Standing(**state["standing"])

    def run(
        self,
        training: Sequence[PatientCase],
        held_out: Sequence[PatientCase],
        report: Callable[[Progress, float], None] | None = None,
    ) -> Standing:
        """Train to the end of the schedule, or until SIGINT or SIGTERM, saving either way.

        Args:
            training: patients to learn from.
            held_out: patients that choose the best weights; without any the last average is the best.
            report: called after each step with the progress and the share done.
        """
        standing = self.standing
        saved = validated = standing.seconds
        with stop_signals() as stopped:
            while standing.fraction(self.config) < 1 and not stopped:
                begin = time.monotonic()
                first = standing.step * self.config.batch_size
                numbers = range(first, first + self.config.batch_size)
                regions = [sample(training, self.spec, self.config.seed, number) for number in numbers]
                loss = self._step({key: torch.stack([region[key] for region in regions]) for key in regions[0]})
                standing.step += 1
                share = max(0.02, 1 / standing.step)
                standing.loss = loss if math.isnan(standing.loss) else (1 - share) * standing.loss + share * loss
                standing.seconds += time.monotonic() - begin
                if report is not None:
                    report(standing, standing.fraction(self.config))
                if standing.seconds - validated > 60 * self.config.validate_minutes:
                    validated = standing.seconds
                    self._validate(held_out)
                if standing.seconds - saved > _SAVE_SECONDS:
                    saved = standing.seconds
                    self._save()
            if not stopped:
                self._validate(held_out)
            self._save()
        if stopped:
            raise Interrupted(stopped[0])
        return standing

    def _step(self, batch: dict[str, Tensor]) -> float:
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.standing)
        given = {key: value.to(self.device) for key, value in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            found = self.network(given["image"], given["age"], given["sex"], given["phases"])
        loss: Tensor = self.loss(found, given["label"], given["target"])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(self.output, f"the loss is {value} at step {self.standing.step}", "lower --learning-rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.gradient_clip or math.inf)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return value

    def _validate(self, cases: Sequence[PatientCase]) -> None:
        network = cast("MDPFormer", self.average.module.eval())
        overlap: dict[int, list[float]] = {value: [] for value in self._names}
        named, blind = [], []
        for case in cases:
            told = PatientData(case.patient.age, case.patient.sex)
            found = diagnose(case.image.float(), network, self.spec, told, self.device)
            named.append(int(found.probabilities.argmax()))
            blind.append(int(found.without_metadata.argmax()))
            for value, scores in overlap.items():
                score = dice(found.labels == value, case.label.numpy() == value)
                if not math.isnan(score):
                    scores.append(score)
        standing, score = self.standing, math.nan
        if cases:
            target = np.array([case.patient.target for case in cases])
            standing.dice = {self._names[value]: float(np.mean(found)) for value, found in overlap.items() if found}
            standing.accuracy = float((np.array(named) == target).mean())
            standing.accuracy_without_metadata = float((np.array(blind) == target).mean())
            classes = int(self.spec.network_args["patient_classes"])
            standing.balanced_accuracy = balanced_accuracy(confusion_matrix(target, np.array(named), classes))
            score = (sum(standing.dice.values()) / max(len(standing.dice), 1) + standing.accuracy) / 2
        if not cases or math.isnan(standing.best) or score >= standing.best:
            standing.best = score
            folder = self.output / "models"
            folder.mkdir(exist_ok=True)
            save_tensors(folder / "model.pt", {"model": network.state_dict()})
        self._log()

    def _log(self) -> None:
        standing = self.standing
        row = {
            "step": standing.step,
            "minutes": round(standing.seconds / 60, 2),
            "learning_rate": f"{learning_rate(self.config, standing):.3g}",
            "loss": round(standing.loss, 4),
            "accuracy": round(standing.accuracy, 4),
            "balanced_accuracy": round(standing.balanced_accuracy, 4),
            "accuracy_without_metadata": round(standing.accuracy_without_metadata, 4),
            **{f"dice_{name}": round(standing.dice.get(name, math.nan), 4) for name in self._names.values()},
        }
        path = self.output / "metrics.csv"
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        log.info("validation %s", json.dumps(row))

    def _save(self) -> None:
        save_tensors(
            self.output / "last.pt",
            {
                "network": self.network.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "standing": vars(self.standing),
            },
        )


def train_diagnosis(
    config: TrainingConfig,
    dataset: Dataset,
    cases: Sequence[CaseFiles],
    output: Path,
    *,
    resume: bool,
    device: torch.device,
    prepare: Report | None = None,
    report: Callable[[Progress, float], None] | None = None,
) -> Progress:
    """Train on the cases of a data set with patients.csv; what `medseg.training.run.train` does for such folders.

    Raises:
        InputError: unusable data. OutputError: `output` holds a run already. UsageError: a setting that does not fit.
    """
    from medseg.training.run import divide, load_run, train_config

    if resume:
        if not (output / "last.pt").exists():
            raise InputError(output, "holds no last.pt, nothing to resume", "start without --resume")
        config, spec = load_run(output)
    elif (output / "last.pt").exists() or (output / "configs").exists():
        raise OutputError(output, "holds a run already", "use --resume, or another --output")
    classes = read_classes(dataset.root)
    patients = read_patients(dataset.root, classes, [case.name for case in cases])
    learn, held_out = divide(cases, config.holdout, config.seed)
    learned = {case.name: patients[case.name] for case in learn}
    weights = class_weights([patient.target for patient in learned.values()], len(classes))
    if not resume:
        spec = derive_spec(config, dataset, len(classes))
    trainer = DiagnosisTrainer(config, spec, weights, output, device)
    if resume:
        trainer.resume()
    elif config.weights is not None:
        trainer.start_from(weights_file(config.weights))
    cached = []
    for done, case in enumerate([*learn, *held_out], start=1):
        cached.append(cache_patient(case, patients[case.name], spec))
        if prepare is not None:
            prepare("preprocess", done, len(cases))
    if not resume:  # the last thing that can fail is done: the folder is taken from here on
        output.mkdir(parents=True, exist_ok=True)
        described = describe(dataset, spec, classes, frequencies(learned, classes), len(held_out))
        write_configs(output, spec, described, train_config(config))
    return trainer.run(cached[: len(learn)], cached[len(learn) :], report)


def describe(
    dataset: Dataset, spec: BundleSpec, classes: dict[str, str], learned: dict[str, int], held_out: int
) -> dict[str, Any]:
    """What the run's metadata.json says; ``diagnosis`` names classes and phases in the network's order."""
    return {
        "name": f"{spec.network} {dataset.name}",
        "task": f"Segmentation of {spec.labels[ORGAN]} and lesion, and the patient's class: {', '.join(classes)}",
        "description": f"{spec.network} trained on {sum(learned.values())} patients of {dataset.name}. "
        f"{dataset.reference}".rstrip(),
        "data_source": dataset.reference,
        "data_license": dataset.licence,
        "training_cases": sum(learned.values()),
        "held_out_cases": held_out,
        "diagnosis": {
            "classes": classes,
            "training_patients": learned,
            "phases": list(dataset.channels),
            "age": "years, NaN unknown",
            "sex": {"male": 0, "female": 1, "unknown": 2},
        },
    }
