"""``medseg benchmark``: how fast, beside other pipelines, and how accurate, one bundle beside another."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medseg.bundles.locate import DEFAULT_BUNDLE
from medseg.cli.options import Device, triple
from medseg.errors import InputError, PartialError, UsageError

if TYPE_CHECKING:
    from medseg.benchmark.accuracy import AccuracyReport
    from medseg.benchmark.speed import Medians, SpeedReport
    from medseg.benchmark.subject import Subject

app = typer.Typer(help="Measure: speed beside other pipelines, accuracy of bundles.", no_args_is_help=True)

_BASELINES = ("monai", "nnunet")

Threads = Annotated[int, typer.Option(min=0, help="CPU threads of each process; 0: all cores.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print the result and errors only.")]


@app.command()
def speed(
    *,
    bundle: Annotated[
        str | None,
        typer.Option("-b", "--bundle", help=f"Bundle: a name or a folder. Default: {DEFAULT_BUNDLE}."),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="Instead of a bundle: a name of medseg networks list, with random weights, or quant."),
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="Arguments of the architecture as JSON, e.g. '{\"feature_size\": 48}'.")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=2, max=65535, help="Classes of the architecture, background included; default 14.")
    ] = None,
    roi: Annotated[str | None, typer.Option(help="Window of the architecture in voxels; default 96x96x96.")] = None,
    overlap: Annotated[
        float | None,
        typer.Option(help="Share that neighbouring windows have in common; default: the bundle's, or 0.5."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Scan; for several channels once for each, in order.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Instead of a scan: a CT-like one of this size in voxels, e.g. 512x512x300.")
    ] = None,
    spacing: Annotated[str, typer.Option(help="Its voxel size in mm.")] = "1.2x1.2x2.0",
    against: Annotated[
        list[str] | None, typer.Option(help="monai or nnunet; may be given twice. nnunet needs nnunetv2.")
    ] = None,
    device: Device = "cpu",
    threads: Threads = 0,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds that count; one before them does not.")] = 3,
    backend: Annotated[
        Literal["auto", "eager", "onnxruntime", "openvino"],
        typer.Option(help="Of medseg. eager computes as the others do; auto: what medseg infer takes."),
    ] = "eager",
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="Of medseg, as for medseg infer.")
    ] = "auto",
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures to this JSON file.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Time medseg on a scan, beside MONAI's and nnU-Net's own pipelines with the same weights.

    Each run is a process of its own, and the pipelines take turns. Time counts from reading the scan to the written
    label map; overhead is CPU time outside the network; memory is the peak above that after the imports.

    To try:

    - medseg benchmark speed --image scan.nii.gz --against monai --threads 1
    - medseg benchmark speed --architecture quant --size 256x256x160 --against monai --against nnunet
    - medseg benchmark speed --architecture swin_unetr --network '{"feature_size": 48}' --size 144x144x80

    Exit codes: 0 done, 2 usage, 3 scan, 4 bundle, 6 output, 8 device, or a pipeline that is not installed.
    """
    from medseg.io.write import reserve, write_bytes

    if (image is None) == (size is None):
        raise UsageError("--image, --size", "one of the two is needed", "give a scan, or the size of a made one")
    if bundle is not None and architecture is not None:
        raise UsageError("--bundle, --architecture", "both given", "choose one")
    if architecture is None and (network, classes, roi) != (None, None, None):
        raise UsageError("--network, --classes, --roi", "belong to --architecture", "a bundle has its own")
    if overlap is not None and not 0 <= overlap < 1:
        raise UsageError("--overlap", f"{overlap} is not in [0, 1)", "0.5 is usual")
    unknown = [name for name in against or () if name not in _BASELINES]
    if unknown:
        raise UsageError("--against", f"{unknown[0]!r} is not known", f"use {' or '.join(_BASELINES)}")
    shape = None if size is None else triple("--size", size, int)
    voxel = triple("--spacing", spacing, float)
    target = None if json_ is None else reserve(json_, overwrite=overwrite, inputs=image or (), suffixes=(".json",))

    from medseg.benchmark.machine import cores
    from medseg.benchmark.scan import save_phantom_ct
    from medseg.benchmark.speed import benchmark_speed
    from medseg.benchmark.subject import Subject

    with tempfile.TemporaryDirectory(prefix="medseg-benchmark-") as folder, _lines(quiet=quiet) as say:
        if architecture is None:
            subject = Subject(bundle=bundle or DEFAULT_BUNDLE, overlap=overlap)
        else:
            window = triple("--roi", roi or "96x96x96", int)
            subject = _random(Path(folder), architecture, network, classes or 14, window, overlap)
        scans = image or [Path(folder) / "phantom.nii.gz"]
        if shape is not None:
            say("making the scan")
            save_phantom_ct(scans[0], shape, voxel)
        report = benchmark_speed(
            subject,
            scans,
            against=list(dict.fromkeys(against or ())),  # type: ignore[arg-type]  # checked above
            device=device,
            threads=threads or cores(),
            repeat=repeat,
            backend=backend,
            precision=precision,
            progress=say,
        )
    if target is not None:
        write_bytes(target, report.to_json().encode())
    _print_speed(report)
    if target is not None:
        print(f"figures: {target.path}")


