"""What one forward pass costs: parameters and multiply-accumulates, without computing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from medseg.networks.registry import create


@dataclass(frozen=True)
class Cost:
    """Number of parameters, and billions of multiply-accumulates as `medseg.networks.facts.COUNTED` says."""

    parameters: int
    gmacs: float


def measure_cost(name: str, arguments: Mapping[str, Any], shape: Sequence[int]) -> Cost:
    """Count one forward pass on the meta device, where tensors have shapes and no content.

    Args:
        name: a registered architecture.
        arguments: of its constructor.
        shape: of the input, (B, C, D, H, W) or (B, C, H, W).
    """
    network = create(name, **arguments).eval().to("meta")
    counter = FlopCounterMode(display=False)
    # The plain attention is made of products that the counter knows.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        network(torch.zeros(tuple(shape), device="meta"))
    return Cost(sum(p.numel() for p in network.parameters()), counter.get_total_flops() / 2e9)
