"""medseg's own pipeline, measured: what `medseg infer` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import nibabel  # noqa: F401 - its import is no part of reading
import scipy.ndimage  # noqa: F401
import torch
from torch import nn

from medseg.benchmark.meter import Meter, NetworkClock
from medseg.bundles.load import Bundle
from medseg.inference.backends.host import Backend, HostNetwork
from medseg.inference.device import Precision
from medseg.inference.record import BackendRecord
from medseg.inference.run import infer

T = TypeVar("T")


@dataclass(frozen=True)
class _ClockedBundle(Bundle):
    """A bundle whose network is timed: on a CPU by the back end itself, elsewhere as the module is called."""

    inner: Bundle
    clock: NetworkClock
    on_host: bool
    hosts: list[HostNetwork] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        return self.inner.sha256

    def network(self) -> nn.Module:
        network = self.inner.network()
        return network if self.on_host else self.clock.attach(network)

    def once(self, _key: str, make: Callable[[], T]) -> T:
        made = make()
        if isinstance(made, HostNetwork):
            self.hosts.append(made)
        return made


def run_medseg(
    bundle: Bundle,
    scans: Sequence[Path],
    output: Path,
    device: torch.device,
    meter: Meter,
    clock: NetworkClock,
    *,
    backend: Backend,
    precision: Precision,
) -> tuple[int, BackendRecord]:
    """Segment a scan; returns how many windows cover it, and what computed the network.

    Args:
        bundle: what to run.
        scans: a file for each channel, or one.
        output: label map to write.
        device: where the network runs.
        meter: gets the stages that `infer` reports, and "write".
        clock: gets the network's time.
        backend: as for `infer`.
        precision: as for `infer`.

    Raises:
        MedsegError: as `infer`.
    """
    clocked = _ClockedBundle(
        bundle.name,
        bundle.root,
        bundle.spec,
        bundle.metadata,
        bundle.weights,
        inner=bundle,
        clock=clock,
        on_host=device.type == "cpu",
    )
    stages: list[str] = []

    def begin(stage: str, _done: int, _all: int) -> None:
        if stages[-1:] != [stage]:
            stages.append(stage)
            meter.begin(stage)

    result = infer(
        scans if len(scans) > 1 else scans[0],
        bundle=clocked,
        device=str(device),
        force=True,
        backend=backend,
        precision=precision,
        progress=begin,
    )
    meter.begin("write")
    result.save(output, overwrite=True)
    meter.end()
    for stage in ("network", "restore"):  # planes are restored while the network runs: infer tells the two apart
        meter.wall_s[stage] = result.record.seconds[stage]
    for host in clocked.hosts:
        clock.cpu_s += host.cpu_s
        clock.windows += host.seen
    return result.record.windows, result.record.backends[0]
