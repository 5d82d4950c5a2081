"""One process's place among those that train a network together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

Own = TypeVar("Own")


@dataclass(frozen=True)
class Rank:
    """Its number, and what it does together with the others; alone, nothing is exchanged.

    Attributes:
        number: 0 to `count` - 1; number 0 leads: it alone writes files and reports.
        count: how many there are.
        stop: set by the process that started them when all are to stop.
    """

    number: int = 0
    count: int = 1
    stop: Event | None = None

    @property
    def leads(self) -> bool:
        """Whether this one writes."""
        return self.number == 0

    @property
    def told_to_stop(self) -> bool:
        """Whether the process that started the ranks wants them to stop."""
        return self.stop is not None and self.stop.is_set()

    def join(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network with gradients averaged over the ranks; parameters without a gradient are allowed."""
        if self.count == 1:
            return network
        devices = [device] if device.type == "cuda" else None
        joined: nn.Module = DistributedDataParallel(network, device_ids=devices, static_graph=True)
        return joined

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Each value summed over the ranks."""
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor]

    def gather(self, own: Own) -> list[Own]:
        """The value of each rank, by number."""
        if self.count == 1:
            return [own]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, own)
        return found


ALONE = Rank()
