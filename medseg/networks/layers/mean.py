"""Networks of one kind, trained on different folds of the data, as one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class MeanOfNetworks(nn.Module):
    """The mean of the logits of several networks.

    Args:
        networks: at least one; each maps an image to logits, or to several outputs of which the first is taken.

    Shape:
        as that of each network.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.folds = nn.ModuleList(networks)

    def forward(self, image: Tensor) -> Tensor:
        total = _first(self.folds[0](image))
        for network in self.folds[1:]:
            total = total + _first(network(image))
        return total / len(self.folds)


def _first(found: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]
