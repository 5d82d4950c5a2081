"""medseg beside other pipelines: the same weights on the same scan, a fresh process for each run, all in turn."""

from __future__ import annotations

import hashlib
import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

import medseg
from medseg.benchmark.agreement import Agreement, file_agreement
from medseg.benchmark.failure import error_of, last_line
from medseg.benchmark.machine import cpu_name, environment, load_average
from medseg.benchmark.run import PACKAGES, Answer, Engine, Request, Run
from medseg.benchmark.subject import Subject
from medseg.inference.backends.host import Backend
from medseg.inference.device import Precision
from medseg.io import geometry
from medseg.io.files import sha256_of
from medseg.io.read import read_labels

Progress = Callable[[str], None]
"""Called with one line before each run."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BundleEntry(_Strict):
    """The bundle that was measured; of random weights the SHA-256 says which."""

    name: str
    sha256: str


class ImageEntry(_Strict):
    """The scan."""

    shape: tuple[int, int, int] = Field(description="Voxels (X, Y, Z).")
    spacing: tuple[float, float, float] = Field(description="Voxel size in mm.")
    sha256: str = Field(description="Of the files' bytes, in order.")


class Medians(_Strict):
    """Medians over the runs."""

    wall_s: float
    cpu_s: float
    net_cpu_s: float
    overhead_cpu_s: float
    peak_rss_mib: float
    above_imports_mib: float
    peak_gpu_mib: float | None = Field(description="Null on a CPU.")


class LabelsEntry(_Strict):
    """medseg's label map."""

    sha256: str = Field(description="Of the labels in C order, 8 bits each or 16.")
    counts: tuple[int, ...] = Field(description="Voxels of each value from 0 on.")


class Ratio(_Strict):
    """The baseline's figure over medseg's: above 1, medseg needs less. Medians of the rounds' ratios.

    Null where medseg's figure is 0, or where there is none.
    """

    wall: float | None
    cpu: float | None
    overhead: float | None
    peak_rss: float | None = Field(description="Of the memory above that after the imports.")
    peak_gpu: float | None


class Baseline(_Strict):
    """Another pipeline; either figures or `error`."""

    name: str
    version: str = ""
    runs: tuple[Run, ...] = ()
    median: Medians | None = None
    ratio: Ratio | None = None
    agreement: Agreement | None = Field(default=None, description="medseg's labels beside this pipeline's.")
    error: str | None = None


class SpeedReport(_Strict):
    """Everything that a measurement of speed says."""

    schema_version: Literal[1] = Field(default=1, serialization_alias="schema")
    medseg: str
    torch: str
    device: str
    cpu: str
    threads: int
    load: float | None = Field(description="Load average before the first run; far above 0: the times say little.")
    bundle: BundleEntry
    image: ImageEntry
    backend: str = Field(description="What computed medseg's network; the others are PyTorch in float32.")
    precision: str
    windows: int
    windows_evaluated: int
    windows_reused: int
    runs: tuple[Run, ...]
    median: Medians
    labels: LabelsEntry
    baselines: tuple[Baseline, ...]

    def to_json(self) -> str:
        """The report as JSON."""
        return self.model_dump_json(indent=1, by_alias=True) + "\n"


@dataclass
class _Pipeline:
    """A pipeline on its way: what its runs have answered, and what ended them."""

    engine: Engine
    output: Path
    answers: list[Answer] = field(default_factory=list)
    error: str = ""


