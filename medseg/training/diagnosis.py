"""Training a network that segments and diagnoses: patients.csv beside the images, one diagnosis for each patient."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from medseg.bundles.spec import BundleSpec, ScaleIntensityRange, Suitability
from medseg.bundles.write import write_configs
from medseg.errors import InputError, OutputError, UsageError
from medseg.evaluation.classification import balanced_accuracy, confusion_matrix
from medseg.evaluation.dice import dice
from medseg.inference.diagnosis import LESION, ORGAN, PatientData, centre_of, diagnose, roi_at
from medseg.inference.preprocess import preprocess, to_model_grid
from medseg.io.patients import read_classes
from medseg.io.read import read_labels, read_volume
from medseg.networks.fit import fit
from medseg.networks.mdpformer import MDPFormer
from medseg.training.config import TrainingConfig
from medseg.training.dataset import CaseFiles, Dataset
from medseg.training.diagnosis_losses import DiagnosisLoss, class_weights
from medseg.training.job import weights_file
from medseg.training.loop import Progress, Trainer
from medseg.training.patients import Patient, frequencies, leave_out, read_patients

log = logging.getLogger(__name__)

_SPACING = (3.0, 3.0, 3.0)
_REGION = (64, 48, 32)  # voxels: left-right, front-back, up-down
_WINDOW_HU, _ZERO_HU, _UNIT_HU = (-150.0, 400.0), 60.0, 90.0
_SHIFT_VOXELS = 3
_GAIN, _OFFSET = 0.08, 0.08
_CLASSIFICATION_WEIGHT = 2.0  # with 1 the type of lesion is learned much later than its place

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


def derive_spec(config: TrainingConfig, dataset: Dataset, classes: int) -> BundleSpec:
    """Preprocessing, region and network; what is None in the settings is that of the small network at 3 mm.

    Raises:
        UsageError: settings that this kind of training does not have, or that the network refuses.
    """
    usual = TrainingConfig.model_fields
    for name, wrong in (
        ("--bundle", config.bundle is not None),
        ("--freeze-encoder", config.freeze_encoder > 0),
        ("--soft-labels", config.soft_labels is not None),
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


class DiagnosisTrainer(Trainer[PatientCase]):
    """See `Trainer`.

    Args:
        weights: (classes,) of the classes in the loss.
    """

    def __init__(
        self, config: TrainingConfig, spec: BundleSpec, weights: Tensor, output: Path, device: torch.device
    ) -> None:
        super().__init__(config, spec, output, device)
        self._loss = DiagnosisLoss(weights, classification=_CLASSIFICATION_WEIGHT).to(device)

    def feed(self, cases: Sequence[PatientCase]) -> Iterator[dict[str, Tensor]]:
        """Regions as `sample` gives them, stacked."""
        size = self.config.batch_size
        for step in itertools.count(self.progress.step):
            regions = [sample(cases, self.spec, self.config.seed, step * size + number) for number in range(size)]
            yield {key: torch.stack([region[key] for region in regions]) for key in regions[0]}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of the segmentation, the class and its evidence."""
        given = {key: value.to(self.device) for key, value in batch.items()}
        image = given["image"].to(memory_format=self.layout)
        with self.autocast():
            found = network(image, given["age"], given["sex"], given["phases"])
        loss: Tensor = self._loss(found, given["label"], given["target"])
        return loss

    def judge(self, network: nn.Module, cases: Sequence[PatientCase]) -> float:
        """Mean of Dice and accuracy; accuracy also with age and sex unknown."""
        names = {value: self.spec.labels[value] for value in (ORGAN, LESION)}
        overlap: dict[int, list[float]] = {value: [] for value in names}
        named, blind = [], []
        for case in cases:
            told = PatientData(case.patient.age, case.patient.sex)
            found = diagnose(case.image.float(), cast("MDPFormer", network), self.spec, told, self.device)
            named.append(int(found.probabilities.argmax()))
            blind.append(int(found.without_metadata.argmax()))
            for value, scores in overlap.items():
                score = dice(found.labels == value, case.label.numpy() == value)
                if not math.isnan(score):
                    scores.append(score)
        if not cases:
            return math.nan
        target = np.array([case.patient.target for case in cases])
        classes = int(self.spec.network_args["patient_classes"])
        accuracy = float((np.array(named) == target).mean())
        self.progress.dice = {names[value]: float(np.mean(found)) for value, found in overlap.items() if found}
        self.progress.scores = {
            "accuracy": accuracy,
            "balanced_accuracy": balanced_accuracy(confusion_matrix(target, np.array(named), classes)),
            "accuracy_without_metadata": float((np.array(blind) == target).mean()),
        }
        return (sum(self.progress.dice.values()) / max(len(self.progress.dice), 1) + accuracy) / 2


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
        log.info("start: %s", trainer.start_from(weights_file(config.weights)))
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
