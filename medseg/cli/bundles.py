"""``medseg bundles``: list, show, verify, validate and pack."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.calibrate import calibrate
from medseg.cli.options import Trust
from medseg.errors import BundleError

if TYPE_CHECKING:
    from medseg.bundles.clearance import Clearance

app = typer.Typer(
    help="Bundles: a trained network with its settings. List, show, verify, pack, ensemble, calibrate.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Name = Annotated[str, typer.Argument(help="A name of medseg bundles list, or a bundle's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


@app.command("list")
def list_(*, json_: AsJson = False) -> None:
    """List the bundles that a name can mean: shipped, the user's own, and those in MEDSEG_BUNDLES.

    Exit codes: 0 listed.
    """
    from medseg.bundles.locate import DEFAULT_BUNDLE, all_bundles

    rows = []
    for root in all_bundles():
        row: dict[str, Any] = {"name": root.name, "default": root.name == DEFAULT_BUNDLE, "folder": str(root)}
        try:
            row |= _summary(root)
        except BundleError as err:
            row |= {"state": "damaged", "problem": str(err)}
        rows.append(row)
    if json_:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "state", "network", "task"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")  # a name has to be copied whole
    for row in rows:
        state = row["state"] + (", default" if row["default"] else "")
        network = f"mean of {len(row['members'])}" if "members" in row else row.get("network", "")
        table.add_row(*(Text(str(text)) for text in (row["name"], state, network, row.get("task", ""))))
    Console().print(table)


def _summary(root: Path) -> dict[str, Any]:
    from medseg.bundles.load import weights_of
    from medseg.bundles.locate import is_ensemble
    from medseg.bundles.spec import read_json, read_spec

    if is_ensemble(root):
        return _ensemble_summary(root)
    spec, metadata = read_spec(root), read_json(root / "configs" / "metadata.json")
    return {
        "state": "needs weights" if weights_of(root) is None else "ready",
        "network": spec.network,
        "version": str(metadata.get("version", "")),
        "task": str(metadata.get("task", "")),
        "labels": {str(value): name for value, name in spec.labels.items()},
    }


def _ensemble_summary(root: Path) -> dict[str, Any]:
    from medseg.bundles.ensemble import listed_members
    from medseg.bundles.load import weights_of
    from medseg.bundles.locate import find_bundle
    from medseg.bundles.spec import read_json

    metadata, names = read_json(root / "configs" / "metadata.json"), [name for name, _ in listed_members(root)]
    try:
        ready = all(weights_of(find_bundle(name)) is not None for name in names)
    except BundleError:
        ready = False
    return {
        "state": "ready" if ready else "needs members",
        "network": f"ensemble of {', '.join(names)}",
        "version": str(metadata.get("version", "")),
        "task": str(metadata.get("task", "")),
        "members": names,
    }


@app.command()
def show(name: Name, *, json_: AsJson = False) -> None:
    """Show what a bundle takes, gives and was trained on.

    Example: medseg bundles show swin_unetr_hippocampus

    Exit codes: 0 shown, 4 no such bundle, or a damaged one.
    """
    from medseg.bundles.load import load_bundle
    from medseg.bundles.locate import find_bundle, is_ensemble

    if is_ensemble(find_bundle(name)):
        _print_facts(_ensemble_facts(name), json_=json_)
        return
    bundle = load_bundle(name)
    spec, own = bundle.spec, bundle.metadata.get("medseg", {})
    facts: dict[str, Any] = {
        "name": bundle.name,
        "version": bundle.version,
        "folder": str(bundle.root),
        "state": "ready" if bundle.weights else "needs weights",
        "weights_sha256": bundle.sha256,
        "task": bundle.metadata.get("task", ""),
        "description": bundle.metadata.get("description", ""),
        "intended_use": bundle.metadata.get("intended_use", ""),
        "data": bundle.metadata.get("data_source", ""),
        "data_license": own.get("data_license", ""),
        "training_cases": own.get("training_cases"),
        "metrics": bundle.metadata.get("eval_metrics", {}),
        "network": spec.network,
        "network_args": dict(spec.network_args),
        "channels": list(spec.channels),
        "labels": {str(value): label for value, label in spec.labels.items()},
        "orientation": spec.orientation,
        "spacing_mm": spec.spacing,
        "intensity": [{type(step).__name__: asdict(step)} for step in spec.intensity],
        "roi_size": spec.roi_size,
        "overlap": spec.overlap,
        "slices": None if spec.slices is None else asdict(spec.slices),
        "regions": [asdict(region) for region in spec.regions],
        "padding": {"mode": spec.padding, "value": spec.padding_value},
        "mirror_axes": list(spec.mirror_axes),
        "folds": spec.folds,
        "nnunet": None if spec.nnunet is None else asdict(spec.nnunet),
        "suitability": asdict(spec.suitability),
        "calibration": asdict(spec.calibration),
    }
    _print_facts(facts, json_=json_)


def _ensemble_facts(name: str) -> dict[str, Any]:
    from medseg.bundles.ensemble import load_ensemble

    together = load_ensemble(name)
    return {
        "name": together.name,
        "version": together.version,
        "folder": str(together.root),
        "state": "ready",
        "task": together.metadata.get("task", ""),
        "description": together.metadata.get("description", ""),
        "intended_use": together.metadata.get("intended_use", ""),
        "data": together.metadata.get("data_source", ""),
        "metrics": together.metadata.get("eval_metrics", {}),
        "channels": list(together.spec.channels),
        "labels": {str(value): label for value, label in together.spec.labels.items()},
        "members": [
            {
                "bundle": member.bundle.name,
                "weight": member.weight,
                "version": member.bundle.version,
                "weights_sha256": member.bundle.sha256,
                "network": member.bundle.spec.network,
            }
            for member in together.members
        ],
        "calibration": asdict(together.calibration),
    }


def _print_facts(facts: dict[str, Any], *, json_: bool) -> None:
    if json_:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key, Text(_readable(value)))
    Console().print(table)


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_readable(inner)}" for key, inner in value.items())
    if isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        return "; ".join(_readable(inner) for inner in value)
    if isinstance(value, list | tuple):
        return ", ".join(f"({_readable(inner)})" if isinstance(inner, tuple) else _readable(inner) for inner in value)
    return "not stated" if value in (None, "") else str(value)


@app.command()
def verify(name: Name, *, trust: Trust = False, json_: AsJson = False) -> None:
    """Check a bundle: its files and their SHA-256, metadata, configuration, weights and one forward pass.

    Example: medseg bundles verify swin_unetr_hippocampus

    Exit codes: 0 all checks passed, 4 a check failed, or there is no such bundle.
    """
    from medseg.bundles.verify import Check, verify_bundle

    checks: list[Check] = []
    for check in verify_bundle(name, trust=trust):
        checks.append(check)
        if not json_:
            print(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.found}")
    if json_:
        print(json.dumps([{"check": c.name, "passed": c.passed, "found": c.found} for c in checks], indent=2))
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise BundleError(name, f"failed: {', '.join(failed)}", "restore the bundle, or pack it again")


@app.command()
def pack(
    run: Annotated[Path, typer.Argument(help="Folder of a run of medseg train.")],
    name: Annotated[str, typer.Option(help="Name of the bundle: a-z, 0-9 and _.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder that gets the bundle. Default: the user's bundles.")
    ] = None,
    *,
    evaluation: Annotated[
        Path | None, typer.Option(help="JSON of medseg evaluate; its figures go into the bundle's documents.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Keep float32 weights; default: float16, half the size.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle of that name.")] = False,
) -> None:
    """Make a complete bundle of a finished run: weights, configuration, documents, licence and manifest.

    Example: medseg bundles pack runs/first --name my_hippocampus

    Exit codes: 0 done, 2 usage, 3 evaluation, 4 run without weights, 6 output.
    """
    from medseg.bundles.locate import user_bundles
    from medseg.bundles.pack import pack_bundle

    folder = output or user_bundles()
    if output is None:
        folder.mkdir(parents=True, exist_ok=True)
    packed = pack_bundle(run, name, folder, half=not full, evaluation=evaluation, overwrite=overwrite)
    size = sum(path.stat().st_size for path in packed.rglob("*") if path.is_file())
    print(f"{packed}: {size / 1e6:.1f} MB; try: medseg infer SCAN --bundle {packed if output else name}")


@app.command("import-nnunet")
def import_nnunet(
    results: Annotated[Path, typer.Argument(help="Model folder of nnU-Net v2: plans.json, dataset.json, fold_0, ...")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder that gets the bundle. Default: the user's bundles.")
    ] = None,
    *,
    name: Annotated[
        str | None, typer.Option(help="Name of the bundle; default: that of data set and configuration.")
    ] = None,
    fold: Annotated[
        list[str] | None, typer.Option("--fold", help="0, 1, ... or all; several are averaged. Default: all there are.")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="File in each fold.")] = "checkpoint_final.pth",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle of that name.")] = False,
) -> None:
    """Make a bundle of a model that nnU-Net v2 trained; medseg infer --tta then gives what nnUNetv2_predict gives.

    Example: medseg bundles import-nnunet Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres --name hippo

    Exit codes: 0 done, 2 usage, 4 a model that medseg cannot run as nnU-Net does, 6 output.
    """
    from medseg.bundles.import_nnunet import import_nnunet as run_import
    from medseg.bundles.locate import user_bundles

    made = run_import(
        results, output or user_bundles(), name=name, folds=fold or (), checkpoint=checkpoint, overwrite=overwrite
    )
    print(
        f"{made.root}: folds {', '.join(made.folds)}; "
        f"try: medseg infer SCAN --tta --bundle {made.root if output else made.root.name}"
    )
    if made.note:
        print(f"note: {made.note}", file=sys.stderr)


@app.command()
def validate(
    name: Name,
    data: Annotated[Path, typer.Option(help="Data set in the Decathlon's or nnU-Net's layout; labels are not used.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder that gets a copy of the bundle with the result; default: itself."),
    ] = None,
    *,
    split: Annotated[Path | None, typer.Option(help="JSON of case names by part; default: every case.")] = None,
    part: Annotated[str, typer.Option(help="Part of the split file.")] = "val",
    backend: Annotated[
        list[str] | None, typer.Option("--backend", help="onnxruntime or openvino; default: those installed.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle of that name there.")] = False,
    json_: AsJson = False,
) -> None:
    """Compare each back end's labels with PyTorch's on real cases, and clear the bundle for those that agree.

    The result goes into the bundle's metadata.json; medseg infer then takes the fastest back end by itself. A back end
    is cleared when every label of every case reaches a Dice of 0.999 (float32) or 0.998 (bfloat16) against PyTorch.

    Example: medseg bundles validate my_bundle --data hippocampus --split split.json --part val

    Exit codes: 0 done, 2 usage, 3 data, 4 bundle, 6 bundle cannot be written, 8 a back end is not installed.
    """
    from medseg.bundles.clearance import check_writable, write_clearances
    from medseg.bundles.load import load_bundle
    from medseg.io.split import read_part
    from medseg.training.dataset import read_dataset

    bundle = load_bundle(name)
    check_writable(bundle, output, overwrite=overwrite)
    dataset = read_dataset(data)
    cases = dataset.cases if split is None else dataset.part(read_part(split, part))
    from medseg.inference.backends.validate import methods, validate

    compared = methods(backend or ())

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} cases", end="\n" if done == total else "", file=sys.stderr, flush=True)

    found = validate(bundle, [case.images for case in cases], compared, progress=progress)
    written = write_clearances(bundle, found, output, overwrite=overwrite)
    if json_:
        print(
            json.dumps({"bundle": str(written), "found": [{**asdict(o), "cleared": o.passed} for o in found]}, indent=2)
        )
        return
    _print_clearances(found)
    print(f"{len(cases)} cases; written to {written / 'configs' / 'metadata.json'}")


def _print_clearances(found: Sequence[Clearance]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("back end", "label", "lowest Dice", "mean Dice", "speed", "max logit difference", "cleared"):
        table.add_column(column, overflow="fold")
    for one in found:
        answer = "not needed" if one.method.accuracy == "exact" else "yes" if one.passed else "no"
        facts = (f"{one.speed:.2f}x", f"{one.max_logit_difference:.2g}", answer)
        for number, (label, dice) in enumerate(one.dice.items()):
            first, last = (str(one.method), facts) if number == 0 else ("", ("", "", ""))
            cells = (first, label, f"{dice.lowest:.5f}", f"{dice.mean:.5f}", *last)
            table.add_row(*(Text(cell) for cell in cells))
    Console(soft_wrap=True, highlight=False).print(table)


@app.command()
def ensemble(
    name: Annotated[str, typer.Argument(help="Name of the new bundle: a-z, 0-9 and _.")],
    member: Annotated[list[str], typer.Option("--member", help="Name of a bundle with weights; two or more.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder that gets the bundle. Default: the user's bundles.")
    ] = None,
    *,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Weight of each member, in their order; default: equal.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle of that name.")] = False,
) -> None:
    """Make a bundle that averages the probabilities of others; it names them and holds no weights of its own.

    Example: medseg bundles ensemble ensemble_hippocampus --member swin_unetr_hippocampus --member my_hippocampus

    Exit codes: 0 done, 2 usage, 4 a member is missing or does not fit, 6 output.
    """
    from medseg.bundles.ensemble import make_ensemble
    from medseg.bundles.locate import user_bundles

    folder = output or user_bundles()
    if output is None:
        folder.mkdir(parents=True, exist_ok=True)
    made = make_ensemble(name, member, folder, weights=weight, overwrite=overwrite)
    print(f"{made}: {len(member)} members; try: medseg infer SCAN --bundle {made if output else name}")


app.command()(calibrate)
