"""One window through a network by each CPU back end, in turn, in one process with one thread: CPU time.

    python benchmarks/backends.py [--bundle NAME] [--rounds 5]

Without a bundle: Swin UNETR with feature size 12, window 7, 14 classes, 96x96x96 voxels, random weights. "monai" is
PyTorch with MONAI's default attention, "eager" is PyTorch as medseg runs it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from medseg.bundles.clearance import Method
from medseg.bundles.load import load_bundle
from medseg.inference.backends.convert import export
from medseg.inference.backends.sessions import open_session
from medseg.networks.registry import create


def main() -> None:
    """Print a row for each back end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network: nn.Module
    if asked.bundle:
        bundle = load_bundle(asked.bundle)
        network, shape = bundle.network(), (1, bundle.spec.network_channels, *bundle.spec.network_size)
    else:
        network = create("swin_unetr", in_channels=1, out_channels=14, feature_size=12).eval()
        shape = (1, 1, 96, 96, 96)
    window = torch.randn(shape)

    def plain(batch: Tensor) -> Tensor:
        found = network(batch)
        return found if isinstance(found, Tensor) else found[0]

    def monai(batch: Tensor) -> Tensor:
        fused = [module for module in network.modules() if getattr(module, "use_flash_attention", False)]
        for module in fused:
            module.use_flash_attention = False
        logits = plain(batch)
        for module in fused:
            module.use_flash_attention = True
        return logits

    def autocast(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(batch).float()

    with tempfile.TemporaryDirectory() as folder:
        path, begin = Path(folder) / "model.onnx", time.process_time()
        export(network, shape, path)
        print(f"conversion {time.process_time() - begin:.1f} s of CPU time, {path.stat().st_size / 1e6:.0f} MB")
        runs: dict[str, Callable[[Tensor], Tensor]] = {"monai": monai, "eager": plain, "eager bf16": autocast}
        for method in (Method("onnxruntime", "fp32"), Method("openvino", "fp32"), Method("openvino", "bf16")):
            begin, wall = time.process_time(), time.perf_counter()
            runs[str(method)] = open_session(method, path, 1)
            opened = time.process_time() - begin, time.perf_counter() - wall
            print(f"opening {method}: {opened[0]:.2f} s of CPU time, {opened[1]:.2f} s")
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        logits: dict[str, Tensor] = {}
        with torch.inference_mode():
            for number in range(asked.rounds + 1):  # the first warms up
                for name, run in runs.items():
                    begin = time.process_time()
                    logits[name] = run(window)
                    if number:
                        seconds[name].append(time.process_time() - begin)
    base, spread = statistics.median(seconds["monai"]), float(logits["eager"].std())
    own = statistics.median(seconds["eager"])
    print(
        f"logits: standard deviation {spread:.2f}; back end, CPU s (range), monai / it, eager / it, largest difference"
    )
    for name, values in seconds.items():
        each = statistics.median(values)
        difference = float((logits[name] - logits["eager"]).abs().max())
        print(
            f"{name:17} {each:.3f} ({min(values):.3f} to {max(values):.3f})  {base / each:.2f}x  {own / each:.2f}x  "
            f"{difference:.2g}"
        )


if __name__ == "__main__":
    main()
