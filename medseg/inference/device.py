"""Where the network runs, and how much memory there is."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from medseg.errors import DeviceError, UsageError


def choose_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: another word.
        DeviceError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or name == "cpu:":
        raise UsageError("--device", f"{name!r} is not a device", "use auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise DeviceError("--device", f"{name} asked for, {count} CUDA devices found", "use --device auto or cpu")
    return torch.device(name)


def available_memory() -> int:
    """Bytes of host memory that can be allocated without swapping, the control group's limit included."""
    bounds = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        bounds += [int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"]
    elif hasattr(os, "sysconf"):
        bounds.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdecimal():
        bounds.append(max(int(text) - int(used.read_text()), 0))
    return min(bounds, default=2**63)
