"""The straight line from a scan to a segmentation; every entry point of medseg goes through `infer`."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import medseg
from medseg.bundles.ensemble import Ensemble, Loadable, load_ensemble
from medseg.bundles.load import Bundle
from medseg.bundles.locate import DEFAULT_BUNDLE
from medseg.bundles.spec import BundleSpec, DiceFit, LabelCode
from medseg.errors import BundleError, MemoryBudgetError, UsageError
from medseg.evaluation.volumes import LabelStatistics, label_statistics
from medseg.inference.answer import Diagnosing, without_absent
from medseg.inference.backends.host import Backend, HostNetwork, check_choice, host_network
from medseg.inference.device import Precision, Predictor, available_memory, choose_device
from medseg.inference.diagnosis import LESION, classes_of
from medseg.inference.ensemble import Model
from medseg.inference.export import NotFiniteError
from medseg.inference.label_steps import apply_label_steps
from medseg.inference.memory import memory_plan
from medseg.inference.own_pipeline import OwnPipeline, own_pipeline
from medseg.inference.phases import PhaseVolume, read_phases
from medseg.inference.placement import Placement
from medseg.inference.preprocess import Case, model_grid, preprocess
from medseg.inference.record import (
    BackendRecord,
    BundleRecord,
    InputRecord,
    LabelRecord,
    LabelUncertainty,
    MemberRecord,
    ParameterRecord,
    PredictedDice,
    Record,
    UncertaintyRecord,
    disclaimer_of,
)
from medseg.inference.segment import Uncertainty, segment_together, window_total
from medseg.inference.suitability import unsuitable
from medseg.io import geometry
from medseg.io.dicom import check_referable, with_assigned_uids
from medseg.io.patients import PatientFacts
from medseg.io.read import read_volume
from medseg.io.volume import Volume
from medseg.io.write import reserve, write_labels

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, all); stages in order: bundle, read, preprocess, network, restore, measure."""


