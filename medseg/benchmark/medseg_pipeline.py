"""medseg's own pipeline, measured: what `medseg infer` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel  # noqa: F401 - its import is no part of reading
import scipy.ndimage  # noqa: F401
import torch
from torch import nn

from medseg.benchmark.meter import Meter, NetworkClock
from medseg.bundles.load import Bundle
from medseg.inference.run import infer


@dataclass(frozen=True)
class _ClockedBundle(Bundle):
    """A bundle whose network is timed."""

    inner: Bundle
    clock: NetworkClock

    @property
    def sha256(self) -> str:
        return self.inner.sha256

    def network(self) -> nn.Module:
        return self.clock.attach(self.inner.network())


def run_medseg(
    bundle: Bundle, scans: Sequence[Path], output: Path, device: torch.device, meter: Meter, clock: NetworkClock
) -> int:
    """Segment a scan; returns how many windows cover it.

    Args:
        bundle: what to run.
        scans: a file for each channel, or one.
        output: label map to write.
        device: where the network runs.
        meter: gets the stages that `infer` reports, and "write".
        clock: gets the network's time.

    Raises:
        MedsegError: as `infer`.
    """
    clocked = _ClockedBundle(
        bundle.name, bundle.root, bundle.spec, bundle.metadata, bundle.weights, inner=bundle, clock=clock
    )
    stages: list[str] = []

    def begin(stage: str, _done: int, _all: int) -> None:
        if stages[-1:] != [stage]:
            stages.append(stage)
            meter.begin(stage)

    result = infer(
        scans if len(scans) > 1 else scans[0], bundle=clocked, device=str(device), force=True, progress=begin
    )
    meter.begin("write")
    result.save(output, overwrite=True)
    meter.end()
    for stage in ("network", "restore"):  # planes are restored while the network runs: infer tells the two apart
        meter.wall_s[stage] = result.record.seconds[stage]
    return result.record.windows
