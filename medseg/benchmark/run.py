"""One measured run in a process of its own: a request on stdin, figures on stdout, both JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from medseg.benchmark.meter import Meter, NetworkClock, peak_rss_mib
from medseg.benchmark.subject import Subject
from medseg.errors import MedsegError
from medseg.inference.backends.host import Backend
from medseg.inference.device import Precision
from medseg.inference.record import BackendRecord

Engine = Literal["medseg", "monai", "nnunet"]
PACKAGES: dict[Engine, str] = {"medseg": "medseg", "monai": "monai", "nnunet": "nnunetv2"}
"""The package that an engine comes in."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Request(_Strict):
    """What a measured process is asked to do."""

    engine: Engine
    subject: Subject
    scans: tuple[str, ...]
    output: str
    device: str
    threads: int
    backend: Backend = "eager"
    precision: Precision = "auto"


class Run(_Strict):
    """Figures of one run. Loading the weights and measuring the labels are in no figure but those of memory."""

    wall_s: float = Field(description="From reading the scan to the written label map.")
    cpu_s: float = Field(description="CPU seconds of the same, all threads together.")
    net_cpu_s: float = Field(description="CPU seconds within the network's forward pass.")
    overhead_cpu_s: float = Field(description="cpu_s without net_cpu_s.")
    import_rss_mib: float = Field(description="Peak resident memory after the imports.")
    peak_rss_mib: float = Field(description="Peak resident memory in the end.")
    above_imports_mib: float = Field(description="The difference of the two.")
    peak_gpu_mib: float | None = Field(description="Peak of what torch had allocated on the GPU; null on a CPU.")
    steps: dict[str, float] = Field(
        description="CPU seconds: read, preprocess, network, restore (blending and the way back to the scan's grid), "
        "write."
    )
    seconds: dict[str, float] = Field(description="Wall seconds of the same steps.")


class Answer(_Strict):
    """What a measured process says in the end: a run, or why there is none."""

    run: Run | None = None
    version: str = Field(default="", description="Of the engine's package.")
    torch: str = ""
    device: str = ""
    backend: str = "eager"
    precision: str = "fp32"
    windows: int = Field(default=0, description="Windows that cover the scan.")
    windows_evaluated: int = Field(default=0, description="Windows that the network saw.")
    error: str = ""
    exit_code: int = 0


STEPS = ("read", "preprocess", "network", "restore", "write")


def measure(request: Request) -> Answer:
    """Run a pipeline in this process, which should be a fresh one.

    Raises:
        MedsegError: the pipeline cannot take the bundle or the scan.
    """
    import torch

    torch.set_num_threads(request.threads)
    from medseg.inference.device import choose_device

    if request.engine == "medseg":
        from medseg.benchmark.medseg_pipeline import run_medseg
    elif request.engine == "monai":
        from medseg.benchmark.monai_pipeline import run_monai as pipeline
    else:
        from medseg.benchmark.nnunet_pipeline import run_nnunet as pipeline
    bundle, device = request.subject.load(), choose_device(request.device)
    if request.subject.bundle:
        from medseg.networks.registry import network_class

        network_class(bundle.spec.network)  # its imports belong to the others
    imports, meter, clock = peak_rss_mib(), Meter(), NetworkClock()
    scans = [Path(scan) for scan in request.scans]
    measured = (bundle, scans, Path(request.output), device, meter, clock)
    used = BackendRecord(name="eager", precision="fp32", accuracy="exact")
    if request.engine == "medseg":
        windows, used = run_medseg(*measured, backend=request.backend, precision=request.precision)
    else:
        windows = pipeline(*measured)
    meter.end()
    peak = peak_rss_mib()
    cpu, wall = meter.cpu_s, meter.wall_s
    cpu["restore"] = cpu["network"] + cpu.get("restore", 0.0) - clock.cpu_s
    cpu["network"] = clock.cpu_s
    total = sum(cpu[step] for step in STEPS)
    run = Run(
        wall_s=sum(wall.get(step, 0.0) for step in STEPS),
        cpu_s=total,
        net_cpu_s=clock.cpu_s,
        overhead_cpu_s=total - clock.cpu_s,
        import_rss_mib=imports,
        peak_rss_mib=peak,
        above_imports_mib=peak - imports,
        peak_gpu_mib=torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
        steps={step: cpu[step] for step in STEPS},
        seconds={step: wall.get(step, 0.0) for step in STEPS},
    )
    return Answer(
        run=run,
        version=importlib.metadata.version(PACKAGES[request.engine]),
        torch=torch.__version__,
        device=str(device),
        backend=used.name,
        precision=used.precision,
        windows=windows,
        windows_evaluated=clock.windows,
    )


def main() -> None:
    """Answer the request on stdin; what libraries print goes to stderr."""
    request = Request.model_validate_json(sys.stdin.read())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = measure(request)
    except MedsegError as error:
        answer = Answer(error=str(error), exit_code=error.exit_code)
    print(answer.model_dump_json())  # noqa: T201 - the other side reads it


if __name__ == "__main__":
    main()
