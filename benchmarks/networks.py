"""The tables of docs/networks.md: facts, errors on the golden cases, time and memory of a forward pass.

    python benchmarks/networks.py --page docs/networks.md        # everything, with two threads
    python benchmarks/networks.py --only forward --threads 1 --json networks.json
    MEDSEG_GOLDEN=DIR python benchmarks/networks.py --only golden

Every network runs in a process of its own. A forward pass is that of the published configuration at its default input,
random weights, after a first pass that is not counted. Beside medseg's formulation stands the plain one, written
as the papers write it: attention with an explicit softmax, the scan step by step, convolutions one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the golden cases are read by the tests' own code

PLAIN = {
    "dformer": "explicit softmax, heads after the rearrangement",
    "dynunet": "MONAI's own forward, which is the same",
    "mdpformer": "explicit softmax",
    "paratranscnn": "explicit softmax, last two convolutions one after the other",
    "plain_conv_unet": "its own forward",
    "resenc_unet": "its own forward",
    "swin_umamba": "scan step by step, instance norms",
    "swin_umamba_d": "scan step by step",
    "swin_unetr": "MONAI's default, attention not fused",
    "transunet": "explicit softmax, weights standardised by mean and variance",
}


def golden_error(path: Path, architecture: str) -> float:
    """Largest absolute error of a golden case, over all its outputs."""
    import numpy as np
    import torch

    from medseg.checkpoints import load_pretrained, load_published
    from tests.golden.cases import Case, draw_input, fill, strided

    case = Case(architecture, path)
    described = case.description()
    config = {k: v for k, v in described["config"].items() if k not in ("checkpoint_prefix", "layout")}
    container = config.pop("checkpoint_container", None)
    state: dict[str, Any] = dict(fill(described["state"]))
    network = load_published(architecture, config, state if container is None else {container: state})
    del state
    if "npz" in described:
        load_pretrained(network, fill(described["npz"]))
    inputs = [torch.from_numpy(draw_input(name, shape)) for name, shape in described["inputs"].items()]
    with torch.inference_mode():
        results = network(*inputs)
    results = (results,) if isinstance(results, torch.Tensor) else results
    pairs = zip(results, described["outputs"].items(), strict=True)
    stored = case.outputs()
    return max(float(np.abs(strided(r.numpy(), o["stride"]) - stored[name]).max()) for r, (name, o) in pairs)


@contextlib.contextmanager
def plain_formulation(network: Any) -> Iterator[None]:
    """Everything in it runs as the papers write it; the weights stay."""
    import torch
    import torch.nn.functional as F
    from einops import rearrange
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from medseg.networks.layers import selective_scan, vss

    def standardised(self: Any, x: Any) -> Any:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + self.eps)
        return F.conv2d(x, weight, None, self.stride, self.padding)

    def two_convolutions(self: Any, x: Any) -> Any:
        return self.classify(self.up(x))

    def head(self: Any, x: Any) -> Any:
        return self[1](rearrange(self[0](x), "b d h w c -> b c d h w"))

    def instance_norm(self: Any, x: Any) -> Any:
        return F.instance_norm(x, eps=self.eps)

    forwards = {"StandardisedConv": standardised, "UpsamplingHead": two_convolutions, "Head": head}
    changed = []
    for module in network.modules():
        forward = forwards.get(type(module).__name__)
        if isinstance(module, torch.nn.GroupNorm) and module.num_groups == module.num_channels and not module.affine:
            forward = instance_norm
        if forward is not None:
            module.forward = forward.__get__(module)
            changed.append(module)
    fused = [module for module in network.modules() if getattr(module, "use_flash_attention", False)]
    scan = vss.scan_directions
    for module in fused:
        module.use_flash_attention = False
    vss.scan_directions = lambda *args, **_kwargs: selective_scan.scan_directions(*args, backend="loop")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        vss.scan_directions = scan
        for module in changed:
            del module.forward
        for module in fused:
            module.use_flash_attention = True


def _network_and_image(architecture: str, threads: int) -> tuple[Any, Any]:
    import torch

    from medseg.networks import create
    from medseg.networks.facts import read_facts

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    facts = read_facts(architecture)
    return create(architecture, **facts.default).eval(), torch.randn(facts.default_input)


def forward_times(architecture: str, threads: int, repeats: int) -> dict[str, Any]:
    """Seconds of both formulations, in turn so that a busy machine slows both, and how far their logits differ."""
    import torch

    network, image = _network_and_image(architecture, threads)
    wall: dict[str, list[float]] = {"medseg": [], "plain": []}
    cpu: dict[str, list[float]] = {"medseg": [], "plain": []}
    logits = {}
    with torch.inference_mode():
        for number in range(repeats + 1):
            for kind in ("medseg", "plain"):
                with plain_formulation(network) if kind == "plain" else contextlib.nullcontext():
                    begin, used = time.perf_counter(), time.process_time()
                    found = network(image)
                    if number:  # the first pass compiles and fills caches
                        wall[kind].append(time.perf_counter() - begin)
                        cpu[kind].append(time.process_time() - used)
                logits[kind] = found if isinstance(found, torch.Tensor) else found[0]
    return {
        **{f"{kind}_seconds": statistics.median(times) for kind, times in wall.items()},
        **{f"{kind}_cpu_seconds": statistics.median(times) for kind, times in cpu.items()},
        "ratio": statistics.median(p / m for m, p in zip(wall["medseg"], wall["plain"], strict=True)),
        "cpu_ratio": statistics.median(p / m for m, p in zip(cpu["medseg"], cpu["plain"], strict=True)),
        "difference": float((logits["medseg"] - logits["plain"]).abs().max()),
    }


def forward_memory(architecture: str, threads: int, *, plain: bool) -> float:
    """What one forward pass adds to the process at its peak, in MB."""
    import torch

    network, image = _network_and_image(architecture, threads)
    with torch.inference_mode(), plain_formulation(network) if plain else contextlib.nullcontext():
        for _ in range(2):  # the first pass compiles
            before = _resident("VmRSS")
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            network(image)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def in_a_process(*arguments: str) -> Any:
    """This file in a new process; what it prints is JSON."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(arguments: list[str]) -> None:
    kind, architecture, *rest = arguments
    if kind == "golden":
        found: Any = golden_error(Path(rest[0]), architecture)
    elif kind == "times":
        found = forward_times(architecture, int(rest[0]), int(rest[1]))
    else:
        found = forward_memory(architecture, int(rest[0]), plain=rest[1] == "plain")
    print(json.dumps(found))