def benchmark_speed(
    subject: Subject,
    scans: Sequence[Path],
    *,
    against: Sequence[Engine] = (),
    device: str = "cpu",
    threads: int = 1,
    repeat: int = 3,
    backend: Backend = "eager",
    precision: Precision = "auto",
    progress: Progress | None = None,
) -> SpeedReport:
    """Measure medseg and other pipelines in turn.

    Args:
        subject: what to run.
        scans: a file for each channel of the bundle, or one.
        against: other pipelines; one that is not installed, or fails, gets an entry that says so.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads of each process.
        repeat: rounds that count; one before them does not.
        backend: medseg's, as for `infer`.
        precision: medseg's, as for `infer`.
        progress: called before each run.

    Raises:
        MedsegError: medseg itself cannot take the bundle or the scan.
    """
    bundle = subject.load()
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="medseg-benchmark-") as folder:
        pipelines = [_Pipeline(engine, Path(folder) / f"{engine}.nii.gz") for engine in ("medseg", *against)]
        for pipeline in pipelines:
            package = PACKAGES[pipeline.engine]
            if importlib.util.find_spec(package) is None:
                pipeline.error = f"{package} is not installed"
        for number in range(repeat + 1):
            for pipeline in pipelines:
                if pipeline.error:
                    continue
                if progress is not None:
                    progress(f"{pipeline.engine}: {f'round {number} of {repeat}' if number else 'warm-up'}")
                request = Request(
                    engine=pipeline.engine,
                    subject=subject,
                    scans=tuple(str(scan) for scan in scans),
                    output=str(pipeline.output),
                    device=device,
                    threads=threads,
                    backend=backend,
                    precision=precision,
                )
                answer = _ask(request)
                if answer.run is None and pipeline.engine == "medseg":
                    raise error_of(answer.error, answer.exit_code)
                pipeline.error = answer.error
                if number:
                    pipeline.answers.append(answer)
        ours = pipelines[0]
        runs = _runs(ours)
        labels, affine = read_labels(ours.output)
        x, y, z = (round(float(size), 6) for size in geometry.spacing(affine))
        last = ours.answers[-1]
        return SpeedReport(
            medseg=medseg.__version__,
            torch=last.torch,
            device=last.device,
            cpu=cpu_name(),
            threads=threads,
            load=load,
            bundle=BundleEntry(name=bundle.name, sha256=bundle.sha256),
            image=ImageEntry(shape=labels.shape, spacing=(x, y, z), sha256=sha256_of(*scans)),
            backend=last.backend,
            precision=last.precision,
            windows=last.windows,
            windows_evaluated=last.windows_evaluated,
            windows_reused=last.windows - last.windows_evaluated,
            runs=runs,
            median=_medians(runs),
            labels=LabelsEntry(
                sha256=hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest(),
                counts=tuple(int(count) for count in np.bincount(labels.ravel())),
            ),
            baselines=tuple(_baseline(pipeline, runs, ours.output) for pipeline in pipelines[1:]),
        )


def _ask(request: Request) -> Answer:
    """The answer of a fresh process."""
    command = [sys.executable, "-m", "medseg.benchmark.run"]
    done = subprocess.run(  # noqa: S603 - this interpreter and a module of this package
        command,
        input=request.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
        env=environment(request.threads),
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return Answer.model_validate_json(lines[-1])
    return Answer(error=f"the process ended with {done.returncode}: {last_line(done.stderr)}", exit_code=1)


def _baseline(pipeline: _Pipeline, ours: Sequence[Run], labels: Path) -> Baseline:
    if pipeline.error:
        return Baseline(name=pipeline.engine, error=pipeline.error)
    runs = _runs(pipeline)

    def ratio(figure: str) -> float | None:
        pairs = [(getattr(own, figure), getattr(other, figure)) for own, other in zip(ours, runs, strict=True)]
        if not all(own and other is not None for own, other in pairs):
            return None
        return float(statistics.median(other / own for own, other in pairs))

    return Baseline(
        name=pipeline.engine,
        version=pipeline.answers[-1].version,
        runs=runs,
        median=_medians(runs),
        ratio=Ratio(
            wall=ratio("wall_s"),
            cpu=ratio("cpu_s"),
            overhead=ratio("overhead_cpu_s"),
            peak_rss=ratio("above_imports_mib"),
            peak_gpu=ratio("peak_gpu_mib"),
        ),
        agreement=file_agreement(labels, pipeline.output),
    )


def _runs(pipeline: _Pipeline) -> tuple[Run, ...]:
    return tuple(answer.run for answer in pipeline.answers if answer.run is not None)


def _medians(runs: Sequence[Run]) -> Medians:
    columns = {name: [getattr(run, name) for run in runs] for name in Medians.model_fields}
    return Medians.model_validate(
        {name: None if None in values else statistics.median(values) for name, values in columns.items()}
    )