@app.command()
def accuracy(
    data: Annotated[Path, typer.Option("--data", help="Labelled cases in the Decathlon's or nnU-Net's raw layout.")],
    bundle: Annotated[
        list[str], typer.Option("-b", "--bundle", help="Bundle or ensemble: a name or a folder; once for each.")
    ],
    *,
    split: Annotated[
        Path | None, typer.Option(help="JSON file with a list of case names for each part; without it all cases.")
    ] = None,
    part: Annotated[str, typer.Option(help="Part of the split.")] = "val",
    baseline: Annotated[
        str | None, typer.Option(help="The bundle that the others are tested against; default: the first.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Page to write, e.g. docs/leaderboard.md; its plot beside it.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write every case's figures to this JSON file.")] = None,
    device: Device = "cpu",
    threads: Threads = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Score bundles on the same labelled cases, and say what they cost.

    Dice with its 95 % interval, HD95, NSD and volume error for each label; parameters, multiply-accumulates, seconds
    and memory in the same run; a test of each bundle against the baseline. Each bundle has a process of its own, and
    they take turns, case after case. The page needs matplotlib: pip install 'medseg[benchmark]'.

    To try:

    - medseg benchmark accuracy --data Task04_Hippocampus --split split.json -b one -b other -o docs/leaderboard.md

    Exit codes: 0 done, 2 usage, 3 data, 4 bundle, 6 output, 7 written, but some cases have no scores, 8 matplotlib.
    """
    from medseg.benchmark.plot import plot_png, require_matplotlib
    from medseg.io.split import read_part
    from medseg.io.write import OutputSet, reserve
    from medseg.training.dataset import read_dataset

    inputs = [path for path in (data, split) if path is not None]
    page = None if output is None else reserve(output, overwrite=overwrite, inputs=inputs, suffixes=(".md",))
    picture = None
    if output is not None:
        require_matplotlib()
        picture = reserve(output.with_suffix(".png"), overwrite=overwrite)
    figures = None if json_ is None else reserve(json_, overwrite=overwrite, inputs=inputs, suffixes=(".json",))
    found = read_dataset(data)
    if found.ignore is not None:
        raise InputError(data, f"label {found.ignore} marks voxels to be ignored", "use a data set without such voxels")
    cases = found.cases if split is None else found.part(read_part(split, part))

    from medseg.benchmark.accuracy import benchmark_accuracy
    from medseg.benchmark.leaderboard import leaderboard
    from medseg.benchmark.machine import cores

    with _lines(quiet=quiet) as say:
        report = benchmark_accuracy(
            found.name,
            found.labels,
            cases,
            bundle,
            baseline=baseline,
            device=device,
            threads=threads or cores(),
            progress=lambda text, done, total: say(f"{done}/{total} {text}"),
        )
    chosen = (
        f"all {len(cases)} labelled cases" if split is None else f"{len(cases)} cases, part `{part}` of `{split.name}`"
    )
    with OutputSet() as outputs:
        if page is not None and picture is not None:
            text = leaderboard(
                report,
                command=_command(data, bundle, split, part, baseline, output, threads),
                data=f"{found.name}: {chosen}",
                picture=picture.path.name,
            )
            outputs.add_bytes(page, text.encode())
            outputs.add_bytes(picture, plot_png(report))
        if figures is not None:
            outputs.add_bytes(figures, report.to_json().encode())
    _print_accuracy(report)
    for one in (page, picture, figures):
        if one is not None:
            print(f"  {one.path}")
    if report.failures:
        raise PartialError(str(data), f"{report.failures} results are missing", "the page and the JSON name each")


def _command(
    data: Path,
    bundles: list[str],
    split: Path | None,
    part: str,
    baseline: str | None,
    output: Path | None,
    threads: int,
) -> str:
    """The command that decides the scores, as one would type it; a page that is shared names no folder of a machine."""
    words = ["medseg", "benchmark", "accuracy", "--data", "DATA"]
    if split is not None:
        inside = split.resolve().is_relative_to(data.resolve())
        words += ["--split", f"DATA/{split.resolve().relative_to(data.resolve())}" if inside else split.name]
        words += ["--part", part]
    words += [word for bundle in bundles for word in ("--bundle", bundle)]
    words += [] if baseline is None else ["--baseline", baseline]
    words += ["--threads", str(threads)] if threads else []
    words += [] if output is None else ["-o", output.name]
    return shlex.join(words)


def _print_accuracy(report: AccuracyReport) -> None:
    """Print a row for each bundle, and name the cases without scores."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("bundle", overflow="fold")
    columns = (
        "Dice",
        "95 % from",
        "to",
        "worst",
        "HD95 mm",
        "NSD",
        "p, Holm",
        "M params",
        "GMACs",
        "s",
        "MiB",
        "cases",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    p_values = {one.bundle: one.p_holm for one in report.comparisons}
    for one in report.bundles:
        cells = (
            one.name,
            *(number(value, ".4f") for value in (one.dice.mean, one.dice.low, one.dice.high, one.dice.worst)),
            number(one.hd95_mm, ".2f"),
            number(one.nsd, ".4f"),
            "baseline" if one.name == report.baseline else number(p_values.get(one.name), ".4f"),
            f"{one.parameters / 1e6:.2f}",
            number(one.gmacs_case, ".1f"),
            number(one.seconds_case, ".2f"),
            f"{one.peak_rss_mib:.0f}",
            f"{len(one.cases)} of {len(report.cases)}",
        )
        table.add_row(*(Text(cell) for cell in cells))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(80, Console(width=1000).measure(table).maximum))
    console.print(table)
    for one in report.bundles:
        for failed in one.failed:
            print(f"warning: {one.name}: {failed.case}: {failed.problem}", file=sys.stderr)


def _random(
    folder: Path,
    architecture: str,
    network: str | None,
    classes: int,
    roi_size: tuple[int, int, int],
    overlap: float | None,
) -> Subject:
    """A bundle with random weights in a folder, or `quant`."""
    from medseg.benchmark.subject import QUANT, Subject, random_bundle

    arguments = _object("--network", network)
    if architecture == QUANT:
        if arguments:
            raise UsageError("--network", f"{QUANT} takes no arguments", "leave it out")
        return Subject(quant_classes=classes, quant_roi_size=roi_size, overlap=overlap)
    root = random_bundle(folder / f"{architecture}_random", architecture, arguments, classes=classes, roi_size=roi_size)
    return Subject(bundle=str(root), overlap=overlap)


def _print_speed(report: SpeedReport) -> None:
    """Print a row for each pipeline, and for each baseline one of ratios."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shape, voxel = ("x".join(f"{value:g}" for value in row) for row in (report.image.shape, report.image.spacing))
    print(f"{report.bundle.name} on {shape} voxels of {voxel} mm, {report.windows} windows")
    print(f"{report.device}, threads: {report.threads}, {report.cpu}, load {report.load}, torch {report.torch}")
    print(f"medseg's network by {report.backend}, {report.precision}; the others' by PyTorch, float32")
    on_gpu = report.median.peak_gpu_mib is not None
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(f"median of {len(report.runs)}", no_wrap=True)
    columns = ("wall s", "CPU s", "network", "overhead", "MiB", *(("GPU MiB",) if on_gpu else ()))
    for column in (*columns, "changed", "Dice min", "mean"):
        table.add_column(column, justify="right", no_wrap=True)

    def row(name: str, values: Sequence[float | None], form: str, *more: str) -> None:
        cells = ["" if value is None else format(value, form) for value in values]
        table.add_row(*(Text(cell) for cell in (name, *cells, *more)))

    def figures(name: str, median: Medians) -> None:
        gpu = (median.peak_gpu_mib,) if on_gpu else ()
        seconds = (median.wall_s, median.cpu_s, median.net_cpu_s, median.overhead_cpu_s)
        row(name, (*seconds, median.above_imports_mib, *gpu), ".2f")

    figures("medseg", report.median)
    for other in report.baselines:
        if other.median is None or other.ratio is None or other.agreement is None:
            continue
        figures(f"{other.name} {other.version}", other.median)
        ratio, same = other.ratio, other.agreement
        gpu = (ratio.peak_gpu,) if on_gpu else ()
        dice = ("-" if value is None else f"{value:.4f}" for value in (same.dice_min, same.dice_mean))
        found = (ratio.wall, ratio.cpu, None, ratio.overhead, ratio.peak_rss, *gpu)
        row("  times medseg", found, ".2f", f"{same.changed:.1e}", *dice)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(80, Console(width=1000).measure(table).maximum))
    console.print(table)
    for other in report.baselines:
        if other.error is not None:
            print(f"{other.name}: {other.error}")


@contextlib.contextmanager
def _lines(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Say on stderr what is under way: one line that is replaced on a terminal, none elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    if quiet or not console.is_terminal:
        yield lambda _text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(Text(text))


def _object(option: str, text: str | None) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text or "{}")
    except ValueError as err:
        raise UsageError(option, f"not JSON ({err})", "write it as '{\"feature_size\": 48}'") from err
    if not isinstance(found, dict):
        raise UsageError(option, f"{text} is not a JSON object", "write it as '{\"feature_size\": 48}'")
    return found
