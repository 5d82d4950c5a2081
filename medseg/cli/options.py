"""Options that several commands share: how a scan is segmented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medseg.bundles.locate import DEFAULT_BUNDLE
from medseg.errors import UsageError

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
AssignUids = Annotated[
    bool,
    typer.Option(
        "--assign-uids", help="Make up identifiers that DICOM images lack, so that DICOM outputs can be made."
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Let a bundle of others run its own code where it needs some; only if you trust them."
    ),
]
Flips = Annotated[bool, typer.Option("--tta", help="Average over the flips that the bundle allows; slower.")]

Metadata = Annotated[
    Path | None,
    typer.Option(help="patients.csv with case, age, sex, for a bundle that diagnoses; a case goes by its file's name."),
]
Register = Annotated[
    bool, typer.Option("--register", help="Lay the phases onto each other rigidly before they are diagnosed.")
]


def triple(option: str, text: str, kind: type[int] | type[float]) -> tuple[Any, Any, Any]:
    """Three positive numbers from ``32x64x32``.

    Raises:
        UsageError: `text` is something else.
    """
    number = r"\d{1,5}" if kind is int else r"\d{1,5}(?:\.\d+)?"
    if re.fullmatch(rf"{number}x{number}x{number}", text):
        x, y, z = (kind(part) for part in text.split("x"))
        if min(x, y, z) > 0:
            return x, y, z
    raise UsageError(option, f"{text!r} is not three positive numbers", "write it as 32x64x32")
