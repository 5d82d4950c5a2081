"""``medseg label``: MONAI Label's server with medseg's bundles."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="MONAI Label: bundles as models for 3D Slicer, OHIF and other clients.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command()
def install(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and run none of them.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Install MONAI Label's server beside medseg, into the environment that medseg runs in.

    Nothing that is installed changes its version: torch, numpy and pydicom stay as they are. Run it again at any time.

    Exit codes: 0 done, 8 something could not be installed (no network, a conflict with what is installed).
    """
    from medseg.label.install import install as run
    from medseg.label.install import script

    if dry_run:
        print(script())
        return
    run(os.environ, (lambda _line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True)))
    if not quiet:
        print("MONAI Label is ready; next: medseg label serve --studies FOLDER")


@app.command()
def serve(
    *,
    studies: Annotated[
        str,
        typer.Option(
            help="Folder of images (.nii.gz, .nii, .nrrd, .mha, .zip of a DICOM series), or address of a DICOMweb "
            "server, e.g. http://127.0.0.1:8042/dicom-web."
        ),
    ],
    bundle: Annotated[
        list[str] | None,
        typer.Option(help="Bundle's name or folder; give it again for more. Default: every bundle that is ready."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's need authentication.")
    ] = "127.0.0.1",
    trained: Annotated[
        Path | None,
        typer.Option(help="Folder that gets new versions of bundles. Default: the folder of your own bundles."),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="Web page that may use the server, e.g. http://localhost:3000 for OHIF; give it again."),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="What computes networks on the CPU: auto, eager, onnxruntime, openvino.")
    ] = "auto",
    score: Annotated[
        bool, typer.Option("--score", help="Score all images at the start and after each training, in the background.")
    ] = False,
) -> None:
    """Start MONAI Label's server; Ctrl+C stops it. Research use only; not a medical device.

    Every bundle is a model that gives the label maps of medseg infer. Labels that are sent in are kept in the studies
    folder; training on them makes a new version of the bundle and leaves the old one as it is.

    To try:

    - medseg label serve --studies scans
    - medseg label serve --studies scans --bundle swin_unetr_hippocampus --port 8100 --score

    Exit codes: 0 stopped, 2 usage, 3 no studies folder or DICOMweb server, 4 bundle, 6 a folder cannot be written
    to, 8 MONAI Label is not installed.
    """
    from medseg.bundles.locate import user_bundles
    from medseg.errors import Interrupted, UsageError
    from medseg.label.serve import Service
    from medseg.label.serve import serve as run

    if backend not in ("auto", "eager", "onnxruntime", "openvino"):
        raise UsageError("--backend", f"{backend!r} is not known", "auto, eager, onnxruntime or openvino")
    service = Service(
        studies=studies,
        bundles=bundle or [],
        trained=trained or user_bundles(),
        host=host,
        port=port,
        origins=[one.rstrip("/") for one in origin or []],
        backend=backend,
        score=score,
    )

    def ready(models: str) -> None:
        print(f"{service.url}  (studies in {studies}; models: {models}; Ctrl+C stops)", flush=True)

    print("starting MONAI Label, which takes half a minute", file=sys.stderr, flush=True)
    try:
        run(service, os.environ, ready)
    except Interrupted:
        print("stopped", file=sys.stderr)
