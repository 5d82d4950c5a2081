"""``medseg bundles``: list, show, verify and pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg.errors import BundleError

app = typer.Typer(
    help="Bundles: a trained network with its settings. List, show, verify, pack.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Name = Annotated[str, typer.Argument(help="A name of medseg bundles list, or a bundle's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


@app.command("list")
def list_(*, json_: AsJson = False) -> None:
    """List the bundles that a name can mean: shipped, the user's own, and those in MEDSEG_BUNDLES."""
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
        table.add_column(column, overflow="fold")
    for row in rows:
        name = row["name"] + (" (default)" if row["default"] else "")
        table.add_row(*(Text(str(text)) for text in (name, row["state"], row.get("network", ""), row.get("task", ""))))
    Console().print(table)


def _summary(root: Path) -> dict[str, Any]:
    from medseg.bundles.load import weights_of
    from medseg.bundles.spec import read_json, read_spec

    spec, metadata = read_spec(root), read_json(root / "configs" / "metadata.json")
    return {
        "state": "needs weights" if weights_of(root) is None else "ready",
        "network": spec.network,
        "version": str(metadata.get("version", "")),
        "task": str(metadata.get("task", "")),
        "labels": {str(value): name for value, name in spec.labels.items()},
    }


@app.command()
def show(name: Name, *, json_: AsJson = False) -> None:
    """Show what a bundle takes, gives and was trained on."""
    from dataclasses import asdict

    from medseg.bundles.load import load_bundle

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
        "suitability": asdict(spec.suitability),
    }
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
    if isinstance(value, list | tuple):
        return ", ".join(f"({_readable(inner)})" if isinstance(inner, tuple) else _readable(inner) for inner in value)
    return "not stated" if value in (None, "") else str(value)


@app.command()
def verify(name: Name, *, json_: AsJson = False) -> None:
    """Check a bundle: its files and their SHA-256, metadata, configuration, weights and one forward pass."""
    from medseg.bundles.verify import Check, verify_bundle

    checks: list[Check] = []
    for check in verify_bundle(name):
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
    """Make a complete bundle of a finished run: weights, configuration, documents, licence and manifest."""
    from medseg.bundles.locate import user_bundles
    from medseg.bundles.pack import pack_bundle

    folder = output or user_bundles()
    if output is None:
        folder.mkdir(parents=True, exist_ok=True)
    packed = pack_bundle(run, name, folder, half=not full, evaluation=evaluation, overwrite=overwrite)
    size = sum(path.stat().st_size for path in packed.rglob("*") if path.is_file())
    print(f"{packed}: {size / 1e6:.1f} MB; try: medseg infer SCAN --bundle {packed if output else name}")
