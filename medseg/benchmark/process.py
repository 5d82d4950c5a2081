"""The other side of `medseg.benchmark.worker`: a process for each bundle, which may die without the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from medseg.benchmark.failure import error_of, last_line
from medseg.benchmark.machine import environment
from medseg.benchmark.worker import Described, Segment, Segmented, Start
from medseg.errors import BundleError
from medseg.evaluation.pairing import case_name

if TYPE_CHECKING:
    from medseg.training.dataset import CaseFiles


class BundleProcess:
    """A process that holds one bundle, and what it has answered.

    Attributes:
        folder: where its label maps are.
        described: the bundle, as the process describes it.
        answers: of each case that was asked for.

    Raises:
        BundleError, DeviceError, UsageError: the process cannot begin.
    """

    def __init__(self, start: Start, folder: Path) -> None:
        self._start, self.folder, self._words = start, folder, folder / "stderr.txt"
        self.answers: dict[str, Segmented] = {}
        self.described = self._begin()

    def _begin(self) -> Described:
        with self._words.open("w", encoding="utf-8") as words:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "medseg.benchmark.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                env=environment(self._start.threads),
            )
        line = self._ask(self._start)
        if line is None:
            why = self._death()
            self.close()
            raise BundleError(self._start.bundle, why, "see medseg infer with the same bundle")
        described = Described.model_validate_json(line)
        if described.error:
            self.close()
            raise error_of(described.error, described.exit_code)
        return described

    def segment(self, case: CaseFiles) -> None:
        """Segment a case; a failure is kept as the case's answer."""
        name = case_name(case.label)
        images = tuple(str(image) for image in case.images)
        line = self._ask(Segment(case=name, images=images, output=str(self.folder / f"{name}.nii.gz")))
        if line is not None:
            self.answers[name] = Segmented.model_validate_json(line)
            return
        self.answers[name] = Segmented(case=name, error=self._death())
        self.close()
        self._begin()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ask(self, request: BaseModel) -> str | None:
        """The answer's line; None when the process has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            return None
        try:
            stdin.write(request.model_dump_json() + "\n")
            stdin.flush()
        except BrokenPipeError:
            return None
        return stdout.readline() or None

    def _death(self) -> str:
        code = self._process.wait()
        return f"the process ended with {code}: {last_line(self._words.read_text(encoding='utf-8', errors='replace'))}"
