"""Where a case's arrays lie, how many windows go to the network at once, and the way down when memory runs out.

On the host there is nothing to decide. A device with its own memory holds the volume and the sums of logits where both
fit beside a batch of windows; else the volume alone; else neither, and windows are copied. When its memory runs out all
the same, less and less is kept there, down to going on with the CPU. What the network has computed is never computed
again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from medseg.inference.accumulate import Ring
from medseg.inference.device import Cost, Device, HostDevice, Precision, Predictor, open_device, out_of_memory

log = logging.getLogger(__name__)

# Share of the free device memory that is planned for, and that a larger batch may be expected to take.
_PLANNED, _FOR_BATCH = 0.9, 0.8
# A batch twice as large has to be this much faster for each window.
_FASTER = 0.95

T = TypeVar("T")


class BatchSize:
    """Windows at once: doubled from 1 while that pays, found on windows whose results are kept.

    At each size a first batch is not timed, because libraries choose their kernels on it.

    Attributes:
        size: windows in a batch.
        growing: whether larger ones are still to be tried.
    """

    def __init__(self) -> None:
        self.size, self.growing = 1, True
        self._warm = False
        self._at_half: float | None = None

    def measured(self, cost: Cost, free: int) -> None:
        """Learn from a full batch.

        Args:
            cost: of the batch.
            free: bytes of device memory that were free before it.
        """
        if not self._warm:
            self._warm = True
            return
        seconds = cost.seconds / self.size
        if self._at_half is not None and seconds > _FASTER * self._at_half:
            self.size, self.growing = self.size // 2, False
        elif 2 * cost.peak >= _FOR_BATCH * free:
            self.growing = False
        else:
            self._at_half, self._warm = seconds, False
            self.size *= 2

    def halve(self) -> None:
        """Take half, and stay there."""
        self.size, self.growing = self.size // 2, False


class Field:
    """A volume that windows are cut from, on the host and, while there is room, on the device.

    Args:
        image: (C, D, H, W) float32.
    """

    def __init__(self, image: Tensor) -> None:
        self._image, self._there = image, torch.empty(0)
        self.on_device = False

    @property
    def nbytes(self) -> int:
        """Size of the volume."""
        return self._image.nbytes

    def put(self, device: Device) -> None:
        """Copy it to the device."""
        self._there, self.on_device = device.put(self._image), True

    def to_host(self) -> None:
        """Give up the copy on the device."""
        self._there, self.on_device = torch.empty(0), False

    def windows(self, places: Sequence[tuple[slice, ...]], device: Device, flips: list[int]) -> Tensor:
        """Windows (B, C, d, h, w) on the device, flipped along the dimensions `flips` of (C, d, h, w)."""
        source = self._there if self.on_device else self._image
        views = [source[place] for place in places]
        batch = torch.stack([view.flip(flips) for view in views] if flips else views)
        return batch if self.on_device else device.send(batch)


class Placement:
    """Where the arrays of one case lie; shared by all passes over it.

    Args:
        device: where the network lives.

    Attributes:
        device: where the network runs now; the host, once the other one's memory did not suffice.
        warnings: what was given up for lack of memory, in order.
    """

    def __init__(self, device: Device | None = None) -> None:
        self.device = device or HostDevice()
        self.warnings: list[str] = []
        self._batch = BatchSize()
        self._window_bytes = 0
        self._fallen = False
        self._rings: WeakSet[Ring] = WeakSet()
        self._fields: WeakSet[Field] = WeakSet()

    @classmethod
    def on(cls, where: torch.device, precision: Precision | None = None) -> Placement:
        """The placement on a device by its name; see `open_device`."""
        return cls(open_device(where, precision))

    def batch_size(self, on_host: int) -> int:
        """Windows for the next pass; on the host, as many as the bundle says."""
        return self._batch.size if self.device.own_memory else on_host

    def bring(self, network: nn.Module) -> nn.Module:
        """The network, moved to the device."""
        return self._attempt(lambda: network.to(self.device.where))

    def predict(
        self,
        network: Predictor,
        windows: Callable[[int, int], Tensor],
        count: int,
        *,
        turn: Callable[[Tensor], Tensor] = lambda logits: logits,
        on_host: int,
    ) -> Iterator[Tensor]:
        """Logits of windows, one after the other; those that are there are kept when memory runs out.

        Args:
            network: (B, C, ...) -> logits (B, K, ...).
            windows: gives windows number m to n, n excluded, on `device`.
            count: of windows.
            turn: what becomes of a batch of logits.
            on_host: windows at once on the host.

        Yields:
            Logits of each window, on `device`.
        """
        done = 0
        while done < count:
            begin = done

            def run(begin: int = begin) -> list[Tensor]:
                size = min(self.batch_size(on_host), count - begin)
                return list(self._run(network, lambda: windows(begin, begin + size), turn, size).unbind())

            ready = self._attempt(run)
            done += len(ready)
            ready.reverse()
            while ready:
                yield ready.pop()

    def _run(
        self, network: Predictor, windows: Callable[[], Tensor], turn: Callable[[Tensor], Tensor], size: int
    ) -> Tensor:
        if self._fallen and isinstance(network, nn.Module):
            network.to(self.device.where)

        def step() -> Tensor:
            return turn(self.device.forward(network, windows()))

        full = self._batch.growing and size == self._batch.size
        if not self.device.own_memory or not (full or not self._window_bytes):
            return step()
        free = self.device.free()
        logits, cost = self.device.cost_of(step)
        self._window_bytes = cost.peak // size
        if full:
            self._batch.measured(cost, free)
            if not self._batch.growing:
                log.info("%d windows at once", self._batch.size)
        return logits

    def ring(self, field: Field, classes: int, weight: Tensor, plane: Sequence[int]) -> Ring:
        """The sums of a pass, placed together with its volume once the network has seen a window.

        Args:
            field: the pass's volume.
            classes: K.
            weight: importance of a window's voxels, (d, h, w).
            plane: size of a plane of the volume.
        """
        if self.device.own_memory:
            spare = int(_PLANNED * self.device.free()) - self._window_bytes * self._batch.size
            need = 4 * (classes + 1) * weight.shape[0] * math.prod(plane)
            self._fields.add(field)
            if field.nbytes <= spare and self._try(lambda: field.put(self.device), "the image stays on the host"):
                rings: list[Ring] = []
                fits = need <= spare - field.nbytes
                if fits and self._try(
                    lambda: rings.append(Ring(classes, weight, plane, zeros=self.device.zeros)),
                    "the sums of logits stay on the host",
                ):
                    self._rings.add(rings[0])
                    return rings[0]
            log.info("device memory: the image is %s, the sums are not", "there" if field.on_device else "not there")
        return Ring(classes, weight, plane)

    def take(self, ring: Ring, index: int, inside: Sequence[slice]) -> Tensor:
        """A finished plane of the sums; see `Ring.take`."""
        return self._attempt(lambda: ring.take(index, inside), smaller_batch=False)

    def _try(self, action: Callable[[], None], otherwise: str) -> bool:
        """Whether there was memory for it."""
        try:
            action()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        else:
            return True
        self.device.release()
        self._warn(otherwise)
        return False

    def _attempt(self, action: Callable[[], T], *, smaller_batch: bool = True) -> T:
        """Do it, with less and less in the device's memory until it goes."""
        while True:
            try:
                return action()
            except RuntimeError as error:
                if not self.device.own_memory or not out_of_memory(error):
                    raise
            # Out of the handler: until then the error's traceback holds what the network had allocated.
            self._give_way(smaller_batch=smaller_batch)

    def _give_way(self, *, smaller_batch: bool) -> None:
        """Take the next step down."""
        self.device.release()
        if smaller_batch and self._batch.size > 1:
            self._batch.halve()
            self._warn(f"windows at once: {self._batch.size}")
        elif held := [ring for ring in self._rings if ring.on_device]:
            for ring in held:
                ring.to_host()
            self._warn("the sums of logits moved to the host")
        elif there := [field for field in self._fields if field.on_device]:
            for field in there:
                field.to_host()
            self._warn("the image moved to the host")
        else:
            self.device, self._fallen = HostDevice(), True
            self._warn("went on with the CPU")
        self.device.release()

    def _warn(self, step: str) -> None:
        self.warnings.append(f"device memory ran out: {step}")
        log.warning("device memory ran out: %s", step)