Rows = list[dict[str, Any]]


def facts_table(rows: Rows) -> Iterator[str]:
    """The facts of all architectures as lines of Markdown."""
    from dataclasses import asdict

    from medseg.networks.facts import read_facts
    from medseg.networks.registry import names

    yield "| name | paper | public code, licence | input | parameters | GMACs at |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in names():
        facts = read_facts(name)
        rows.append({"name": name, **asdict(facts)})
        size = " x ".join(map(str, facts.default_input[1:]))
        yield (
            f"| `{name}` | {facts.paper} | {facts.code}, {facts.code_license} | {facts.input_rule} "
            f"| {facts.parameters:,} | {facts.gmacs:.1f} at {size} |"
        )


def results_table(_rows: Rows) -> Iterator[str]:
    """What the authors report, as lines of Markdown."""
    from medseg.networks.facts import read_facts
    from medseg.networks.registry import names

    yield "| name | data | reported by the authors |"
    yield "| --- | --- | --- |"
    for name in names():
        for data, figures in read_facts(name).results:
            yield f"| `{name}` | {data} | {figures} |"


def golden_table(rows: Rows) -> Iterator[str]:
    """The largest absolute error of every golden case as lines of Markdown."""
    from medseg.networks.registry import names
    from tests.golden.cases import HERE, find_cases

    yield "| golden case | largest absolute error | allowed |"
    yield "| --- | --- | --- |"
    for name in names():
        for case in find_cases(name):
            error = in_a_process("golden", name, str(case.path))
            allowed = case.description().get("tolerance", 1e-4)
            label = f"{case} (the project's own)" if case.path.parent == HERE else str(case)
            rows.append({"case": label, "error": error, "allowed": allowed})
            yield f"| {label} | {error:.1e} | {allowed:.0e} |"


def forward_table(rows: Rows, threads: int, repeats: int) -> Iterator[str]:
    """Seconds and peak memory of every architecture as lines of Markdown."""
    import torch

    from medseg.networks.registry import names

    yield f"{platform.machine()}, {threads} threads, torch {torch.__version__}, median of {repeats} rounds."
    yield ""
    yield "| name | s | plain s | ratio | ratio, CPU time | peak MB | plain MB | difference | plain formulation |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in names():
        row = in_a_process("times", name, str(threads), str(repeats))
        for kind in ("medseg", "plain"):
            row[f"{kind}_peak_mb"] = in_a_process("memory", name, str(threads), kind)
        rows.append({"name": name, "threads": threads, "repeats": repeats, **row})
        yield (
            f"| `{name}` | {row['medseg_seconds']:.2f} | {row['plain_seconds']:.2f} | {row['ratio']:.2f} "
            f"| {row['cpu_ratio']:.2f} | {row['medseg_peak_mb']:.0f} | {row['plain_peak_mb']:.0f} "
            f"| {row['difference']:.1e} | {PLAIN.get(name, '')} |"
        )


def put_into(page: Path, table: str, lines: list[str]) -> None:
    """Replace what stands between the comments ``<!-- table -->`` and ``<!-- end -->`` of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- {table} -->\n")
    _, _, after = rest.partition("<!-- end -->")
    if not after:
        raise SystemExit(f"{page} has no place for the table {table}")
    text = "\n".join(lines)
    page.write_text(f"{before}<!-- {table} -->\n{text}\n<!-- end -->{after}", encoding="utf-8")


def main() -> None:
    """Print Markdown; write JSON and the page's tables where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("facts", "results", "golden", "forward"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="page whose tables are replaced, docs/networks.md")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.child)
        return
    rows: dict[str, Rows] = {table: [] for table in ("facts", "results", "golden", "forward")}
    tables = {
        "facts": facts_table(rows["facts"]),
        "results": results_table(rows["results"]),
        "golden": golden_table(rows["golden"]),
        "forward": forward_table(rows["forward"], options.threads, options.repeats),
    }
    for table, made in tables.items():
        if options.only in (None, table):
            lines = []
            for line in made:
                print(line, flush=True)
                lines.append(line)
            print()
            if options.page:
                put_into(options.page, table, lines)
    if options.json:
        options.json.write_text(json.dumps({table: found for table, found in rows.items() if found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
