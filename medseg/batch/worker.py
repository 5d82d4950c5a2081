"""What one process does with a case: read, compute, write; the model is loaded once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import medseg
from medseg.batch.cases import Case
from medseg.batch.fingerprint import Fingerprint, fingerprint
from medseg.batch.journal import Entry, Event, OutputFile
from medseg.batch.lock import holds
from medseg.bundles.ensemble import Ensemble, Member, load_ensemble
from medseg.bundles.load import Bundle, ResidentBundle
from medseg.errors import InputError, MedsegError, OutputError
from medseg.io.files import patient_names, sha256_of
from medseg.io.patients import facts_of, read_patients

if TYPE_CHECKING:
    from medseg.inference.record import Record
    from medseg.inference.run import Progress, Result
    from medseg.io.volume import Volume
    from medseg.report.outputs import Outputs

log = logging.getLogger(__name__)

MEMORY = 5
"""Exit code of a case that did not fit into memory; such a case is tried once more alone."""

_ERRORS_LOG = "internal-errors.log"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked of every case; see `medseg.inference.run.infer`."""

    device: str = "auto"
    overlap: float | None = None
    tta: bool = False
    probabilities: bool = False
    force: bool = False
    uncertainty: bool = False
    fix_gantry_tilt: bool = False
    dicom_seg: bool = False
    rtstruct: bool = False
    backend: str = "auto"
    precision: str = "auto"
    trust: bool = False
    series: str | None = None
    assign_uids: bool = False
    metadata: str | None = None
    align: bool = False
    evidence: bool = False

    def computing(self) -> dict[str, Any]:
        """What `infer` takes of it, by name."""
        asked = asdict(self)
        refer = asked.pop("dicom_seg"), asked.pop("rtstruct")
        asked.pop("metadata")
        return {**asked, "refer": any(refer)}


