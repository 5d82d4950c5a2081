"""A network as an ONNX file with its window size fixed, which ONNX Runtime and OpenVINO read."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

INPUT, OUTPUT = "image", "logits"

# The scan of these networks is a compiled loop on the CPU; written out for export it is slower, and takes minutes.
_NOT_CONVERTED = ("medseg.networks.layers.vss",)


class NotConvertibleError(Exception):
    """The network is one that stays with PyTorch."""


class _First(nn.Module):
    """A network that gives the first of its outputs only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        found = self.network(image)
        logits: Tensor = found if isinstance(found, Tensor) else found[0]
        return logits


def check_convertible(network: nn.Module) -> None:
    """Refuse networks known to have no use of a conversion.

    Raises:
        NotConvertibleError: it holds a selective scan.
    """
    if any(type(module).__module__ in _NOT_CONVERTED for module in network.modules()):
        raise NotConvertibleError("its selective scan runs in PyTorch only")


def export(network: nn.Module, shape: Sequence[int], path: Path) -> None:
    """Write a network for windows of one shape, constants folded.

    Args:
        network: in eval mode, on the CPU.
        shape: of a batch of one window, (1, C, D, H, W) or (1, C, H, W).
        path: the file to write.

    Raises:
        NotConvertibleError: see `check_convertible`.
        Exception: whatever the exporter raises of a network that it does not know.
    """
    check_convertible(network)
    raw = path.with_suffix(".raw")
    with torch.no_grad(), _quiet(), _plain_attention(network):
        torch.onnx.export(
            _First(network).eval(),
            (torch.zeros(tuple(shape)),),
            str(raw),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
    _fold(raw, path)
    raw.unlink()


def _fold(source: Path, target: Path) -> None:
    """Compute once what does not depend on the image: the attention masks of shifted windows, seconds at each start."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


@contextmanager
def _plain_attention(network: nn.Module) -> Iterator[None]:
    """Attention as products and sums: fused, the mask would be stored for every head, three times the file's size."""
    fused = [module for module in network.modules() if getattr(module, "use_flash_attention", False) is True]
    for module in fused:
        module.use_flash_attention = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.use_flash_attention = True  # type: ignore[assignment]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes, which are about its own rules."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
