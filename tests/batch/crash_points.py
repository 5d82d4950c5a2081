"""Kill a batch before every step that changes the disk, one run for each step; what remains has to be enough.

A script: it forks for each run, which a process with threads must not do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import medseg.inference.run  # here and not in each child
import medseg.io.nifti
import medseg.report.preview
from medseg.batch import worker
from medseg.batch.run import run_batch
from medseg.bundles.load import load_bundle
from medseg.bundles.spec import Suitability
from tests.builders import save_scan, tiny_bundle

_write = os.write


class Thresholds(nn.Module):
    """A network of no weight: three classes by intensity."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(image), image, 2 * image - 1], dim=1)


def run(root: Path, output: Path, kill_at: int | None) -> int:
    """Run the batch in a process of its own; before step `kill_at` it kills itself. The steps taken, -1 if killed."""
    pipe, end = os.pipe()
    child = os.fork()
    if child == 0:
        steps = [0]
        for name in ("write", "fsync", "replace", "link", "unlink", "ftruncate"):
            setattr(os, name, _counted(getattr(os, name), name, steps, kill_at))
        torch.set_num_threads(1)
        medseg.report.preview.render_preview = lambda *_args, **_kwargs: b"a picture"  # the slowest part, and no step
        worker.ResidentBundle.network = lambda _self: Thresholds().eval()  # type: ignore[method-assign]
        summary = run_batch([root / "scans"], output, bundle=load_bundle(root / "tiny"))
        code = 0 if summary.error() is None else 9
        _write(end, str(steps[0]).encode())
        os._exit(code)
    os.close(end)
    told = os.read(pipe, 100)
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and kill_at is not None:
        return -1
    if status != 0:
        raise SystemExit(f"the run before step {kill_at} ended with status {status}")
    return int(told)


def _counted(real: Callable[..., Any], name: str, steps: list[int], kill_at: int | None) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if steps[0] == kill_at:
            if name == "write":  # torn in the middle of the line
                real(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        steps[0] += 1
        return real(*args, **kwargs)

    return call


def contents(output: Path) -> dict[str, bytes]:
    """Every file of a batch by name; of records what does not depend on the time, no journal and no summary."""
    found = {}
    for path in output.rglob("*"):
        if path.suffix == ".json" and path.name != "summary.json":
            record = json.loads(path.read_text())
            del record["created"], record["seconds"]
            found[path.name] = json.dumps(record).encode()
        elif path.name.startswith("summary.") or path.name == "run.jsonl":
            found[path.name] = b""
        else:
            found[path.name] = path.read_bytes()
    return found


def main(root: Path) -> None:
    """Print how many steps were tried; fail with a sentence otherwise."""
    (root / "scans").mkdir()
    random = np.random.default_rng(0)
    for number in range(2):
        save_scan(root / "scans" / f"case_{number}.nii.gz", random.normal(100, 20, (18, 20, 16)).astype(np.float32))
    if os.fork() == 0:
        tiny_bundle(root, roi_size=(16, 16, 16), suitability=Suitability())
        os._exit(0)
    os.wait()
    steps = run(root, root / "whole", None)
    whole = contents(root / "whole")
    for step in range(steps):
        output = root / "killed"
        if run(root, output, step) != -1:
            raise SystemExit(f"step {step} of {steps} was not reached")
        for path in output.glob("*_seg.nii.gz"):  # absent or complete, at every moment
            if path.read_bytes() != whole[path.name]:
                raise SystemExit(f"killed before step {step}: {path.name} differs")
        run(root, output, None)
        after = contents(output)
        if after != whole:
            names = sorted(name for name in after.keys() | whole.keys() if after.get(name) != whole.get(name))
            raise SystemExit(f"killed before step {step} and run again: {names} differ")
        lines = [json.loads(line) for line in (output / "run.jsonl").read_text().splitlines()]
        done = Counter(line["case"] for line in lines if line["event"] == "done")
        if done != {"case_0": 1, "case_1": 1}:
            raise SystemExit(f"killed before step {step} and run again: done {done}")
        shutil.rmtree(output)
    sys.stdout.write(f"{steps} steps\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
