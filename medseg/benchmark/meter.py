"""Clocks and gauges of one measured process."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def peak_rss_mib() -> float:
    """The most resident memory that this process has had, in MiB.

    On Linux not from getrusage, whose figure a process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


class Meter:
    """CPU and wall time of stages that follow one another.

    Attributes:
        cpu_s: CPU seconds of each stage, all threads together.
        wall_s: wall seconds of each stage.
    """

    def __init__(self) -> None:
        self.cpu_s: dict[str, float] = {}
        self.wall_s: dict[str, float] = {}
        self._stage = ""
        self._cpu = self._wall = 0.0

    def begin(self, stage: str) -> None:
        """End the stage under way and begin another."""
        cpu, wall = time.process_time(), time.perf_counter()
        if self._stage:
            self.cpu_s[self._stage] = self.cpu_s.get(self._stage, 0.0) + cpu - self._cpu
            self.wall_s[self._stage] = self.wall_s.get(self._stage, 0.0) + wall - self._wall
        self._stage, self._cpu, self._wall = stage, cpu, wall

    def end(self) -> None:
        """End the stage under way."""
        self.begin("")


class NetworkClock:
    """CPU time that a network spends in its forward pass.

    Attributes:
        cpu_s: CPU seconds, all threads together.
        windows: how many windows it has seen.
    """

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self.windows = 0
        self._begin = 0.0

    def attach(self, network: nn.Module) -> nn.Module:
        """The same network, its calls counted."""
        network.register_forward_pre_hook(self._before)
        network.register_forward_hook(self._after)
        return network

    def _before(self, _network: nn.Module, _arguments: Any) -> None:
        self._begin = time.process_time()

    def _after(self, _network: nn.Module, arguments: Any, _output: Any) -> None:
        self.cpu_s += time.process_time() - self._begin
        self.windows += len(arguments[0])