@dataclass(frozen=True)
class Result:
    """A segmentation on the scan's own grid.

    Attributes:
        label_map: (X, Y, Z), smallest sufficient unsigned integer type.
        affine: the scan's, (4, 4) float64.
        labels: value to name, background included.
        statistics: measurements of each label but the background.
        probabilities: (K, X, Y, Z) float32 when asked for, else None.
        record: how the result came about.
        volume: the scan; for a bundle that diagnoses, all phases on the reference's grid.
        uncertainty: (X, Y, Z) float32 when asked for, else None: entropy of each voxel, 0 (sure) to 1.
        mutual_information: (X, Y, Z) float32, the part of it that comes from the disagreement of several passes; None
            for a single pass.
        evidence: (X, Y, Z) float32 when asked for, else None: where the most probable class of a patient sees its
            evidence, 0 to 1; 0 outside of the region that was classified.
        codes: of the labels for which the bundle states one.
    """

    label_map: NDArray[np.integer]
    affine: NDArray[np.float64]
    labels: Mapping[int, str]
    statistics: tuple[LabelStatistics, ...]
    probabilities: NDArray[np.float32] | None
    record: Record
    volume: Volume
    uncertainty: NDArray[np.float32] | None = None
    mutual_information: NDArray[np.float32] | None = None
    evidence: NDArray[np.float32] | None = None
    codes: Mapping[int, LabelCode] = field(default_factory=dict)

    def with_outputs(self, written: Mapping[str, str]) -> Result:
        """The same result, its record naming the files that were written: kind to file name."""
        return replace(self, record=self.record.model_copy(update={"outputs": dict(written)}))

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the label map as NIfTI, whole or not at all.

        Raises:
            OutputError: it cannot be written, or exists. UsageError: the name does not end in .nii or .nii.gz.
        """
        target = reserve(Path(path), overwrite=overwrite, inputs=[self.volume.source.path])
        write_labels(target, self.label_map, self.volume, names=self.labels)
        return target.path


def infer(
    scan: str | Path | Sequence[str | Path],
    *,
    bundle: Loadable | Sequence[Loadable] = DEFAULT_BUNDLE,
    weights: Sequence[float] | None = None,
    device: str = "auto",
    overlap: float | None = None,
    tta: bool = False,
    probabilities: bool = False,
    uncertainty: bool = False,
    evidence: bool = False,
    force: bool = False,
    volume_index: int | None = None,
    series: str | None = None,
    fix_gantry_tilt: bool = False,
    refer: bool = False,
    assign_uids: bool = False,
    backend: Backend = "auto",
    precision: Precision = "auto",
    phases: Sequence[str] = (),
    align: bool = False,
    patient: PatientFacts | None = None,
    trust: bool = False,
    volume: Volume | None = None,
    progress: Progress | None = None,
) -> Result:
    """Segment one scan.

    Args:
        scan: a volume, or one file for each channel of the bundle.
        bundle: a bundle's name or folder, or a bundle from `load_bundle`; several are averaged.
        weights: a positive number for each of several bundles; None: all the same.
        device: auto, cpu, cuda or cuda:N.
        overlap: share that neighbouring windows have in common, 0 to below 1; None takes the bundle's.
        tta: average over flips along the axes that the bundle allows.
        probabilities: keep the probability of each class on the scan's grid.
        uncertainty: also work out how sure each voxel is, and a score of the case.
        evidence: for a bundle that diagnoses: also make a map of where the most probable class sees its evidence.
        force: go on with a scan that is not what the bundle was trained on; the record keeps the warning.
        volume_index: which volume of a 4D file, for a bundle of one channel.
        series: which series of a DICOM folder or archive, see `read_volume`.
        fix_gantry_tilt: resample a sheared DICOM series to right angles instead of refusing it.
        refer: refuse a scan that DICOM outputs cannot refer to.
        assign_uids: make up the identifiers that a DICOM scan lacks, see `with_assigned_uids`.
        backend: what computes the network on the CPU: eager (PyTorch), onnxruntime or openvino; auto: the fastest that
            the bundle is cleared for, see `medseg.inference.backends`.
        precision: fp32 or bf16; auto: on the CPU bf16 where the bundle is cleared for it, on CUDA always.
        phases: for a bundle that diagnoses: the phase of each file, see `read_phases`.
        align: register the phases rigidly first.
        patient: age and sex; what is unknown there is taken from a DICOM header.
        trust: let code of a bundle run where it needs some, see `load_bundle`.
        volume: what `read_scan` made of `scan`, when that is already done.
        progress: called as the work goes on.

    Returns:
        The segmentation with its measurements and its record.

    Raises:
        UsageError, InputError, BundleError, MemoryBudgetError, DeviceError: see `medseg.errors`.
    """
    report = progress or (lambda _stage, _done, _all: None)
    clock = _Clock(report)
    target = choose_device(device)
    check_choice(backend, precision, device=target.type)
    with clock("bundle"):
        loaded = load_ensemble(bundle, weights, trust=trust)
        specs = [_spec(member.bundle, overlap) for member in loaded.members]
        flips = _flips(loaded, tta=tta)
        diagnoses = check_diagnosing(
            loaded,
            phases=bool(phases),
            align=align,
            patient=patient is not None,
            evidence=evidence,
            backend=backend,
        )
        diagnosing = Diagnosing.of(loaded.members[0].bundle) if diagnoses else None
        placement = Placement.on(target, "auto" if target.type == "cpu" and diagnosing is None else precision)
        networks: list[Predictor]
        own = own_pipeline([member.bundle for member in loaded.members], placement.device.where)
        if own is not None:
            _refuse_beside(own, overlap=overlap, probabilities=probabilities, uncertainty=uncertainty)
            networks = [own.network]
        elif diagnosing is not None:
            networks = [placement.bring(diagnosing.segmenting)]
        else:
            networks = [
                _network(member.bundle, placement, backend=backend, precision=precision) for member in loaded.members
            ]
    with clock("read"):
        if volume is None:
            volume = read_scan(
                scan,
                loaded,
                phases=phases,
                align=align,
                volume_index=volume_index,
                series=series,
                fix_gantry_tilt=fix_gantry_tilt,
            )
        if assign_uids:
            volume = with_assigned_uids(volume)
        if refer:
            check_referable(volume)
        warnings = list(volume.source.warnings)
        if isinstance(volume, PhaseVolume):
            outside = list(volume.unsuited)
        else:
            outside = list(dict.fromkeys(found for spec in specs for found in unsuitable(volume, spec)))
        if outside and not force:
            raise BundleError(
                volume.source.path,
                f"not what {loaded.name} was trained on: {'; '.join(outside)}",
                "use --force to go on",
            )
        warnings += outside
        keep = probabilities or diagnosing is not None
        passes = [len(one) for one in flips]
        _check_memory(volume, specs, passes, keep=keep, uncertainty=uncertainty, evidence=evidence)
    with clock("preprocess"):
        cases = _cases(volume, specs)
        if isinstance(volume, PhaseVolume):
            cases = [without_absent(case, volume.present) for case in cases]
    models = [
        Model(case, network, spec, member.weight, _temperature(loaded, spec), one)
        for case, network, spec, member, one in zip(cases, networks, specs, loaded.members, flips, strict=True)
    ]
    for model in models:
        if isinstance(model.network, HostNetwork):
            model.network.expect(window_total(model))
    try:
        with clock("network"):
            if own is not None:
                found = own.segment(volume)
            else:
                found = segment_together(
                    models,
                    placement,
                    probabilities=keep,
                    uncertainty=uncertainty,
                    progress=lambda done, windows: report("network", done, windows),
                )
    except NotFiniteError:
        raise BundleError(loaded.name, "produced NaN", "report it with the scan's intensity range") from None
    clock.split("network", found.network_s, "restore")
    warnings += placement.warnings
    warnings += [warning for one in networks if isinstance(one, HostNetwork) for warning in one.take_warnings()]
    warnings += dict.fromkeys(note for spec in specs for note in spec.notes)
    if loaded.own_code:
        warnings.append(f"code of the bundle ran, as --trust allows ({loaded.own_code})")
    labels = apply_label_steps(found.labels, loaded.spec.label_steps)
    labelled = loaded.spec.labels if own is None else own.labels
    codes, diagnosis, seen = dict(loaded.spec.codes), None, None
    with clock("measure"):
        if diagnosing is not None and isinstance(volume, PhaseVolume) and found.probabilities is not None:
            facts, where = patient or PatientFacts(), placement.device.where
            answer = diagnosing.answer(volume, cases[0], labels, found.probabilities, facts, where, evidence=evidence)
            diagnosis, labels, labelled, seen = answer.record, answer.labels, answer.names, answer.evidence
            codes |= {value: codes[LESION] for value in labelled if value > LESION and LESION in codes}
            warnings += answer.warnings
        statistics = tuple(label_statistics(labels, volume.affine, labelled))
    if not any(entry.voxels for entry in statistics):
        warnings.append("no structure was found")
    as_fitted = not tta and overlap is None
    sure = found.uncertainty
    record = Record(
        medseg=medseg.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        disclaimer=disclaimer_of(loaded.metadata),
        input=_input_record(scan, volume),
        bundle=_bundle_record(loaded, models),
        parameters=ParameterRecord(
            overlap=specs[0].overlap if loaded.alone else None,
            roi_size=specs[0].roi_size if loaded.alone else None,
            blend=specs[0].blend if loaded.alone else None,
            tta=tta,
            flips=sum(len(one) for one in flips),
            forced=bool(outside),
        ),
        device=str(target),
        backends=tuple(_backend_record(network, placement) for network in networks),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        windows=found.windows,
        seconds=clock.seconds,
        warnings=tuple(warnings),
        labels=tuple(
            LabelRecord(**{key: getattr(entry, key) for key in LabelRecord.model_fields}) for entry in statistics
        ),
        uncertainty=None
        if sure is None
        else _uncertainty_record(sure, loaded.spec.labels, loaded.fitted.dice if as_fitted else None),
        diagnosis=diagnosis,
    )
    return Result(
        labels,
        volume.affine,
        labelled,
        statistics,
        found.probabilities if probabilities else None,
        record,
        volume,
        None if sure is None else sure.entropy,
        None if sure is None else sure.mutual_information,
        seen,
        codes,
    )


def read_scan(
    scan: str | Path | Sequence[str | Path],
    loaded: Ensemble,
    *,
    phases: Sequence[str] = (),
    align: bool = False,
    volume_index: int | None = None,
    series: str | None = None,
    fix_gantry_tilt: bool = False,
) -> Volume:
    """Read a scan for a bundle: its channels on one grid, or the phases that there are for one that diagnoses.

    Raises:
        MedsegError: as `read_volume` and `read_phases`.
    """
    if loaded.alone and classes_of(loaded.members[0].bundle):
        return read_phases(
            scan,
            loaded.spec,
            phases=phases,
            align=align,
            volume_index=volume_index,
            series=series,
            fix_gantry_tilt=fix_gantry_tilt,
        )
    return read_volume(
        scan,
        channels=loaded.spec.in_channels,
        volume_index=volume_index,
        series=series,
        fix_gantry_tilt=fix_gantry_tilt,
    )


def check_diagnosing(
    loaded: Ensemble,
    *,
    phases: bool = False,
    align: bool = False,
    patient: bool = False,
    evidence: bool = False,
    backend: str = "auto",
) -> bool:
    """Whether a bundle diagnoses patients beside the segmentation.

    Args:
        loaded: the bundle.
        phases: whether phases are named.
        align: whether they are to be registered.
        patient: whether anything is said of the patient.
        evidence: whether an evidence map is asked for.
        backend: what is to compute the network.

    Raises:
        UsageError: options for the one kind of bundle, given with the other. BundleError: an ensemble of diagnoses.
    """
    if not any(classes_of(member.bundle) for member in loaded.members):
        for option, given in (
            ("--phase", phases),
            ("--register", align),
            ("--age, --sex, --metadata", patient),
            ("--evidence", evidence),
        ):
            if given:
                raise UsageError(option, f"{loaded.name} diagnoses no patients", "leave it out, or name another bundle")
        return False
    if not loaded.alone:
        raise BundleError(loaded.name, "diagnoses are not averaged", "use one bundle that diagnoses by itself")
    if backend in ("onnxruntime", "openvino"):
        raise UsageError("--backend", f"{loaded.name} diagnoses, which eager alone computes", "leave it out")
    return True


def _network(bundle: Bundle, placement: Placement, *, backend: str, precision: str) -> Predictor:
    """The network of one bundle, ready to run on a device: the one place where a network is made for a scan."""
    if placement.device.where.type == "cpu":
        return host_network(bundle, backend=backend, precision=precision)
    return placement.bring(bundle.network())


def _refuse_beside(own: OwnPipeline, *, overlap: float | None, probabilities: bool, uncertainty: bool) -> None:
    """Refuse what a bundle's own pipeline does not give."""
    for option, asked in (
        ("--overlap", overlap is not None),
        ("--probabilities", probabilities),
        ("--uncertainty", uncertainty),
    ):
        if asked:
            raise UsageError(option, f"{own.name} runs its own pipeline, which gives labels only", "leave it out")


