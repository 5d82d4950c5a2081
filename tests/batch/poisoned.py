"""Workers that die of one case, for pools; importable by name in their processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from medseg.batch.cases import Case
from medseg.batch.worker import ReadScan, Settings, Worker
from medseg.bundles.load import load_bundle
from medseg.inference.run import Progress, Result


class PoisonedWorker(Worker):
    """Does what it is told, but is killed by the case "poison", as by the memory killer."""

    def compute(self, case: Case, scan: ReadScan, *, progress: Progress | None = None) -> Result:
        if case.name == "poison":
            with (self.output / "tries").open("a") as file:
                file.write(f"{len(list(self.output.glob('*_seg.nii.gz')))} done before\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute(case, scan, progress=progress)


class NarrowWorker(Worker):
    """Has no memory for the case "large" as long as another one is not done."""

    def compute(self, case: Case, scan: ReadScan, *, progress: Progress | None = None) -> Result:
        if case.name == "large" and len(list(self.output.glob("*_seg.nii.gz"))) < 3:
            raise MemoryError
        return super().compute(case, scan, progress=progress)


def make_poisoned(bundle: Path, output: Path) -> Worker:
    return PoisonedWorker(load_bundle(bundle), Settings(), output)


def make_narrow(bundle: Path, output: Path) -> Worker:
    return NarrowWorker(load_bundle(bundle), Settings(), output)
