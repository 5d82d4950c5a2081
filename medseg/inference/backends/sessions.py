"""Converted networks, loaded: a callable for each back end."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from medseg.bundles.clearance import Method
from medseg.errors import DeviceError
from medseg.inference.backends.convert import INPUT

Session = Callable[[Tensor], Tensor]
"""Logits (B, K, ...) float32 of a batch of windows (B, C, ...) float32, both on the host."""

PACKAGES = ("onnxruntime", "openvino")

# The converter needs these; OpenVINO also reads what ONNX Runtime has folded.
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def missing(backend: str) -> list[str]:
    """Packages that a back end needs and that are not installed."""
    return [name for name in dict.fromkeys((*_NEEDED, backend)) if importlib.util.find_spec(name) is None]


def require(backend: str) -> None:
    """Refuse a back end whose packages are not there.

    Raises:
        DeviceError: they are not; the message says how to install them.
    """
    if lacking := missing(backend):
        raise DeviceError(
            "--backend", f"{backend} needs {', '.join(lacking)}, not installed", 'pip install "medseg[fast]"'
        )


def version(backend: str) -> str:
    """The installed version of a back end; eager's is torch's."""
    return importlib.metadata.version("torch" if backend == "eager" else backend)


def _openvino_package() -> ModuleType:
    """``openvino``, without its usage reports.

    Importing it counts a use in the user's folder and sends it to its makers, unasked; where the reporting package is
    missing, OpenVINO goes on without.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: an import fails
    return importlib.import_module("openvino")


def native_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this machine, rather than falling back to float32."""
    return "BF16" in _openvino_package().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def open_session(method: Method, path: Path, threads: int) -> Session:
    """Load a converted network.

    Args:
        method: the back end and its precision.
        path: what `convert.export` wrote.
        threads: to compute with.

    Raises:
        Exception: whatever the back end raises of a file that it cannot use.
    """
    return _openvino(path, method.precision, threads) if method.backend == "openvino" else _onnxruntime(path, threads)


def _onnxruntime(path: Path, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # planned ahead, memory is nearly twice as much and no call is faster
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        windows = batch.contiguous().numpy()
        return torch.cat(
            [torch.from_numpy(session.run(None, {INPUT: windows[i : i + 1]})[0]) for i in range(len(windows))]
        )

    return run


def _openvino(path: Path, precision: str, threads: int) -> Session:
    core = _openvino_package().Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # several worker processes would be pinned to the same cores
    }
    request = core.compile_model(core.read_model(str(path)), "CPU", settings).create_infer_request()

    def run(batch: Tensor) -> Tensor:
        windows = batch.contiguous().numpy()
        # The request's buffer is written again by the next window.
        return torch.cat([torch.from_numpy(request.infer([windows[i : i + 1]])[0].copy()) for i in range(len(windows))])

    return run