def _backend_record(network: Predictor, placement: Placement) -> BackendRecord:
    if isinstance(network, HostNetwork):
        method = network.method
        return BackendRecord(name=method.backend, precision=method.precision, accuracy=method.accuracy)
    precision = placement.device.precision or "fp32"
    return BackendRecord(name="eager", precision=precision, accuracy="exact" if precision == "fp32" else "reduced")


def _cases(volume: Volume, specs: Sequence[BundleSpec]) -> list[Case]:
    """The scan as each bundle takes it; bundles that prepare it in the same way share it."""
    made: dict[object, Case] = {}
    cases = []
    for spec in specs:
        prepared = (spec.orientation, spec.spacing, spec.interpolation, spec.intensity, spec.way_back, spec.nnunet)
        if prepared not in made:
            made[prepared] = preprocess(volume, spec)
        cases.append(made[prepared])
    return cases


def _temperature(loaded: Ensemble, spec: BundleSpec) -> float:
    """Of a member: its own, times the ensemble's where there are several."""
    return spec.calibration.temperature * (1.0 if loaded.alone else loaded.calibration.temperature)


class _Clock:
    """Wall time of each stage."""

    def __init__(self, report: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._report = report

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._report(stage, 0, 1)
        begin = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - begin, 3)
        log.info("%s: %.3f s", stage, self.seconds[stage])
        self._report(stage, 1, 1)

    def split(self, stage: str, seconds: float, rest: str) -> None:
        """Give what a stage took beyond `seconds` to another one that ran at the same time."""
        self.seconds[rest] = round(max(self.seconds[stage] - seconds, 0.0), 3)
        self.seconds[stage] = round(seconds, 3)
        self._report(rest, 0, 1)
        self._report(rest, 1, 1)


