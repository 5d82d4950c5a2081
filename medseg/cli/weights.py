"""``medseg weights``: bring an author's checkpoint into a bundle that ships without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg.errors import UsageError

app = typer.Typer(help="Weights: import a published checkpoint into a bundle.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Weights: import a published checkpoint into a bundle."""


@app.command("import")
def import_(
    name: Annotated[str, typer.Argument(help="Bundle that needs weights: a name of medseg bundles list, or a folder.")],
    checkpoint: Annotated[
        Path, typer.Argument(help="File of the authors or their trainer (.pt, .pth, .ckpt, .npz, .safetensors).")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder that gets the bundle. Default: the user's bundles.")
    ] = None,
    *,
    network: Annotated[
        str, typer.Option(help="Network arguments that differ, as JSON, e.g. '{\"feature_size\": 24}'.")
    ] = "{}",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that was imported before.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
) -> None:
    """Make a bundle ready with a published checkpoint.

    The file is read without running anything in it; every key and shape is checked against the bundle's network,
    and the file's SHA-256 goes into the bundle's metadata. The ready bundle has the same name and is found first.

    Example: medseg weights import swin_unetr_btcv swin_unetr.base_5000ep_f48_lr2e-4_pretrained.pt

    Exit codes: 0 done, 2 usage, 4 bundle, or a file that does not fit it, 6 output.
    """
    from medseg.bundles.load import load_bundle
    from medseg.bundles.weights import import_weights

    ready = load_bundle(
        import_weights(name, checkpoint, network=_arguments(network), folder=output, overwrite=overwrite)
    )
    source = ready.metadata["medseg"]["weights"]
    if json_:
        print(json.dumps({"bundle": ready.name, "folder": str(ready.root), "weights": source}, indent=2))
        return
    print(f"{ready.root}: ready, weights of {source['source']} (SHA-256 {source['sha256'][:16]}...)")
    print(f"try: medseg infer SCAN --bundle {ready.root if output else ready.name}")


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as err:
        raise UsageError("--network", f"not JSON ({err})", "e.g. '{\"feature_size\": 24}'") from err
    if not isinstance(value, dict):
        raise UsageError("--network", "not a JSON object", "e.g. '{\"feature_size\": 24}'")
    return value
