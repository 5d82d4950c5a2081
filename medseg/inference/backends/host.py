"""The network of a bundle on the CPU: which back end computes it, and when a conversion is worth its time."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from medseg.bundles.clearance import Accuracy, Method, cleared
from medseg.bundles.load import Bundle
from medseg.errors import BundleError, UsageError
from medseg.inference.backends.cache import Entry
from medseg.inference.backends.convert import NotConvertibleError, check_convertible, export
from medseg.inference.backends.sessions import Session, missing, native_bf16, open_session, require, version
from medseg.inference.device import Precision

log = logging.getLogger(__name__)

Backend = Literal["auto", "eager", "onnxruntime", "openvino"]

_RUNTIME, _FAST, _REDUCED = Method("onnxruntime", "fp32"), Method("openvino", "fp32"), Method("openvino", "bf16")

# Largest difference of logits that a probe window may show, in standard deviations of the logits.
_BOUNDS: dict[Accuracy, float] = {"exact": 0.002, "fast": 0.05, "reduced": 1.0}

# What a conversion takes, and what the first look at a converted network takes: fixed seconds, and windows. Measured
# conversions of the project's networks took 10 to 48 s of CPU time.
_CONVERSION = (45.0, 6.0)
_OPENING = (4.0, 3.0)
# A conversion has to save this many times what it costs, if a back end of the class saves this share of a window's
# time: the least that the project's networks gained, but for one that gained nothing by ONNX Runtime.
_MARGIN = 1.5
_GAIN: dict[Accuracy, float] = {"exact": 0.15, "fast": 0.5, "reduced": 0.6}


@dataclass(frozen=True, slots=True)
class Probe:
    """One window through the plain network and through a back end.

    Attributes:
        eager_s: wall time of the plain network, seconds.
        backend_s: of the back end.
        eager_load_s: to build the plain network, with the imports that it needs.
        load_s: to open the converted network.
        difference: largest difference of logits, in standard deviations of the plain network's logits.
    """

    eager_s: float
    backend_s: float
    eager_load_s: float
    load_s: float
    difference: float

    def agrees(self, accuracy: Accuracy) -> bool:
        """Whether the logits lie within the bound of a class; NaN does not."""
        return self.difference <= _BOUNDS[accuracy]

    def pays(self, windows: int) -> bool:
        """Whether opening the converted network and computing so many windows takes less time than without it."""
        return self.load_s + windows * self.backend_s < self.eager_load_s + windows * self.eager_s


def host_network(bundle: Bundle, *, backend: str = "auto", precision: str = "auto") -> HostNetwork:
    """The network of a bundle, ready to run on the CPU.

    A bundle that stays in memory keeps it, see `Bundle.once`.

    Args:
        bundle: the bundle.
        backend: eager, onnxruntime or openvino; auto: the fastest that the bundle is cleared for.
        precision: fp32 or bf16; auto: bf16 where the bundle is cleared for it, and never of eager.

    Raises:
        UsageError: another word, or a back end that has no such precision.
        DeviceError: a back end asked for by name is not installed.
        BundleError: the bundle cannot be loaded; or the network cannot be converted for a back end asked for by name.
    """
    check_choice(backend, precision)
    key = f"host network {backend} {precision} {torch.get_num_threads()}"
    return bundle.once(key, partial(HostNetwork, bundle, backend, precision))


def check_choice(backend: str, precision: str, *, device: str = "cpu") -> None:
    """Refuse options that mean nothing.

    Raises:
        UsageError: another word, a back end without that precision, or one that is not for the device.
        DeviceError: a back end asked for by name is not installed.
    """
    for option, value, known in (("--backend", backend, Backend), ("--precision", precision, Precision)):
        if value not in get_args(known):
            raise UsageError(option, f"{value!r} is not known", f"use {', '.join(get_args(known))}")
    if backend in ("onnxruntime", "openvino") and device != "cpu":
        raise UsageError("--backend", f"{backend} computes on the CPU, not on {device}", "add --device cpu")
    if (backend, precision) == ("onnxruntime", "bf16"):
        raise UsageError("--precision", "onnxruntime has no bf16", "use --backend openvino or eager")
    if backend in ("onnxruntime", "openvino"):
        require(backend)


class HostNetwork:
    """A network on the CPU, called with windows (B, C, D, H, W) or (B, C, h, w), which gives logits.

    A back end asked for by name is there from the start. Otherwise the plain network runs, unless its converted form
    lies in the cache and pays; and where a scan has many windows, the plain network is timed on the first of them,
    which decides whether it is converted there and then. All windows of a scan come from one back end.

    Attributes:
        method: what computes the network now.
        cpu_s: CPU seconds that windows have taken so far, all threads together.
        seen: windows so far.
    """

    def __init__(self, bundle: Bundle, backend: str, precision: str) -> None:
        self.cpu_s, self.seen = 0.0, 0
        self._warnings: list[str] = []
        self._bundle, self._threads = bundle, torch.get_num_threads()
        self._network: nn.Module | None = None
        self._session: Session | None = None
        self._undecided = False
        self._windows, self._spent, self._load_s = 0, 0.0, 0.0
        self._named = backend in ("onnxruntime", "openvino")
        self._autocast = precision == "bf16" and not self._named
        self.method = Method("eager", "bf16" if self._autocast else "fp32")
        self._target = self._choose(backend, precision)
        if self._target == self.method:
            self._plain()
            return
        self._entry = Entry(bundle)
        if self._named:
            self._convert(None)
        elif self._entry.model is None or self._known() is None:
            self._plain()  # damaged weights are found before the scan is read

    def expect(self, windows: int) -> None:
        """Say how many windows the next scan has, all flips together."""
        self._windows, self._undecided = windows, False
        if self._session is not None or self._target.backend == "eager":
            return
        known = self._known() if self._entry.model is not None else None
        if known is None:
            self._undecided = self._convertible()
        elif known.agrees(self._target.accuracy) and known.pays(windows):
            self._open()

    def __call__(self, batch: Tensor) -> Tensor:
        """Logits (B, K, ...) of windows."""
        begin = time.process_time()
        logits = self._logits(batch)
        self.cpu_s += time.process_time() - begin
        self.seen += len(batch)
        return logits

    def _logits(self, batch: Tensor) -> Tensor:
        if self._session is not None:
            return self._session(batch)
        logits, seconds = self._timed(batch)
        self._spent += seconds
        if self._undecided:
            self._undecided = False
            if self._worth_it(batch, seconds):
                session = self._convert(batch)
                if session is not None:
                    return session(batch)
        return logits

    def take_warnings(self) -> list[str]:
        """What the record should say; each is given once."""
        found, self._warnings = self._warnings, []
        return found

    def _choose(self, backend: str, precision: str) -> Method:
        """The method that is aimed at, by clearance and by what is installed."""
        if backend == "eager":
            return self.method
        if backend == "onnxruntime":
            return _RUNTIME
        there = not missing("openvino")
        if backend == "openvino":
            allowed = precision == "auto" and native_bf16() and self._cleared(_REDUCED)
            return _REDUCED if precision == "bf16" or allowed else _FAST
        if precision == "bf16":  # asked for by name
            return _REDUCED if there and native_bf16() else self.method
        if there and precision == "auto" and self._cleared(_REDUCED) and native_bf16():
            return _REDUCED
        if there and self._cleared(_FAST):
            return _FAST
        return self.method if missing("onnxruntime") else _RUNTIME

    def _cleared(self, method: Method) -> bool:
        answer, warning = cleared(self._bundle, method, version(method.backend))
        if warning:
            self._warnings.append(warning)
        return answer

    def _plain(self) -> nn.Module:
        if self._network is None:
            begin = time.perf_counter()
            self._network = self._bundle.network()
            self._load_s = time.perf_counter() - begin
        return self._network

    def _timed(self, batch: Tensor) -> tuple[Tensor, float]:
        """Logits float32 of the plain network, and the wall time it took."""
        network, begin = self._plain(), time.perf_counter()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            found = network(batch)
        logits: Tensor = (found if isinstance(found, Tensor) else found[0]).float()
        return logits, time.perf_counter() - begin

    def _convertible(self) -> bool:
        """Whether a conversion may be tried; networks that have none stay with PyTorch without a word."""
        if self._entry.failed:
            log.debug("not converted: %s", self._entry.failed)
            return False
        try:
            check_convertible(self._plain())
        except NotConvertibleError as err:
            log.debug("not converted: %s", err)
            return False
        return True

    def _worth_it(self, batch: Tensor, seconds: float) -> bool:
        """Whether the time a back end can save is well above what it takes to get there.

        The first pass warms up caches and says too much, so that a second one decides. In a batch of scans, the cost is
        also paid once twice as much has gone into the plain network.
        """
        fixed, windows = _OPENING if self._entry.model is not None else _CONVERSION

        def pays(each: float) -> bool:
            cost = fixed + windows * each
            return self._windows * each * _GAIN[self._target.accuracy] > _MARGIN * cost or self._spent > 2 * cost

        if not pays(seconds / len(batch)):
            return False
        return pays(min(seconds, self._timed(batch)[1]) / len(batch))

    def _convert(self, batch: Tensor | None) -> Session | None:
        """Convert the network unless the cache has it, and hold it against the plain one.

        Args:
            batch: windows to compare on; None, or windows of one value: noise.

        Returns:
            What computes from now on, None for the plain network.

        Raises:
            BundleError: it does not work, and the back end was asked for by name.
        """
        try:
            model = self._entry.model
            if model is None:
                log.info("converting the network for %s", self._target.backend)
                model = self._entry.make(partial(export, self._plain(), self._entry.shape))
            known = self._known()
            if known is None:
                known = self._probe(model, batch)
            if not known.agrees(self._target.accuracy):
                self._refuse(f"differs by {known.difference:.2g} standard deviations of the logits", keep=False)
            elif self._named or known.pays(self._windows):
                self._open()
        except BundleError:
            raise
        except Exception as err:  # an exporter fails in any way it likes
            if not isinstance(err, OSError) and self._entry.model is None:
                self._note_failure(f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"[:200])
            self._refuse(type(err).__name__, cause=err)
        return self._session

    def _note_failure(self, reason: str) -> None:
        try:
            self._entry.note_failure(reason)
        except OSError as err:
            log.debug("failure not noted: %s", err)

    def _refuse(self, why: str, *, cause: Exception | None = None, keep: bool = True) -> None:
        """Stay with the plain network and say so, or fail where the back end was asked for by name."""
        what = "cannot be used" if keep else "does not reproduce the network"
        if isinstance(cause, NotConvertibleError):
            why = str(cause)
        if self._named:
            raise BundleError(self._bundle.name, f"{self._target} {what} ({why})", "use --backend eager") from cause
        log.debug("%s %s", self._target, what, exc_info=cause)
        self._warnings.append(f"{self._target} {what} ({why}); PyTorch was used")
        self._target = self.method

    def _open(self) -> None:
        """Load the converted network and let go of the plain one."""
        model = self._entry.model
        if model is None:
            return
        try:
            self._session = open_session(self._target, model, self._threads)
        except Exception as err:
            self._refuse(type(err).__name__, cause=err)
            return
        self.method, self._network = self._target, None

    def _known(self) -> Probe | None:
        """What an earlier run on this machine found."""
        found = self._entry.probe(self._probe_name())
        try:
            return None if found is None else Probe(**{key: float(value) for key, value in found.items()})
        except (TypeError, ValueError):
            return None

    def _probe(self, model: Path, batch: Tensor | None) -> Probe:
        """Compare both on one window, and keep what was found."""
        if batch is None or bool((batch == batch.flatten()[0]).all()):
            batch = torch.randn(self._entry.shape, generator=torch.Generator().manual_seed(0))
        window = batch[:1]
        wanted, first_s = self._timed(window)
        eager_s = min(first_s, self._timed(window)[1])  # the first pass warms up
        begin = time.perf_counter()
        session = open_session(self._target, model, self._threads)
        load_s = time.perf_counter() - begin
        session(window)  # the first call sets up buffers
        begin = time.perf_counter()
        found = session(window)
        backend_s = time.perf_counter() - begin
        difference = float((found - wanted).abs().max() / wanted.std().clamp_min(1e-6))
        probe = Probe(
            eager_s, backend_s, self._load_s, load_s, difference if difference == difference else float("inf")
        )
        log.info("%s: %s", self._target, asdict(probe))
        try:
            self._entry.note_probe(self._probe_name(), asdict(probe))
        except OSError as err:
            log.debug("probe not kept: %s", err)
        return probe

    def _probe_name(self) -> str:
        machine = hashlib.sha256(json.dumps([_cpu(), self._threads]).encode()).hexdigest()[:8]
        return f"{self._target.backend}-{version(self._target.backend)}-{self._target.precision}-{machine}"


def _cpu() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines: Sequence[str] = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ()
    return next((line for line in lines if line.startswith("model name")), platform.processor())
