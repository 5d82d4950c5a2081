"""A process that segments cases with one bundle: requests on stdin, answers on stdout, a JSON line each."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict

from medseg.benchmark.meter import peak_rss_mib
from medseg.errors import MedsegError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Start(_Strict):
    """The first request: which bundle, and with what."""

    bundle: str
    device: str
    threads: int


class Described(_Strict):
    """The answer to `Start`.

    Attributes:
        name: of the bundle.
        sha256: of its weights.
        members: names of the bundles of an ensemble; one name else.
        training_cases: of the bundle and of the members of an ensemble, as they state it.
        labels: value to name, background included.
        parameters: of all members together.
        gmacs_window: billions of multiply-accumulates of one window, of all members together.
        error: why the bundle cannot be loaded; the rest says nothing then.
        exit_code: of that error.
    """

    name: str = ""
    sha256: str = ""
    members: tuple[str, ...] = ()
    training_cases: tuple[int | None, ...] = ()
    labels: dict[int, str] = {}
    parameters: int = 0
    gmacs_window: float = 0.0
    error: str = ""
    exit_code: int = 0


class Segment(_Strict):
    """A request to segment one case."""

    case: str
    images: tuple[str, ...]
    output: str


class Segmented(_Strict):
    """The answer to `Segment`.

    Attributes:
        case: its name.
        seconds: wall time from reading the scan to its measurements; loading the weights is not in it.
        windows: that the networks of all members saw.
        gmacs: billions of multiply-accumulates of all of them.
        peak_rss_mib: the most memory that the process has had so far.
        error: why there is no label map.
    """

    case: str
    seconds: float = 0.0
    windows: int = 0
    gmacs: float = 0.0
    peak_rss_mib: float = 0.0
    error: str = ""


def main() -> None:
    """Answer requests until stdin ends; what libraries print goes to stderr."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        start = Start.model_validate_json(sys.stdin.readline())
        try:
            serve(start, answers)
        except MedsegError as error:
            _say(answers, Described(error=str(error), exit_code=error.exit_code))


def serve(start: Start, answers: TextIO) -> None:
    """Load the bundle, describe it, and segment what is asked for.

    Raises:
        MedsegError: the bundle cannot be loaded.
    """
    import torch

    torch.set_num_threads(start.threads)
    from medseg.benchmark.cost import window_cost, windows_of
    from medseg.bundles.ensemble import load_ensemble
    from medseg.inference.device import choose_device
    from medseg.inference.preprocess import model_grid
    from medseg.inference.run import infer

    choose_device(start.device)
    loaded = load_ensemble(start.bundle)
    for member in loaded.members:
        member.bundle.network()  # weights that are missing or damaged are found before the first case
    specs = [member.bundle.spec for member in loaded.members]
    costs = [window_cost(spec) for spec in specs]
    described = Described(
        name=loaded.name,
        sha256=loaded.sha256,
        members=tuple(member.bundle.name for member in loaded.members),
        training_cases=tuple(
            member.bundle.metadata.get("medseg", {}).get("training_cases") for member in loaded.members
        ),
        labels=dict(loaded.spec.labels),
        parameters=sum(cost.parameters for cost in costs),
        gmacs_window=sum(cost.gmacs for cost in costs),
    )
    _say(answers, described)
    for line in sys.stdin:
        request = Segment.model_validate_json(line)
        try:
            images = [Path(image) for image in request.images]
            scan = images if len(images) > 1 else images[0]
            result = infer(scan, bundle=loaded, device=start.device, force=True)
            result.save(request.output)
            shapes = [model_grid(result.volume.shape, result.volume.affine, spec).shape for spec in specs]
            windows = [windows_of(spec, shape) for spec, shape in zip(specs, shapes, strict=True)]
            answer = Segmented(
                case=request.case,
                seconds=sum(value for stage, value in result.record.seconds.items() if stage != "bundle"),
                windows=sum(windows),
                gmacs=sum(count * cost.gmacs for count, cost in zip(windows, costs, strict=True)),
                peak_rss_mib=peak_rss_mib(),
            )
        except MedsegError as error:
            answer = Segmented(case=request.case, peak_rss_mib=peak_rss_mib(), error=str(error))
        _say(answers, answer)


def _say(answers: TextIO, answer: BaseModel) -> None:
    answers.write(answer.model_dump_json() + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
