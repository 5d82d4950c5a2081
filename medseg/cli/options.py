"""Options that several commands share: how a scan is segmented."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from medseg.bundles.locate import DEFAULT_BUNDLE

Bundles = Annotated[
    list[str] | None,
    typer.Option(
        "-b",
        "--bundle",
        help="Bundle: a name of medseg bundles list, or a folder; several are averaged.",
        show_default=DEFAULT_BUNDLE,
    ),
]
Weights = Annotated[
    list[float] | None, typer.Option("--weight", help="Weight of each of several bundles, in their order.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Backend = Annotated[
    Literal["auto", "eager", "onnxruntime", "openvino"],
    typer.Option(help="What computes the network on the CPU; auto: the fastest that the bundle is cleared for."),
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option(help="auto: float32 on the CPU unless the bundle is cleared for bf16."),
]
Overlap = Annotated[float | None, typer.Option(help="Share that neighbouring windows have in common, 0 to below 1.")]
Flips = Annotated[bool, typer.Option("--tta", help="Average over the flips that the bundle allows; slower.")]
