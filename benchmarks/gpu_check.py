"""Does medseg compute on this GPU what it computes on the CPU, does it survive a lack of memory, and is it fast?

    python benchmarks/gpu_check.py --json gpu.json        # or: make gpu-check; about ten minutes
    python benchmarks/gpu_check.py --device cpu --quick   # tries the script itself where there is no GPU

Four parts, each of one or more checks with a verdict:

- networks: every registered architecture in the small configuration of its golden case, GPU against CPU, in float32 and
  under autocast; the selective scan once in each formulation that the GPU has.
- pipeline: the shipped bundle on the shipped samples, GPU in float32 against CPU, autocast against float32.
- memory: a scan with less and less GPU memory, down to none: it has to end, with the same labels.
- speed: Swin UNETR, feature size 48, 14 classes, on a CT phantom of 512x512x300 voxels, beside MONAI's transforms,
  inferer and inverse on the same GPU; wall time and peak device memory.

The exit code is 0 when every check passed, 1 when one did not, 8 when the device is not there. Nothing is downloaded.
With `--device cpu` the memory part runs on a stand-in that refuses batches; its times say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SAMPLES = ("hippocampus_003", "hippocampus_300")

# Of float32 logits, in their standard deviations: the largest difference. Under autocast: root mean square.
EXACT, ROUNDED = 1e-3, 5e-2
# Dice of each label of the shipped bundle.
SAME_DICE, ROUNDED_DICE = 0.999, 0.998
# Share of voxels whose label may change with the size of a batch, for networks with random weights.
CHANGED = 1e-3
# What the engine is to reach beside MONAI's defaults.
FASTER, SMALLER = 1.5, 0.6


@dataclass
class Check:
    """One line of the table.

    Attributes:
        part: networks, pipeline, memory or speed.
        name: what was checked.
        verdict: FAIL when a result is wrong, MISSED when a figure is not what it should be.
        figures: what was found.
        note: in words.
    """

    part: str
    name: str
    verdict: Literal["ok", "FAIL", "MISSED"]
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def line(self) -> str:
        """For people."""
        figures = ", ".join(f"{key} {value:.4g}" for key, value in self.figures.items())
        return (
            f"{self.verdict:6s} {self.part:8s} {self.name}: {figures}{'; ' if figures and self.note else ''}{self.note}"
        )


def check_networks(device: Any) -> Iterator[Check]:
    """Every architecture on the device against the CPU."""
    import torch

    from medseg.networks.registry import create, names

    for name in names():
        described = json.loads((GOLDEN / f"{name}.json").read_text())
        config = {k: v for k, v in described["config"].items() if k not in ("checkpoint_prefix", "layout")}
        config.pop("checkpoint_container", None)
        torch.manual_seed(0)
        network, image = create(name, **config).eval(), torch.randn(described["inputs"]["image"])
        expected = _logits(network, image, torch.device("cpu"), "fp32")
        for scan in _scans(network, device):
            with _scan_by(scan):
                for precision, allowed in (("fp32", EXACT), ("auto", ROUNDED)):
                    found = _logits(network, image, device, precision)
                    difference = (found - expected) / expected.std()
                    worst = float(difference.abs().max() if precision == "fp32" else difference.square().mean().sqrt())
                    yield Check(
                        "networks",
                        f"{name}{f', scan {scan}' if scan else ''}, {precision}",
                        "ok" if worst <= allowed else "FAIL",
                        {
                            "largest" if precision == "fp32" else "rms": worst,
                            "allowed": allowed,
                            "argmax changed": float((found.argmax(1) != expected.argmax(1)).float().mean()),
                        },
                    )


def _logits(network: Any, image: Any, where: Any, precision: Any) -> Any:
    """Logits on the host, by the engine's device."""
    import torch

    from medseg.inference.device import open_device

    device = open_device(where, precision)
    with torch.inference_mode():
        return device.fetch(device.forward(network.to(where), device.send(image))).wait()


def _scans(network: Any, device: Any) -> list[str]:
    """Formulations of the selective scan that the device has; one empty name for networks without."""
    from medseg.networks.layers.vss import SS2D

    if not any(isinstance(module, SS2D) for module in network.modules()):
        return [""]
    import importlib.util

    return ["blocked", "mamba_ssm"] if device.type == "cuda" and importlib.util.find_spec("mamba_ssm") else ["blocked"]


@contextlib.contextmanager
def _scan_by(backend: str) -> Iterator[None]:
    from medseg.networks.layers import selective_scan, vss

    if not backend:
        yield
        return
    vss.scan_directions = partial(selective_scan.scan_directions, backend=backend)
    try:
        yield
    finally:
        vss.scan_directions = selective_scan.scan_directions