def _spec(bundle: Bundle, overlap: float | None) -> BundleSpec:
    if overlap is None:
        return bundle.spec
    if not 0 <= overlap < 1:
        raise UsageError("--overlap", f"{overlap} is not in [0, 1)", "0.5 is usual")
    return replace(bundle.spec, overlap=overlap)


def _flips(loaded: Ensemble, *, tta: bool) -> list[tuple[tuple[int, ...], ...]]:
    """For each member every subset of the axes along which it allows flips, the empty one first."""
    axes = [member.bundle.spec.mirror_axes if tta else () for member in loaded.members]
    if tta and not any(axes):
        raise UsageError("--tta", f"{loaded.name} allows no flips", "run it without --tta")
    return [
        tuple(subset for size in range(len(one) + 1) for subset in itertools.combinations(one, size)) for one in axes
    ]


def _check_memory(
    volume: Volume, specs: Sequence[BundleSpec], flips: Sequence[int], *, keep: bool, uncertainty: bool, evidence: bool
) -> None:
    """Refuse a scan whose arrays cannot fit, before the first of them is made."""
    plan = memory_plan(
        volume.shape,
        volume.affine,
        *specs,
        flips=flips,
        probabilities=keep,
        uncertainty=uncertainty,
        evidence=evidence,
    )
    need, free = plan.total, available_memory()
    log.debug("memory: %.2f GiB planned, %.2f GiB free", need / 2**30, free / 2**30)
    if need > free:
        grids = dict.fromkeys(str(model_grid(volume.shape, volume.affine, spec).shape) for spec in specs)
        raise MemoryBudgetError(
            volume.source.path,
            f"needs about {need / 2**30:.1f} GiB on the model grid {', '.join(grids)}, {free / 2**30:.1f} GiB are free",
            "crop the scan, or use a machine with more memory",
        )


