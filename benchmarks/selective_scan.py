"""The selective scan's formulations against the plain PyTorch loop, forward and with backward.

    python benchmarks/selective_scan.py                        # L = 4096, D = 192, N = 16, K = 4; one and two threads
    python benchmarks/selective_scan.py --length 6400 --threads 1 --json scan.json
    python benchmarks/selective_scan.py --device cuda          # where there is one

Each round runs every formulation once, one after the other, so that a busy machine slows all of them; the ratio is the
median over the rounds of the loop's time by the formulation's, once by wall and once by CPU time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from medseg.networks.layers.selective_scan import BACKENDS, scan_directions, selective_scan


@dataclass(frozen=True)
class Row:
    """One formulation's times.

    Attributes:
        formulation: its name.
        threads: PyTorch's threads.
        forward_ms: median wall time without gradients.
        training_ms: median wall time forward and backward.
        forward_cpu_ms: median CPU time of the process, all threads.
        training_cpu_ms: likewise.
        forward_ratio: how many times as fast as the loop of the same round by wall time, median.
        training_ratio: likewise, forward and backward.
        forward_cpu_ratio: by CPU time, which another program's load disturbs less.
        training_cpu_ratio: likewise.
        error: largest absolute difference of the result from the loop's.
        first_call_s: what the first forward and backward took, compiling included.
    """

    formulation: str
    threads: int
    forward_ms: float
    training_ms: float
    forward_cpu_ms: float
    training_cpu_ms: float
    forward_ratio: float
    training_ratio: float
    forward_cpu_ratio: float
    training_cpu_ratio: float
    error: float
    first_call_s: float


def draw_inputs(args: argparse.Namespace) -> tuple[list[Tensor], Tensor]:
    """u, dt, a, b, c, d, bias as in a trained network, and a gradient of the result."""
    torch.manual_seed(0)
    batch, groups, length, state = args.batch, args.groups, args.length, args.state
    rows = groups * args.channels
    inputs = [
        torch.randn(batch, rows, length),
        torch.randn(batch, rows, length),
        -torch.exp(torch.arange(1.0, state + 1).log() + 0.1 * torch.randn(rows, state)),
        torch.randn(batch, groups, state, length),
        torch.randn(batch, groups, state, length),
        1 + 0.1 * torch.randn(rows),
        -4 + 0.5 * torch.randn(rows),
    ]
    return [x.to(args.device).requires_grad_() for x in inputs], torch.randn(batch, rows, length, device=args.device)


def timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(args: argparse.Namespace, threads: int) -> list[Row]:
    """Time every formulation in turn, `args.rounds` times."""
    torch.set_num_threads(threads)
    inputs, gy = draw_inputs(args)
    channels_last = [x.detach().contiguous().requires_grad_() for x in to_channels_last(inputs, args.groups)]
    gy_last = gy.unflatten(1, (args.groups, -1)).transpose(2, 3).contiguous()
    published = {name: (name, selective_scan, inputs, gy) for name in args.formulations}
    runs = list(published.values())
    if "numba" in published:
        runs.append(("numba, channels last", scan_directions, channels_last, gy_last))

    def forward(backend: str, scan: Callable[..., Tensor], leaves: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return scan(*leaves, backend=backend)

    def training(backend: str, scan: Callable[..., Tensor], leaves: list[Tensor], weights: Tensor) -> None:
        torch.autograd.grad(scan(*leaves, backend=backend), leaves, weights)

    reference = forward("loop", selective_scan, inputs)
    first, errors = {}, {}
    times: dict[str, list[tuple[float, float, float, float]]] = {}
    for name, scan, leaves, weights in runs:
        backend = name.partition(",")[0]
        first[name], _ = timed(lambda run=(backend, scan, leaves, weights): training(*run), args.device)  # type: ignore[misc]
        y = forward(backend, scan, leaves)
        errors[name] = float(((y.transpose(2, 3).flatten(1, 2) if y.ndim == 4 else y) - reference).abs().max())
        times[name] = []
    for _ in range(args.rounds):
        for name, scan, leaves, weights in runs:
            backend = name.partition(",")[0]
            one = timed(lambda run=(backend, scan, leaves): forward(*run), args.device)  # type: ignore[misc]
            both = timed(lambda run=(backend, scan, leaves, weights): training(*run), args.device)  # type: ignore[misc]
            times[name].append((*one, *both))

    def median(name: str, column: int) -> float:
        return 1e3 * statistics.median(round_[column] for round_ in times[name])

    def ratio(name: str, column: int) -> float:
        pairs = zip(times["loop"], times[name], strict=True)
        return statistics.median(loop[column] / own[column] for loop, own in pairs)

    return [
        Row(
            name, threads, median(name, 0), median(name, 2), median(name, 1), median(name, 3),
            ratio(name, 0), ratio(name, 2), ratio(name, 1), ratio(name, 3), errors[name], first[name],
        )
        for name in times
    ]  # fmt: skip


def to_channels_last(inputs: list[Tensor], groups: int) -> list[Tensor]:
    """The inputs of `selective_scan` as those of `scan_directions`, which is how the networks have them."""
    u, dt, a, b, c, d, bias = inputs
    u, dt = (x.unflatten(1, (groups, -1)).transpose(2, 3) for x in (u, dt))
    a, d, bias = (x.unflatten(0, (groups, -1)) for x in (a, d, bias))
    return [u, dt, a, b.transpose(2, 3), c.transpose(2, 3), d, bias]


def main() -> None:
    """Measure, print the table and the JSON."""
    parser = argparse.ArgumentParser(description="Time the selective scan's formulations against the plain loop.")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--groups", type=int, default=4, help="K, directions")
    parser.add_argument("--channels", type=int, default=192, help="D, channels of a direction")
    parser.add_argument("--state", type=int, default=16, help="N")
    parser.add_argument("--length", type=int, default=4096, help="L, steps")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--formulations", nargs="+", choices=BACKENDS[1:], help="besides the loop; all of the device")
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    chosen = args.formulations or (["numba", "blocked"] if args.device == "cpu" else ["blocked"])
    args.formulations = ["loop", *(name for name in chosen if name != "loop")]

    rows = [row for threads in args.threads for row in measure(args, threads)]

    sizes = f"B={args.batch} K={args.groups} D={args.channels} N={args.state} L={args.length}"
    print(
        f"{sizes}, {args.device}, torch {torch.__version__}, {args.rounds} rounds; wall ms, times as fast as the loop"
    )
    columns = f"{'ms':>10}{'by wall':>9}{'by CPU':>8}"
    print(f"{'':30}{'forward':>27}{'forward and backward':>27}")
    print(f"{'formulation':22}{'threads':>8}{columns}{columns}{'error':>9}")
    for row in rows:
        print(
            f"{row.formulation:22}{row.threads:8}"
            f"{row.forward_ms:10.1f}{row.forward_ratio:9.1f}{row.forward_cpu_ratio:8.1f}"
            f"{row.training_ms:10.1f}{row.training_ratio:9.1f}{row.training_cpu_ratio:8.1f}{row.error:9.1e}"
        )
    record = {
        "sizes": {name: getattr(args, name) for name in ("batch", "groups", "channels", "state", "length")},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(record, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