def check_pipeline(device: Any, *, quick: bool) -> Iterator[Check]:
    """The shipped bundle on the shipped samples."""
    import numpy as np
    import torch

    from medseg.bundles.load import load_bundle
    from medseg.bundles.locate import DEFAULT_BUNDLE
    from medseg.inference.placement import Placement
    from medseg.inference.preprocess import preprocess
    from medseg.inference.segment import segment
    from medseg.io.read import read_volume

    bundle = load_bundle(DEFAULT_BUNDLE)
    for sample in SAMPLES[:1] if quick else SAMPLES:
        volume = read_volume(ROOT / "data" / "samples" / f"{sample}.nii.gz", channels=1)
        case = preprocess(volume, bundle.spec)

        def labels(where: Any, precision: Any, case: Any = case) -> Any:
            place = Placement.on(where, precision)
            return segment(case, place.bring(bundle.network()), bundle.spec, place).labels

        exact = labels(device, "fp32")
        pairs = {
            "float32, device against CPU": (labels(torch.device("cpu"), "fp32"), exact, SAME_DICE),
            "autocast against float32": (exact, labels(device, "auto"), ROUNDED_DICE),
        }
        truth = np.asanyarray(read_volume(ROOT / "data" / "samples" / f"{sample}_label.nii.gz", channels=1).data[0])
        for name, (one, other, allowed) in pairs.items():
            lowest = min(_dice(one == value, other == value) for value in bundle.spec.labels if value)
            reference = [_dice(truth == value, other == value) for value in bundle.spec.labels if value]
            yield Check(
                "pipeline",
                f"{sample}, {name}",
                "ok" if lowest >= allowed else "FAIL",
                {"lowest Dice": lowest, "allowed": allowed, "Dice to the reference": float(np.mean(reference))},
            )


def _dice(one: Any, other: Any) -> float:
    return float(2 * (one & other).sum() / max(one.sum() + other.sum(), 1))


def check_memory(device: Any, *, quick: bool) -> Iterator[Check]:
    """A scan with less and less device memory."""
    import numpy as np
    import torch

    from medseg.benchmark.scan import phantom_ct
    from medseg.benchmark.subject import ct_spec
    from medseg.inference.device import open_device
    from medseg.inference.placement import Placement
    from medseg.inference.preprocess import preprocess
    from medseg.inference.segment import segment
    from medseg.io.volume import Source, Volume
    from medseg.networks.registry import create

    classes, window, size, feature_size = (3, (64, 32, 32), 64, 12) if quick else (14, (96, 96, 96), 192, 24)
    arguments = {"in_channels": 1, "out_channels": classes, "feature_size": feature_size}
    spec = ct_spec("swin_unetr", arguments, classes=classes, roi_size=window)
    spec = replace(spec, spacing=None)
    volume = Volume(phantom_ct((size,) * 3)[None].astype(np.float32), np.eye(4), Source(Path("phantom"), "nifti"))
    case = preprocess(volume, spec)
    torch.manual_seed(0)
    network = create("swin_unetr", **arguments).eval()

    def labels(place: Placement) -> Any:
        return segment(case, place.bring(network), spec, place).labels

    if device.type == "cuda":
        torch.cuda.empty_cache()
    expected = labels(Placement.on(device, "fp32"))
    steps: dict[str, Callable[[], Placement]]
    if device.type == "cuda":
        weights = sum(parameter.nbytes for parameter in network.parameters())
        peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory

        def limited(share: float) -> Placement:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((weights + share * (peak - weights)) / total, device)
            return Placement(open_device(device, "fp32"))

        steps = {f"{share:.0%} of what it took": partial(limited, share) for share in (0.7, 0.45, 0.25, 0.12, 0.0)}
    else:
        steps = {
            "batches of 2 at most": partial(_stand_in, most=2, passes=1000),
            "nothing after 4 passes": partial(_stand_in, most=1000, passes=4),
        }
    place = Placement()
    try:
        for name, make in steps.items():
            network.to("cpu")
            place = make()
            changed = float((labels(place) != expected).mean())
            way = "; ".join(warning.partition(": ")[2] for warning in place.warnings) or "nothing was given up"
            yield Check("memory", name, "ok" if changed <= CHANGED else "FAIL", {"labels changed": changed}, way)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    on_cpu = any("CPU" in warning for warning in place.warnings)
    yield Check("memory", "with the least, the CPU went on", "ok" if on_cpu else "FAIL")


def _stand_in(*, most: int, passes: int) -> Any:
    """A placement on the CPU whose memory is said to be full above so many windows, or after so many passes."""
    import torch

    from medseg.inference.device import Cost, HostDevice
    from medseg.inference.placement import Placement

    class Small(HostDevice):
        own_memory = True
        done = 0

        def forward(self, network: Any, batch: Any) -> Any:
            if len(batch) > most or self.done == passes:
                raise torch.OutOfMemoryError(f"{len(batch)} windows at once after {self.done} passes")
            self.done += 1
            return super().forward(network, batch)

        def cost_of(self, step: Any) -> Any:
            done = step()
            return done, Cost(1.0, 1)  # the same for any batch: larger ones pay

    return Placement(Small())


