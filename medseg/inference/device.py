"""Where the network runs: what the engine asks of a device, and how much memory there is.

The engine is one path for all devices. On the host everything is at hand: sending and fetching hand back what they
were given. A CUDA device has memory of its own, runs behind the host, and copies beside its computations.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from medseg.errors import DeviceError, UsageError

Predictor = Callable[[Tensor], Tensor | tuple[Tensor, ...] | list[Tensor]]
Precision = Literal["auto", "fp32", "bf16"]
"""What networks compute in: `auto` is bfloat16 or float16 on a CUDA device and float32 on the host. Sums of logits are
float32 always; `fp32` also turns TF32 off."""

# Passes of the network that wait on the device before the host waits, too: one runs, two have their windows there.
_IN_LINE = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What a step took.

    Attributes:
        seconds: wall time until the device was done.
        peak: device memory beyond what was held before, at its highest, bytes.
    """

    seconds: float
    peak: int


@dataclass(frozen=True)
class Arrival:
    """An array on its way to the host.

    Attributes:
        here: the array; what it holds counts once it has arrived.
        event: marks the end of the copy; None when there is nothing to wait for.
    """

    here: Tensor
    event: torch.cuda.Event | None = None

    def ready(self) -> bool:
        """Whether it has arrived."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """The array, arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.here


class Device(Protocol):
    """What the engine asks of the place where the network runs.

    Attributes:
        where: the name by which torch knows it.
        own_memory: whether its memory is not the host's, so that arrays have to be sent and fetched.
        precision: what the network computes in: fp32, bf16 or fp16; None leaves it to the caller's settings.
    """

    @property
    def where(self) -> torch.device: ...  # noqa: D102

    @property
    def own_memory(self) -> bool: ...  # noqa: D102

    @property
    def precision(self) -> str | None: ...  # noqa: D102

    def free(self) -> int:
        """Bytes that can still be allocated."""

    def put(self, tensor: Tensor) -> Tensor:
        """A large array, copied to the device before this returns."""

    def send(self, tensor: Tensor) -> Tensor:
        """A small array; the copy runs beside what the device computes."""

    def fetch(self, tensor: Tensor) -> Arrival:
        """An array on its way to the host, beside what the device computes."""

    def zeros(self, *shape: int) -> Tensor:
        """A float32 array."""

    def forward(self, network: Predictor, batch: Tensor) -> Tensor:
        """Logits (B, K, ...) float32 on the device; of several outputs the first."""

    def cost_of(self, step: Callable[[], T]) -> tuple[T, Cost]:
        """Run a step to its end."""

    def busy(self) -> bool:
        """Whether it still computes what it was given."""

    def release(self) -> None:
        """Give back what is not in use."""


class HostDevice:
    """The CPU.

    Args:
        precision: bf16 runs networks under autocast; everything else is float32.
    """

    where = torch.device("cpu")
    own_memory = False

    def __init__(self, precision: Precision | None = None) -> None:
        self.precision = "bf16" if precision == "bf16" else "fp32"

    def free(self) -> int:
        """Bytes of host memory."""
        return available_memory()

    def put(self, tensor: Tensor) -> Tensor:
        """The array itself."""
        return tensor.to(self.where)

    send = put

    def fetch(self, tensor: Tensor) -> Arrival:
        """The array itself."""
        return Arrival(tensor)

    def zeros(self, *shape: int) -> Tensor:
        """A float32 array."""
        return torch.zeros(shape)

    def forward(self, network: Predictor, batch: Tensor) -> Tensor:
        """Logits float32; of several outputs the first."""
        with torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext():
            found = network(batch)
        return (found if isinstance(found, Tensor) else found[0]).to(self.where, torch.float32)

    def cost_of(self, step: Callable[[], T]) -> tuple[T, Cost]:
        """Run a step; its memory is not known."""
        begin = time.perf_counter()
        done = step()
        return done, Cost(time.perf_counter() - begin, 0)

    def busy(self) -> bool:
        """Never: calls return when their work is done."""
        return False

    def release(self) -> None:
        """Nothing: the host's allocator keeps little."""