def _bundle_record(loaded: Ensemble, models: Sequence[Model]) -> BundleRecord:
    members = tuple(
        MemberRecord(
            name=member.bundle.name,
            version=member.bundle.version,
            weights_sha256=member.bundle.sha256,
            network=model.spec.network,
            weight=member.weight,
            temperature=model.spec.calibration.temperature,
            overlap=model.spec.overlap,
            roi_size=model.spec.roi_size,
            blend=model.spec.blend,
            flips=len(model.flips),
        )
        for member, model in zip(loaded.members, models, strict=True)
        if not loaded.alone
    )
    return BundleRecord(
        name=loaded.name,
        version=loaded.version,
        weights_sha256=loaded.sha256,
        network=loaded.spec.network if loaded.alone else "ensemble",
        own_code=loaded.own_code,
        training_cases=loaded.metadata.get("medseg", {}).get("training_cases"),
        temperature=loaded.fitted.temperature,
        members=members,
    )


def _uncertainty_record(sure: Uncertainty, labels: Mapping[int, str], fit: DiceFit | None) -> UncertaintyRecord:
    found = sure.summary
    return UncertaintyRecord(
        score=found.score,
        predicted_dice=None if fit is None or found.mean_entropy is None else _predicted_dice(fit, found.score),
        mean_entropy=found.mean_entropy,
        uncertain_share=found.uncertain_share,
        mutual_information=found.mutual_information,
        labels=tuple(
            LabelUncertainty(value=value, name=labels[value], mean_entropy=mean)
            for value, mean in found.label_entropy.items()
        ),
    )


def _predicted_dice(fit: DiceFit, score: float) -> PredictedDice:
    mean, lower, upper = fit.predict(score)
    return PredictedDice(mean=mean, lower=lower, upper=upper, cases=fit.cases)


def _input_record(scan: str | Path | Sequence[str | Path], volume: Volume) -> InputRecord:
    paths = [scan] if isinstance(scan, str | Path) else scan
    x, y, z = (round(float(value), 6) for value in geometry.spacing(volume.affine))
    return InputRecord(
        files=tuple(Path(path).name or Path(path).resolve().name for path in paths),
        sha256=volume.source.sha256,
        format=volume.source.format,
        shape=volume.shape,
        spacing_mm=(x, y, z),
        orientation=geometry.orientation(volume.affine),
    )
