"""medseg's engine against MONAI's pipeline: same weights, same scan, one label map each.

    python benchmarks/engine.py                                        # the cases of docs/engine.md
    python benchmarks/engine.py --case quant-14 --rounds 5 --threads 1 --json engine.json

MONAI's pipeline is LoadImaged, Orientationd, Spacingd, ScaleIntensityRanged, SlidingWindowInferer, softmax, Invertd
(linear), argmax, NIfTI. Every run is a process of its own and the two alternate. Time counts from reading the scan to
the file that is written, imports excluded; "outside" is CPU time without the network. Peak memory is that of the
process above what it held after its imports.

`quant` is a cheap network, a mean over 5x5x5 voxels and a quantisation of the intensity into classes, which leaves
nothing but the engine; its label map on noise is harder on the resampling than that of a trained network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ENGINES = ("monai", "medseg")
SPACING = (1.5, 1.5, 1.5)
LOWER, UPPER = -160.0, 240.0


@dataclass(frozen=True)
class Case:
    """A scan and a network.

    Attributes:
        network: quant, basicunet or swin_unetr.
        classes: of the network.
        shape: of the scan in voxels.
        spacing: of the scan in mm.
        overlap: of the windows, which are 96 voxels wide.
    """

    network: str
    classes: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] = (1.2, 1.2, 2.0)
    overlap: float = 0.5


CASES = {
    "quant-14": Case("quant", 14, (256, 256, 160)),
    "quant-104": Case("quant", 104, (160, 160, 120)),
    "basicunet-14": Case("basicunet", 14, (144, 144, 80)),
    "swin-unetr-14": Case("swin_unetr", 14, (144, 144, 80)),
    "large-104": Case("quant", 104, (512, 512, 400), (0.8, 0.8, 1.0)),
}
DEFAULT = ("quant-14", "quant-104", "basicunet-14", "swin-unetr-14")


def phantom(shape: tuple[int, int, int]) -> np.ndarray:
    """A CT-like volume: an elliptic body in air, organs, a table, noise; (X, Y, Z) int16, HU."""
    random = np.random.default_rng(0)
    x, y, z = (np.linspace(-1, 1, n, dtype=np.float32).reshape([-1 if a == b else 1 for b in range(3)])
               for a, n in enumerate(shape))  # fmt: skip
    body = (x / 0.8) ** 2 + (y / 0.55) ** 2 < 1 + 0.1 * np.cos(3 * z)
    scan = np.where(body, np.float32(40), np.float32(-1000))
    for _ in range(13):
        centre, radius = random.uniform(-0.4, 0.4, 3) * (1, 0.7, 1.6), random.uniform(0.08, 0.26, 3)
        inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip((x, y, z), centre, radius, strict=True)) < 1
        scan[inside & body] = random.uniform(-100, 250)
    scan[:, int(0.86 * shape[1]) : int(0.88 * shape[1])] = 120
    for plane in scan:
        plane += random.normal(0, 15, plane.shape).astype(np.float32)
    return np.clip(np.rint(scan), -1024, 3071).astype(np.int16)


def network_of(case: Case) -> Any:
    """The network with fixed random weights, in a module that adds up its CPU time."""
    import torch
    from torch import nn

    class Quant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            means = torch.linspace(0, 1, case.classes)
            self.register_buffer("slope", (80 * means).reshape(1, -1, 1, 1, 1))
            self.register_buffer("offset", (-40 * means**2).reshape(1, -1, 1, 1, 1))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            smooth = nn.functional.avg_pool3d(image, 5, 1, 2)
            return smooth * self.slope + self.offset

    class Timed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.cpu_s, self.windows = inner, 0.0, 0

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            begin = time.process_time()
            logits: torch.Tensor = self.inner(image)
            self.cpu_s += time.process_time() - begin
            self.windows += len(image)
            return logits

    torch.manual_seed(0)
    if case.network == "quant":
        return Timed(Quant()).eval()
    if case.network == "basicunet":
        from monai.networks.nets import BasicUNet

        return Timed(BasicUNet(3, 1, case.classes, features=(16, 16, 32, 64, 128, 16))).eval()
    from medseg.networks.registry import create

    return Timed(create("swin_unetr", in_channels=1, out_channels=case.classes, feature_size=12)).eval()


def run_monai(case: Case, scan: Path, output: Path, network: Any) -> None:
    """MONAI's pipeline."""
    import nibabel as nib
    import torch
    from monai import transforms as mt
    from monai.inferers import SlidingWindowInferer

    forward = mt.Compose([
        mt.LoadImaged("image"),
        mt.EnsureChannelFirstd("image"),
        mt.Orientationd("image", axcodes="RAS", labels=None),
        mt.Spacingd("image", pixdim=SPACING, mode="bilinear"),
        mt.ScaleIntensityRanged("image", a_min=LOWER, a_max=UPPER, b_min=0, b_max=1, clip=True),
        mt.EnsureTyped("image"),
    ])  # fmt: skip
    back = mt.Compose([
        mt.Activationsd("pred", softmax=True),
        mt.Invertd("pred", transform=forward, orig_keys="image", nearest_interp=False, to_tensor=True),
        mt.AsDiscreted("pred", argmax=True),
    ])  # fmt: skip
    data = forward({"image": scan})
    with torch.inference_mode():
        inferer = SlidingWindowInferer((96,) * 3, sw_batch_size=1, overlap=case.overlap, mode="gaussian")
        data["pred"] = inferer(data["image"][None], network)[0]
    labels = np.asarray(back(data)["pred"][0]).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, nib.load(scan).affine), output)


