"""The cases of docs/engine.md: medseg's engine against MONAI's pipeline, each by `medseg benchmark speed`.

    python benchmarks/engine.py                                        # quant-14, quant-104, dynunet-14, swin-unetr-14
    python benchmarks/engine.py --case quant-14 --rounds 5 --threads 1 --json figures   # figures/quant-14.json
    python benchmarks/engine.py --case large-104 --engine medseg       # all classes on the scan's grid fit nowhere

What is measured, and what `quant` is, stands in docs/performance.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

CASES = {
    "quant-14": ["--architecture", "quant", "--classes", "14", "--size", "256x256x160"],
    "quant-104": ["--architecture", "quant", "--classes", "104", "--size", "160x160x120"],
    "dynunet-14": ["--architecture", "dynunet", "--classes", "14", "--size", "144x144x80"],
    "swin-unetr-14": [
        *("--architecture", "swin_unetr", "--network", '{"feature_size": 12}', "--classes", "14"),
        *("--size", "144x144x80"),
    ],
    "large-104": [
        *("--architecture", "quant", "--classes", "104"),
        *("--size", "512x512x400", "--spacing", "0.8x0.8x1.0"),
    ],
}
DEFAULT = ("quant-14", "quant-104", "dynunet-14", "swin-unetr-14")
BASELINES = ("monai", "nnunet")


def main() -> None:
    """Run the cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--engine", action="append", choices=("medseg", *BASELINES), help="default: medseg and monai")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="folder for the figures of each case")
    chosen = parser.parse_args()
    options = ["--threads", str(chosen.threads), "--repeat", str(chosen.rounds)]
    for baseline in BASELINES:
        if baseline in (chosen.engine or ("medseg", "monai")):
            options += ["--against", baseline]
    for name in chosen.case or DEFAULT:
        command = [sys.executable, "-m", "medseg", "benchmark", "speed", *CASES[name], *options]
        if chosen.json is not None:
            chosen.json.mkdir(parents=True, exist_ok=True)
            command += ["--json", str(chosen.json / f"{name}.json"), "--overwrite"]
        print(f"\n{name}", flush=True)
        subprocess.run(command, check=True)  # noqa: S603 - this interpreter and this package


if __name__ == "__main__":
    main()
