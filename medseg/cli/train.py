"""``medseg train``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.options import triple
from medseg.errors import UsageError

if TYPE_CHECKING:
    from medseg.training.job import Start
    from medseg.training.loop import Progress

_FEW = 6  # names of tensors that are printed; all of them are in the run's weights.txt


def train(
    context: typer.Context,
    data: Annotated[
        Path, typer.Option("--data", help="Folder in MSD or nnU-Net raw layout (dataset.json, imagesTr/, labelsTr/).")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run; made if it is not there.")],
    *,
    bundle: Annotated[
        str | None,
        typer.Option(help="Repeat this bundle's recipe: its network, preprocessing and settings; options win."),
    ] = None,
    architecture: Annotated[str, typer.Option(help="Network: see medseg networks list.")] = "swin_unetr",
    network: Annotated[
        str, typer.Option(help='Arguments of the network as JSON, e.g. \'{"feature_size": 12, "window_size": 4}\'.')
    ] = "{}",
    split: Annotated[
        Path | None, typer.Option(help='JSON file {"train": (names), "val": (names)}; only one part is read.')
    ] = None,
    part: Annotated[str, typer.Option(help="Part of the split to train on.")] = "train",
    max_time: Annotated[
        str | None, typer.Option(help="Length of the run: 45m, 1.5h, 90s. The schedule follows this clock.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the run in optimiser steps.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output, stopped or killed.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Start from these weights as far as they fit: a bundle's name, a checkpoint, a model.pt, or none."
        ),
    ] = None,
    freeze_encoder: Annotated[
        int, typer.Option(min=0, help="Steps at the beginning in which the encoder keeps what --weights gave it.")
    ] = 0,
    soft_labels: Annotated[
        str | None,
        typer.Option(
            help="Folder of CASE_seg_probabilities.nii.gz to learn beside the label maps, from medseg batch; or none."
        ),
    ] = None,
    soft_share: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of --soft-labels in the target; the label maps have the rest."),
    ] = 0.5,
    augment: Annotated[
        str, typer.Option(help='Augmentation that differs, as JSON, e.g. \'{"rotation": 0.1, "blur_probability": 0}\'.')
    ] = "{}",
    roi: Annotated[
        str | None, typer.Option(help="Sliding window in voxels, e.g. 32x64x32; default: from data.")
    ] = None,
    spacing: Annotated[str | None, typer.Option(help="Model voxel size in mm, e.g. 1x1x1; default: from data.")] = None,
    intensity: Annotated[
        str | None, typer.Option(help="zscore, range:LOW,HIGH (e.g. HU) or percentiles:LOW,HIGH; default: from data.")
    ] = None,
    slice_axis: Annotated[
        int | None, typer.Option(min=0, max=2, help="2D networks: axis that is cut (0 left-right); default: from data.")
    ] = None,
    neighbours: Annotated[
        int, typer.Option(min=0, help="2D networks: slices on each side that are given as channels too.")
    ] = 0,
    neighbour_step: Annotated[
        int, typer.Option(min=1, help="2D networks: distance of those slices from one to the next; 1: adjacent.")
    ] = 1,
    resize: Annotated[
        str, typer.Option(help="2D networks: none (pad, or windows), published or smooth (stretch whole slices).")
    ] = "none",
    batch_size: Annotated[int, typer.Option(min=1, help="Crops for each step.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Highest learning rate (AdamW).")] = 6e-4,
    mirror: Annotated[
        str, typer.Option(help="Axes along which flips keep the anatomy valid, e.g. 0 or 0,1 (0: left-right).")
    ] = "",
    holdout: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of the training cases kept to choose the best weights.")
    ] = 0.1,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    schedule: Annotated[str, typer.Option(help="cosine or polynomial.")] = "cosine",
    ema: Annotated[float, typer.Option(min=0.0, max=0.9999, help="Decay of the averaged weights.")] = 0.995,
    validate_every: Annotated[float, typer.Option(min=0.01, help="Minutes between two validations.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, order and augmentation.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare crops; 0: none beside the main one.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads, of all devices together; 0: all cores.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    devices: Annotated[
        int, typer.Option(min=1, help="GPUs (or CPU processes) of this machine that share each batch.")
    ] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")] = False,
) -> None:
    """Train a network on a folder of labelled cases.

    Spacing, window, intensity steps and padding are derived from the training cases (set them with options if
    you know better). The run's folder is a bundle: medseg infer --bundle RUN works at any time, and
    medseg bundles pack RUN --name NAME makes a complete bundle of it. A run that was stopped or killed goes on
    with --resume as if nothing had happened.

    With --bundle a paper's recipe is repeated on its data (medseg data list); the bundle's network and preprocessing
    take the place of what would be derived.

    Example: medseg train --data Task04_Hippocampus -o runs/first --network '{"feature_size": 12}' --max-time 45m

    Exit codes: 0 done, 2 usage, 3 data, 4 bundle or weights, 6 the folder holds a run already, 8 device; 130 and 143
    stopped by a signal, and saved.
    """
    settings: dict[str, Any] = {
        "architecture": architecture,
        "network": _json("--network", network),
        "roi_size": None if roi is None else triple("--roi", roi, int),
        "spacing": None if spacing is None else triple("--spacing", spacing, float),
        "intensity": intensity,
        "slice_axis": slice_axis,
        "neighbours": neighbours,
        "neighbour_step": neighbour_step,
        "resize": resize,
        "weights": None if weights == "none" else weights,
        "freeze_encoder": freeze_encoder,
        "soft_labels": None if soft_labels == "none" else soft_labels,
        "soft_share": soft_share,
        "augmentation": _json("--augment", augment),
        "steps": steps,
        "max_minutes": _minutes(max_time),
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "mirror_axes": tuple(int(axis) for axis in mirror.split(",") if axis.strip().isdecimal()),
        "holdout": holdout,
        "precision": precision,
        "optimizer": optimizer,
        "schedule": schedule,
        "ema_decay": ema,
        "validate_minutes": validate_every,
        "seed": seed,
        "workers": workers,
    }
    if bundle is not None and not resume:
        settings = _recipe(bundle, settings, context)
    elif steps is None and max_time is None:
        settings["steps" if resume else "max_minutes"] = 1 if resume else 60.0
    if freeze_encoder and settings["weights"] is None and not resume:
        raise UsageError("--freeze-encoder", "there are no --weights to keep", "give --weights, or leave it out")
    import torch
    from pydantic import ValidationError

    from medseg.training.config import TrainingConfig
    from medseg.training.run import train as run

    if threads:
        torch.set_num_threads(threads)
    try:
        config = TrainingConfig(**settings)
    except ValidationError as err:
        first = err.errors()[0]
        raise UsageError(f"--{'.'.join(map(str, first['loc']))}", str(first["msg"]), "see medseg train --help") from err
    with _Display(quiet=quiet) as display:
        end = run(
            config,
            data,
            output,
            split=split,
            part=part,
            resume=resume,
            device=device,
            devices=devices,
            prepare=display.prepare,
            started=display.start,
            report=display.step,
        )
    if not quiet:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in end.dice.items())
        print(f"{end.step} steps in {end.seconds / 60:.1f} min; held-out Dice: {scores or 'no held-out cases'}")
        print(f"run: {output}   next: medseg bundles pack {output} --name NAME")


_OPTIONS = {"roi": "roi_size", "augment": "augmentation", "mirror": "mirror_axes", "ema": "ema_decay"} | {
    "validate_every": "validate_minutes",
    "max_time": "max_minutes",
}


def _recipe(bundle: str, given: dict[str, Any], context: typer.Context) -> dict[str, Any]:
    """The settings of a bundle's train.json, replaced by the options that were written on the command line."""
    from medseg.training.run import read_recipe

    recipe = read_recipe(bundle)
    written = {
        _OPTIONS.get(name, name)
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    if written & {"steps", "max_minutes"}:
        recipe.update(steps=None, max_minutes=None)
    if written & {"slice_axis", "neighbours", "neighbour_step", "resize"}:
        remedy = "leave out --slice-axis, --neighbours, --neighbour-step and --resize"
        raise UsageError("--bundle", "decides about slices", remedy)
    for name in written & set(given):
        merged = name in ("network", "augmentation")  # JSON objects name what differs
        recipe[name] = {**recipe.get(name, {}), **given[name]} if merged else given[name]
    return {"weights": None, **recipe}


def _json(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as err:
        raise UsageError(option, f"not JSON ({err})", "e.g. '{\"feature_size\": 12}'") from err
    if not isinstance(value, dict):
        raise UsageError(option, "not a JSON object", "e.g. '{\"feature_size\": 12}'")
    return value


def _minutes(text: str | None) -> float | None:
    if text is None:
        return None
    unit = {"s": 1 / 60, "m": 1.0, "h": 60.0}.get(text[-1:], 0.0)
    try:
        minutes = float(text[:-1]) * unit
    except ValueError:
        minutes = 0.0
    if minutes <= 0:
        raise UsageError("--max-time", f"{text!r} is not a time", "write it as 45m, 1.5h or 90s")
    return minutes


class _Display:
    """Progress of a run on stderr: a bar with loss, Dice and time left; in a log file a line for each percent."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._quiet = quiet
        self._plain = not quiet and not console.is_terminal
        self._reported = -1
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def prepare(self, stage: str, done: int, total: int) -> None:
        """One more case prepared."""
        self._bar.update(self._task(stage), completed=done / max(total, 1), note=f"{done}/{total} cases")

    def start(self, start: Start) -> None:
        """What was taken of the weights to start from: counts, and the names where they are few."""
        if self._quiet:
            return
        report = start.report
        rows = (("taken", report.taken), ("adapted", report.adapted), ("left", report.left), ("unused", report.unused))
        lines = [f"start: {start.weights}"]
        for kind, names in rows:
            lines.append(f"  {kind:<8}{len(names):>5}  {', '.join(names) if len(names) <= _FEW else ''}".rstrip())
        if start.frozen:
            lines.append(f"  {'frozen':<8}{start.frozen:>5}  the encoder, for the first {start.steps} steps")
        lines += [f"  {note}" for note in report.notes]
        self._bar.console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)

    def step(self, progress: Progress, share: float) -> None:
        """One more optimiser step."""
        note = f"step {progress.step}  loss {progress.loss:.3f}"
        if progress.dice:
            note += f"  held-out Dice {sum(progress.dice.values()) / len(progress.dice):.3f}"
        self._bar.update(self._task("train"), completed=share, note=note)
        if self._plain and int(100 * share) > self._reported:
            self._reported = int(100 * share)
            print(f"{self._reported:3d} %  {note}", file=sys.stderr)

    def _task(self, name: str) -> Any:
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=1.0, note="")
        return self._tasks[name]