def check_speed(device: Any, *, quick: bool, rounds: int) -> Iterator[Check]:
    """Wall time and device memory beside MONAI."""
    from medseg.benchmark.run import Request, measure
    from medseg.benchmark.scan import save_phantom_ct
    from medseg.benchmark.speed import benchmark_speed
    from medseg.benchmark.subject import Subject, random_bundle

    shape, spacing, window, feature_size, classes = (
        ((64, 36, 32), (1.5, 1.5, 1.5), (64, 32, 32), 12, 3)
        if quick
        else ((512, 512, 300), (0.8, 0.8, 1.5), (96, 96, 96), 48, 14)
    )
    with tempfile.TemporaryDirectory(prefix="medseg-gpu-check-") as name:
        folder = Path(name)
        root = folder / "swin_unetr_random"
        random_bundle(root, "swin_unetr", {"feature_size": feature_size}, classes=classes, roi_size=window)
        scan = folder / "phantom.nii.gz"
        save_phantom_ct(scan, shape, spacing)
        subject = Subject(bundle=str(root))
        runs: dict[str, Any] = {}
        note, changed = "", 0.0
        if quick:  # in this process, and once: it is the script that is tried
            from medseg.benchmark.agreement import file_agreement

            for engine in ("medseg", "monai"):
                request = Request(
                    engine=engine, subject=subject, scans=(str(scan),), output=str(folder / f"{engine}.nii.gz"),
                    device=str(device), threads=1,
                )  # fmt: skip
                runs[engine] = [measure(request).run]
            changed = file_agreement(folder / "medseg.nii.gz", folder / "monai.nii.gz").changed
        else:
            report = benchmark_speed(
                subject, [scan], against=["monai"], device=str(device), threads=_cores(), repeat=rounds,
                progress=lambda line: print(f"       speed: {line}", flush=True),
            )  # fmt: skip
            baseline = report.baselines[0]
            runs = {"medseg": list(report.runs), "monai": list(baseline.runs)}
            note = f"MONAI: {baseline.error}" if baseline.error else ""
            changed = baseline.agreement.changed if baseline.agreement else 0.0
    wall = {engine: _median([run.wall_s for run in found]) for engine, found in runs.items()}
    peak = {engine: _median([run.peak_gpu_mib or 0.0 for run in found]) for engine, found in runs.items()}
    faster, smaller = wall["monai"] / wall["medseg"], peak["medseg"] / peak["monai"] if peak["monai"] else 0.0
    seconds = {f"{engine} s": value for engine, value in wall.items()}
    if note:
        yield Check("speed", "beside MONAI", "MISSED", seconds, note)
        return
    timed = not quick and device.type == "cuda"
    yield Check(
        "speed",
        f"wall time, at least {FASTER} times less than MONAI",
        "ok" if not timed or faster >= FASTER else "MISSED",
        {**seconds, "times": faster, "labels changed": changed},
        "" if timed else "not judged: a trial of the script",
    )
    yield Check(
        "speed",
        f"peak device memory, at most {SMALLER} of MONAI's",
        "ok" if not timed or smaller <= SMALLER else "MISSED",
        {**{f"{engine} MiB": value for engine, value in peak.items()}, "share": smaller},
        "" if timed else "not judged: a trial of the script",
    )


def _median(values: list[float]) -> float:
    import statistics

    return statistics.median(values) if values else float("nan")


def _cores() -> int:
    from medseg.benchmark.machine import cores

    return cores()


def describe(device: Any) -> dict[str, str]:
    """The machine."""
    import torch

    found = {"torch": torch.__version__, "python": platform.python_version(), "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "cuda": str(torch.version.cuda),
            "bf16": str(torch.cuda.is_bf16_supported(including_emulation=False)),
        }
    return found


PARTS = ("networks", "pipeline", "memory", "speed")


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; speed is not judged")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="of the speed part, after one that does not count")
    parser.add_argument("--json", type=Path, help="write all figures there")
    chosen = parser.parse_args(arguments)

    from medseg.errors import MedsegError
    from medseg.inference.device import choose_device

    try:
        device = choose_device(chosen.device)
    except MedsegError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    machine = describe(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    parts: dict[str, Callable[..., Iterator[Check]]] = {
        "networks": check_networks,
        "pipeline": partial(check_pipeline, quick=chosen.quick),
        "memory": partial(check_memory, quick=chosen.quick),
        "speed": partial(check_speed, quick=chosen.quick, rounds=chosen.rounds),
    }
    checks: list[Check] = []
    seconds: dict[str, float] = {}
    for part in chosen.only or PARTS:
        begin = time.perf_counter()
        try:
            for check in parts[part](device):
                checks.append(check)
                print(check.line(), flush=True)
        except Exception as error:  # the other parts still have their say
            checks.append(Check(part, "ended early", "FAIL", note=f"{type(error).__name__}: {error}"))
            print(checks[-1].line(), flush=True)
        seconds[part] = round(time.perf_counter() - begin, 1)
    bad = [check for check in checks if check.verdict != "ok"]
    print(f"\n{len(checks) - len(bad)} of {len(checks)} checks passed; " + (
        "; ".join(f"{check.verdict} {check.part}: {check.name}" for check in bad) if bad else "verdict: ok"
    ))  # fmt: skip
    if chosen.json:
        report = {"machine": machine, "quick": chosen.quick, "seconds": seconds, "checks": [asdict(c) for c in checks]}
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
