"""The public data sets by name; adding one is a file beside this one and its name here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from medseg.errors import UsageError

if TYPE_CHECKING:
    from medseg.datasets.plan import About, Plan
    from medseg.datasets.source import Source

_MODULES = {
    "abdomenmri": "abdomenmri",
    "acdc": "acdc",
    "brats21": "brats21",
    "btcv": "btcv",
    "msd": "msd",
    "msd_pancreas": "msd_pancreas",
    "synapse": "synapse",
}


def names() -> list[str]:
    """The data sets, sorted."""
    return sorted(_MODULES)


def about(name: str) -> About:
    """What is known about a data set."""
    found: About = import_module(f"medseg.datasets.{_MODULES[name]}").ABOUT
    return found


def planner(name: str) -> Callable[[Source], Plan]:
    """The function that plans a data set from its source.

    Raises:
        UsageError: no such data set.
    """
    if name not in _MODULES:
        raise UsageError(f"data set {name!r}", "not known", f"known: {', '.join(names())}")
    found: Callable[[Source], Plan] = import_module(f"medseg.datasets.{_MODULES[name]}").plan
    return found