class CudaDevice:
    """A CUDA device; copies in and out have a stream each, beside the one that computes.

    Args:
        where: cuda or cuda:N.
        precision: see `Precision`; None leaves autocast and TF32 as they are.
    """

    own_memory = True

    def __init__(self, where: torch.device, precision: Precision | None = None) -> None:
        self.where = where if ":" in str(where) else torch.device("cuda", torch.cuda.current_device())
        half: torch.dtype | None = torch.bfloat16 if precision == "bf16" else None
        if precision == "auto":
            with torch.cuda.device(self.where):  # emulated bfloat16 is slower than float16
                native = torch.cuda.is_bf16_supported(including_emulation=False)
            half = torch.bfloat16 if native else torch.float16
        self._half, self._exact = half, precision == "fp32"
        self._into, self._out = (torch.cuda.Stream(self.where) for _ in range(2))  # type: ignore[no-untyped-call]
        self._line: deque[torch.cuda.Event] = deque()
        torch.cuda.reset_peak_memory_stats(self.where)

    @property
    def precision(self) -> str | None:
        """What the network computes in."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32" if self._exact else None}[self._half]

    def free(self) -> int:
        """Bytes that the driver has, and those that torch holds without using them."""
        idle = torch.cuda.memory_reserved(self.where) - torch.cuda.memory_allocated(self.where)
        return int(torch.cuda.mem_get_info(self.where)[0]) + idle

    def put(self, tensor: Tensor) -> Tensor:
        """A large array; pageable memory, as locking it would take as long as the copy."""
        return tensor.to(self.where)

    def send(self, tensor: Tensor) -> Tensor:
        """A small array, through locked memory and the stream of the copies in."""
        if tensor.device.type != "cpu":
            return tensor.to(self.where)
        compute = torch.cuda.current_stream(self.where)
        # torch's allocator hands a locked buffer out again only when the copies from it have ended.
        staged = _locked(tensor).copy_(tensor)
        with torch.cuda.stream(self._into):
            there = staged.to(self.where, non_blocking=True)
        compute.wait_stream(self._into)
        there.record_stream(compute)
        return there

    def fetch(self, tensor: Tensor) -> Arrival:
        """An array on its way into locked memory, on the stream of the copies out."""
        if tensor.device.type == "cpu":
            return Arrival(tensor)
        self._out.wait_stream(torch.cuda.current_stream(self.where))
        with torch.cuda.stream(self._out):
            here = _locked(tensor).copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._out)
        tensor.record_stream(self._out)
        return Arrival(here, arrived)

    def zeros(self, *shape: int) -> Tensor:
        """A float32 array."""
        return torch.zeros(shape, device=self.where)

    def forward(self, network: Predictor, batch: Tensor) -> Tensor:
        """Logits, queued: the host does not wait for them unless too many passes are in line."""
        with torch.cuda.device(self.where):
            with self._computing():
                found = network(batch)
            logits = (found if isinstance(found, Tensor) else found[0]).float()
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        self._line.append(done)
        if len(self._line) > _IN_LINE:
            self._line.popleft().synchronize()
        return logits

    def cost_of(self, step: Callable[[], T]) -> tuple[T, Cost]:
        """Run a step between two waits for the device.

        The peak is that since this device was opened, so that it can be read at the end of a case; steps of which the
        engine asks take more and more.
        """
        torch.cuda.synchronize(self.where)
        held, begin = torch.cuda.memory_allocated(self.where), time.perf_counter()
        done = step()
        torch.cuda.synchronize(self.where)
        seconds = time.perf_counter() - begin
        return done, Cost(seconds, torch.cuda.max_memory_allocated(self.where) - held)

    def busy(self) -> bool:
        """Whether the last pass of the network is not done."""
        return bool(self._line) and not self._line[-1].query()  # type: ignore[no-untyped-call]

    def release(self) -> None:
        """Wait for what runs, and give torch's idle memory back to the driver."""
        self._line.clear()
        torch.cuda.synchronize(self.where)
        torch.cuda.empty_cache()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        autocast: AbstractContextManager[object] = (
            torch.autocast("cuda", self._half) if self._half is not None else nullcontext()
        )
        if not self._exact:
            with autocast:
                yield
            return
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _locked(like: Tensor) -> Tensor:
    """A host array of the same shape and type, in locked memory where there is some."""
    try:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
    except RuntimeError:  # the system's limit; copies then wait for the device, and nothing else changes
        return torch.empty(like.shape, dtype=like.dtype)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory ran out, in torch's own allocator or in a library's."""
    texts = ("_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def open_device(where: torch.device, precision: Precision | None = None) -> Device:
    """The device of this name.

    Args:
        where: the CPU or a CUDA device.
        precision: see `Precision`; None leaves it to the caller's settings.

    Raises:
        UsageError: another word for the precision.
    """
    if precision is not None and precision not in get_args(Precision):
        raise UsageError("--precision", f"{precision!r} is not a precision", f"use {', '.join(get_args(Precision))}")
    return HostDevice(precision) if where.type == "cpu" else CudaDevice(where, precision)


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
