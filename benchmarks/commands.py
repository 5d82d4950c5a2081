"""Wall time and peak memory of medseg's commands as whole processes, and what the installation weighs.

    python benchmarks/commands.py            # prints a Markdown table; --rounds N, default 5

Each command runs once unmeasured (file caches), then N times; the table holds the median and the range.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "data" / "samples" / "hippocampus_003.nii.gz"


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MiB of one process."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    medseg = [sys.executable, "-m", "medseg"]
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "medseg --help": [*medseg, "--help"],
            "medseg bundles list": [*medseg, "bundles", "list"],
            "medseg networks list": [*medseg, "networks", "list"],
            "medseg infer SAMPLE": [*medseg, "infer", str(SAMPLE), "-o", folder, "--overwrite"],
        }
        print(f"{os.cpu_count()} cores, {rounds} rounds\n")
        print("| command | seconds, median (range) | peak memory, MiB |\n| --- | --- | --- |")
        for name, command in commands.items():
            measure(command)
            seconds, memory = zip(*(measure(command) for _ in range(rounds)), strict=True)
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            print(f"| `{name}` | {statistics.median(seconds):.2f} ({spread}) | {max(memory):.0f} |")


if __name__ == "__main__":
    main()