@dataclass(frozen=True, slots=True)
class Key:
    """What has to be equal for a result to stand; see `journal.Entry`."""

    weights_sha256: str
    settings_sha256: str

    @classmethod
    def of(cls, bundle: Ensemble, settings: Settings) -> Key:
        """The key of a bundle, or of several, and what is asked of it.

        The device is left out, so that a run begun on a cluster may end on a laptop; so are --force and --trust, which
        decide whether a scan is computed and not what comes out.
        """
        asked = {name: value for name, value in asdict(settings).items() if name not in {"device", "force", "trust"}}
        for name in ("series", "assign_uids", "metadata", "align", "evidence"):
            if not asked[name]:  # results of versions without these options stand
                del asked[name]
        configs = sha256_of(*bundle.configs())
        if settings.metadata is not None:
            asked["metadata"] = sha256_of(Path(settings.metadata))
        text = json.dumps({"configs": configs, **asked}, sort_keys=True)
        return cls(bundle.sha256, hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class ReadScan:
    """A scan in memory.

    Attributes:
        volume: its voxels.
        mark: fingerprint of its files, taken before they were read.
        seconds: what reading took.
    """

    volume: Volume
    mark: Fingerprint
    seconds: float


class Worker:
    """Computes cases one after the other.

    `read`, `compute` and `write` may run in threads of their own, for different cases at a time.

    Args:
        bundle: the bundle, or several that are averaged.
        settings: what is asked of every case.
        output: the batch's folder.
        token: the run's; given to worker processes, which stop writing when another run has taken over.
    """

    def __init__(self, bundle: Bundle | Ensemble, settings: Settings, output: Path, *, token: str = "") -> None:
        together = load_ensemble(bundle)
        members = (Member(ResidentBundle.of(member.bundle), member.weight) for member in together.members)
        self.bundle = replace(together, members=tuple(members))
        self.settings = settings
        self.output = output
        self.token = token
        self.key = Key.of(self.bundle, settings)
        self._patients = {} if settings.metadata is None else read_patients(Path(settings.metadata))
        self._computing, self._writing = threading.Lock(), threading.Lock()
        self._stopped = False

    def load(self) -> None:
        """Bring every network into memory.

        Raises:
            BundleError: one cannot be loaded.
        """
        for member in self.bundle.members:
            member.bundle.network()

    def places(self, case: Case) -> Outputs:
        """Where the outputs of a case go."""
        from medseg.report.outputs import outputs_beside

        return outputs_beside(
            labels_path(self.output, case.name),
            probabilities=self.settings.probabilities,
            uncertainty=self.settings.uncertainty,
            evidence=self.settings.evidence,
            dicom_seg=self.settings.dicom_seg,
            rtstruct=self.settings.rtstruct,
        )

    def read(self, case: Case) -> ReadScan:
        """Read a case's scan.

        Raises:
            MedsegError: as `read_scan`.
        """
        from medseg.inference.run import read_scan
        from medseg.io.read import is_dicom_input

        if case.problem:
            raise InputError(case.scans[0], case.problem, "give one file for each channel")
        begin = time.perf_counter()
        mark = fingerprint(case.scans)
        series = self.settings.series
        if series is not None and not all(map(is_dicom_input, case.scans)):
            series = None  # a batch may hold other files beside DICOM
        volume = read_scan(
            _scan(case),
            self.bundle,
            align=self.settings.align,
            series=series,
            fix_gantry_tilt=self.settings.fix_gantry_tilt,
        )
        return ReadScan(volume, mark, time.perf_counter() - begin)

    def compute(self, case: Case, scan: ReadScan, *, progress: Progress | None = None) -> Result:
        """Segment a scan that was read.

        Raises:
            MedsegError: as `infer`.
        """
        from medseg.inference.run import infer

        asked = self.settings.computing()
        patient = None
        if self.settings.metadata is not None:
            names = case.name, *patient_names(case.scans[0])
            patient = facts_of(self._patients, Path(self.settings.metadata), *names)
        result = infer(_scan(case), bundle=self.bundle, volume=scan.volume, patient=patient, progress=progress, **asked)
        seconds = result.record.seconds | {"read": round(scan.seconds, 3)}
        return replace(result, record=result.record.model_copy(update={"seconds": seconds}))

    def write(self, case: Case, scan: ReadScan, result: Result) -> Entry:
        """Write a case's outputs; the journal's line says what they are.

        Raises:
            OutputError: something cannot be written; nothing is left behind.
        """
        from medseg.report.outputs import write_outputs

        if self.token and not holds(self.output, self.token):
            raise OutputError(self.output, "another run has taken over", "wait for that run")
        begin = time.perf_counter()
        places = self.places(case)
        record = write_outputs(result, places).record
        paths = {kind: path for kind, path in places.paths().items() if kind in record.outputs}
        outputs = {kind: OutputFile(name=path.name, sha256=sha256_of(path)) for kind, path in paths.items()}
        return self._entry(
            "done",
            case,
            scan=scan.mark,
            sha256=record.input.sha256,
            forced=record.parameters.forced,
            outputs=outputs,
            seconds=record.seconds | {"write": round(time.perf_counter() - begin, 3)},
            volumes_ml={label.name: label.volume_ml for label in record.labels},
            warnings=record.warnings,
            quality=_quality(record),
            named="" if record.diagnosis is None else record.diagnosis.named,
        )

    def failed(self, case: Case, error: Exception) -> Entry:
        """The journal's line for a failure."""
        code, message = describe(error, case.name, self.output)
        try:
            mark = None if case.problem else fingerprint(case.scans)
        except MedsegError:
            mark = None
        return self._entry("failed", case, scan=mark, forced=self.settings.force, code=code, message=message)

    def started(self, case: Case) -> Entry:
        """The journal's line for a case whose outputs may appear from now on."""
        return Entry(event="started", case=case.name)

    def run(self, case: Case) -> Entry:
        """Read, compute and write one case; one thread at a time computes."""
        try:
            scan = self.read(case)
            with self._computing:
                result = self.compute(case, scan)
            with self._writing:
                if self._stopped:
                    return Entry(event="interrupted", case=case.name)
                return self.write(case, scan, result)
        except Exception as error:  # a case fails alone, whatever it fails of
            return self.failed(case, error)

    def stop(self) -> None:
        """Let `run` write nothing more; returns when nothing is being written."""
        with self._writing:
            self._stopped = True

    def _entry(
        self,
        event: Event,
        case: Case,
        *,
        scan: Fingerprint | None,
        sha256: str = "",
        forced: bool,
        outputs: Mapping[str, OutputFile] | None = None,
        seconds: Mapping[str, float] | None = None,
        volumes_ml: Mapping[str, float] | None = None,
        warnings: tuple[str, ...] = (),
        quality: Mapping[str, float] | None = None,
        named: str = "",
        code: int = 0,
        message: str = "",
    ) -> Entry:
        return Entry(
            event=event,
            case=case.name,
            medseg=medseg.__version__,
            bundle=self.bundle.name,
            weights_sha256=self.key.weights_sha256,
            settings_sha256=self.key.settings_sha256,
            scan=scan,
            sha256=sha256,
            forced=forced,
            outputs=dict(outputs or {}),
            seconds=dict(seconds or {}),
            volumes_ml=dict(volumes_ml or {}),
            warnings=warnings,
            quality=dict(quality or {}),
            named=named,
            code=code,
            message=message,
        )


def _quality(record: Record) -> dict[str, float]:
    """How good the segmentation is likely to be, rounded to what such numbers are worth."""
    sure = record.uncertainty
    if sure is None:
        return {}
    predicted = {} if sure.predicted_dice is None else {"predicted_dice": round(sure.predicted_dice.mean, 4)}
    return {"score": round(sure.score, 4), **predicted}


def labels_path(output: Path, name: str) -> Path:
    """Where the label map of a case goes."""
    return output / f"{name}_seg.nii.gz"


def describe(error: Exception, case: str, output: Path) -> tuple[int, str]:
    """Exit code and one line for a failure; an unforeseen one leaves its traceback in the batch's folder."""
    if isinstance(error, MedsegError):
        subject = Path(error.subject).name or error.subject
        return error.exit_code, f"{subject}: {error.problem}" + (f"; {error.remedy}" if error.remedy else "")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return MEMORY, "out of memory; use a smaller scan, or a machine with more memory"
    log.debug("failed", exc_info=error)
    path = output / _ERRORS_LOG
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(handle, "a", encoding="utf-8") as stream:
        stream.write(f"case {case}\n")
        traceback.print_exception(error, file=stream)
    return 1, f"internal error ({type(error).__name__}); please report it with {path.name}"


def _scan(case: Case) -> Path | list[Path]:
    return list(case.scans) if len(case.scans) > 1 else case.scans[0]


OnEntry = Callable[[Case, Entry], None]
"""Called when a case has ended, with the line that goes into the journal."""
