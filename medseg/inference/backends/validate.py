"""``medseg bundles validate``: the labels of every back end beside those of the plain network, case by case."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundles.clearance import Clearance, Method, agreement, version_family
from medseg.bundles.load import Bundle, ResidentBundle
from medseg.errors import DeviceError, UsageError
from medseg.evaluation.dice import dice
from medseg.inference.backends.host import HostNetwork, host_network
from medseg.inference.backends.sessions import missing, native_bf16, version
from medseg.inference.preprocess import preprocess
from medseg.inference.segment import segment
from medseg.io.read import read_volume

Progress = Callable[[int, int], None]

_COMPARED = (Method("onnxruntime", "fp32"), Method("openvino", "fp32"), Method("openvino", "bf16"))
# Windows of each case whose logits are kept for comparison: all would be gigabytes.
_KEPT_WINDOWS = 4


def methods(backends: Sequence[str] = ()) -> list[Method]:
    """The methods that can be compared on this machine.

    Args:
        backends: onnxruntime, openvino or both; empty: those that are installed.

    Raises:
        UsageError: another word. DeviceError: a back end is not installed, or none is.
    """
    for name in backends:
        if name not in {method.backend for method in _COMPARED}:
            raise UsageError("--backend", f"{name!r} is not compared", "use onnxruntime or openvino")
    wanted = [method for method in _COMPARED if not backends or method.backend in backends]
    found = [method for method in wanted if not missing(method.backend)]
    if not found or (backends and len(found) < len(wanted)):
        names = ", ".join(dict.fromkeys(method.backend for method in wanted if method not in found))
        raise DeviceError("--backend", f"{names} not installed", 'pip install "medseg[fast]"')
    return [method for method in found if method.precision != "bf16" or native_bf16()]


@dataclass
class _Tally:
    """What was found of one method so far."""

    network: HostNetwork
    dice: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    difference: float = 0.0


def validate(
    bundle: Bundle,
    cases: Sequence[Sequence[Path]],
    compared: Sequence[Method],
    *,
    progress: Progress | None = None,
) -> list[Clearance]:
    """Compare methods with the plain network.

    Args:
        bundle: with weights.
        cases: the scans, a file for each channel or one for all.
        compared: see `methods`.
        progress: called with (cases done, cases in all).

    Returns:
        What was found of each method, in their order.

    Raises:
        BundleError: the network cannot be converted, or a converted one does not reproduce it.
        InputError: a scan cannot be read.
    """
    kept = ResidentBundle.of(bundle)
    plain = host_network(kept, backend="eager")
    tallies = {
        method: _Tally(host_network(kept, backend=method.backend, precision=method.precision)) for method in compared
    }
    plain_s = 0.0
    for done, scans in enumerate(cases):
        volume = read_volume(list(scans) if len(scans) > 1 else scans[0], channels=bundle.spec.in_channels)
        case = preprocess(volume, bundle.spec)
        first = _Timed(plain)
        reference = segment(case, first, bundle.spec).labels
        plain_s += first.seconds
        for tally in tallies.values():
            run = _Timed(tally.network, first.logits)
            labels = segment(case, run, bundle.spec).labels
            tally.seconds += run.seconds
            tally.difference = max(tally.difference, run.difference)
            _add(tally.dice, labels, reference, bundle.spec.labels)
        if progress is not None:
            progress(done + 1, len(cases))
    return [
        Clearance(
            method.backend,
            method.precision,
            version_family(version(method.backend)),
            bundle.sha256,
            len(cases),
            {name: found for name, values in tally.dice.items() if (found := agreement(values)) is not None},
            round(plain_s / tally.seconds, 2),
            tally.difference,
        )
        for method, tally in tallies.items()
    ]


def _add(
    found: dict[str, list[float]],
    labels: NDArray[np.integer],
    reference: NDArray[np.integer],
    names: Mapping[int, str],
) -> None:
    for value, name in names.items():
        if value:
            found.setdefault(name, []).append(dice(labels == value, reference == value))


class _Timed:
    """A network whose CPU time is taken, and whose first logits are kept or compared.

    Args:
        network: the network.
        wanted: the first logits of the plain one, None for the plain one itself.
    """

    def __init__(self, network: HostNetwork, wanted: Sequence[Tensor] | None = None) -> None:
        self.logits: list[Tensor] = []
        self.seconds = self.difference = 0.0
        self._network, self._wanted, self._calls = network, wanted, 0

    def __call__(self, batch: Tensor) -> Tensor:
        begin = time.process_time()
        logits = self._network(batch)
        self.seconds += time.process_time() - begin
        if self._wanted is not None and self._calls < len(self._wanted):
            self.difference = max(self.difference, float((logits - self._wanted[self._calls]).abs().max()))
        elif self._wanted is None and self._calls * len(batch) < _KEPT_WINDOWS:
            self.logits.append(torch.clone(logits))
        self._calls += 1
        return logits