def run_medseg(case: Case, scan: Path, output: Path, network: Any) -> None:
    """What `medseg.infer` does between loading a bundle and measuring its labels."""
    from medseg.bundles.spec import BundleSpec, ScaleIntensityRange
    from medseg.inference.preprocess import preprocess
    from medseg.inference.segment import segment
    from medseg.io.read import read_volume
    from medseg.io.write import reserve, write_labels

    spec = BundleSpec(
        network="",
        network_args={},
        channels=("CT",),
        labels={value: str(value) for value in range(case.classes)},
        roi_size=(96, 96, 96),
        spacing=SPACING,
        intensity=(ScaleIntensityRange(LOWER, UPPER),),
        overlap=case.overlap,
    )
    volume = read_volume(scan)
    found = segment(preprocess(volume, spec), network, spec)
    write_labels(reserve(output, overwrite=True), found.labels, volume, names=spec.labels)


def memory_mib(field: str) -> float:
    """A line of this process's status, VmRSS or VmHWM, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def child(engine: str, case: Case, scan: Path, output: Path, threads: int) -> None:
    """One run; prints one JSON line."""
    import monai.inferers
    import monai.transforms  # noqa: F401
    import torch

    import medseg.inference.segment
    import medseg.io.read
    import medseg.io.write  # noqa: F401

    torch.set_num_threads(threads)
    network = network_of(case)
    before, wall, cpu = memory_mib("VmRSS"), time.perf_counter(), time.process_time()
    {"monai": run_monai, "medseg": run_medseg}[engine](case, scan, output, network)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = {
        "engine": engine,
        "wall_s": wall,
        "cpu_s": cpu,
        "outside_cpu_s": cpu - network.cpu_s,
        "windows": network.windows,
        "peak_mib": memory_mib("VmHWM") - before,
    }
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}))


def agreement(one: Path, other: Path) -> dict[str, float]:
    """How two label maps differ."""
    import nibabel as nib

    first, second = (np.asanyarray(nib.load(path).dataobj) for path in (one, other))
    scores = []
    for label in np.unique(first)[1:]:
        a, b = first == label, second == label
        if a.sum() >= 1000:
            scores.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return {
        "changed": float((first != second).mean()),
        "lowest_dice": float(min(scores, default=1.0)),
        "labels": len(scores),
    }


def compare(name: str, engines: tuple[str, ...], rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """Run a case with each engine in turn, and compare."""
    import nibabel as nib

    case = CASES[name]
    scan = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(phantom(case.shape), np.diag([*case.spacing, 1.0])), scan)
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    for number in range(rounds):
        for engine in engines:
            command = [sys.executable, __file__, "--child", engine, "--case", name, "--threads", str(threads)]
            command += ["--scan", str(scan), "--output", str(folder / f"{name}-{engine}.nii.gz")]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603
            runs[engine].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name} round {number + 1}: {done.stdout.splitlines()[-1]}", file=sys.stderr)
    keys = ("wall_s", "cpu_s", "outside_cpu_s", "peak_mib")
    result: dict[str, Any] = {"case": name, **asdict(case), "runs": runs}
    result["median"] = {e: {key: statistics.median(run[key] for run in runs[e]) for key in keys} for e in engines}
    if engines == ENGINES:
        pairs = list(zip(*(runs[engine] for engine in engines), strict=True))
        result["ratio"] = {key: statistics.median(theirs[key] / ours[key] for theirs, ours in pairs) for key in keys}
        result["agreement"] = agreement(*(folder / f"{name}-{engine}.nii.gz" for engine in engines))
    return result


def main() -> None:
    """Parse, run, print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--engine", action="append", choices=ENGINES, help="leave one out, e.g. for large-104")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    for hidden in ("--child", "--scan", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.child, CASES[chosen.case[0]], Path(chosen.scan), Path(chosen.output), chosen.threads)
        return
    engines = tuple(engine for engine in ENGINES if engine in (chosen.engine or ENGINES))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        results = [
            compare(name, engines, chosen.rounds, chosen.threads, Path(folder)) for name in chosen.case or DEFAULT
        ]
    print("| case | engine | wall s | CPU s | outside CPU s | peak MiB | changed | lowest Dice |")
    print("|---|---|---|---|---|---|---|---|")
    for found in results:
        for engine in engines:
            row = " | ".join(f"{value:.2f}" for value in found["median"][engine].values())
            print(f"| {found['case']} | {engine} | {row} | | |")
        if "ratio" in found:
            row = " | ".join(f"{value:.2f}x" for value in found["ratio"].values())
            same = found["agreement"]
            print(f"| {found['case']} | ratio | {row} | {same['changed']:.1e} | {same['lowest_dice']:.5f} |")
    report = {"machine": platform.machine(), "threads": chosen.threads, "load_at_start": load, "results": results}
    print(json.dumps(report))
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
