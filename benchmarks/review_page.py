"""The review page with a scan: how long until something is seen, and what the server holds meanwhile.

    python benchmarks/review_page.py                    # a phantom of 512 x 512 x 300 int16, a mask of four labels
    python benchmarks/review_page.py data/samples/hippocampus_003.nii.gz
    python benchmarks/review_page.py --no-browser       # the server alone

A server is started as people start it, on a data folder that is gone afterwards. For each scan, alone: the first and
the second request of what the viewer loads. Then ten clients load everything of the first scan at once. Then Chromium
opens each scan: seconds from the click to the first picture (of the reduced copy, where there is one) and to voxels and
mask in full; at last ten sessions have the first scan open. Seconds of processor time stand beside those of the clock,
which other work on the machine stretches.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medseg.review.compare import segmentation
from medseg.review.signing import Claim, Purpose, Signer
from medseg.review.store.repo import Store
from medseg.review.structures import measurements

PHANTOM = (512, 512, 300)
CLIENTS = 10
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
_TICKS = os.sysconf("SC_CLK_TCK")


def write_phantom(folder: Path) -> None:
    """A body with four organs, in HU with the noise of a scanner, and their mask."""
    x, y, z = np.ogrid[: PHANTOM[0], : PHANTOM[1], : PHANTOM[2]]
    image = np.full(PHANTOM, -1000, np.int16)
    labels = np.zeros(PHANTOM, np.uint8)
    image[((x - 256) / 200) ** 2 + ((y - 256) / 150) ** 2 + (z - 150) ** 2 / 1e6 < 1] = 20
    for value, (cx, cy, cz, radius) in enumerate(
        ((170, 230, 180, 60), (330, 230, 170, 40), (200, 330, 90, 30)), start=1
    ):
        inside = (x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 < radius**2
        image[inside], labels[inside] = 40 + 30 * value, value
    labels[((x - 256) ** 2 + (y - 350) ** 2 < 20**2) & (z >= 0)] = 4
    image += np.random.default_rng(0).normal(0, 15, PHANTOM).astype(np.int16)
    affine = np.diag([-0.8, -0.8, 1.0, 1.0])
    nib.save(nib.Nifti1Image(image, affine), folder / "phantom.nii.gz")
    nib.save(nib.Nifti1Image(labels, affine), folder / "phantom_seg.nii.gz")


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and all below it."""
    parents: dict[int, list[int]] = {}
    own: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(folder.name))
        own[int(folder.name)] = (int(fields[11]) + int(fields[12])) / _TICKS
    total, waiting = 0.0, [pid]
    while waiting:
        one = waiting.pop()
        total += own.get(one, 0.0)
        waiting += parents.get(one, [])
    return total


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident memory of a process, now and at most, in MB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    now, most = (int(lines[name].split()[0]) / 1000 for name in ("VmRSS", "VmHWM"))
    return now, most


class Server:
    """A running `medseg review`, and links that it takes."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, store: Store, key: bytes) -> None:
        self.pid, self.address = process.pid, address
        self.store, self.key, self.signer = store, key, Signer(key)
        self.user = self.store.sign_in("local:benchmark", "Benchmark")

    def get(self, purpose: Purpose, target: str) -> int:
        """Load something; bytes."""
        token = self.signer.sign(Claim(purpose, target, self.user.id))
        size = 0
        with urllib.request.urlopen(f"{self.address}/medseg/api/v1/{purpose}/{target}?t={token}") as answer:  # noqa: S310
            while chunk := answer.read(1 << 20):
                size += len(chunk)
        return size

    def parts(self, case: str) -> list[tuple[Purpose, str]]:
        """What the viewer loads of a case."""
        revision = self.store.case(case).revision
        found: list[tuple[Purpose, str]] = [("poster", case), ("reduced", case), ("volume", case)]
        return [*found, *([("labels", f"{case}.{self.store.version(case, revision).id}")] if revision else [])]


@contextmanager
def serving(scans: Path, data: Path, *, database: str = "") -> Iterator[Server]:
    """A server whose scans are imported, with SQLite in the data folder unless a database is given."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = secrets.token_hex(32)
    command = [sys.executable, "-m", "medseg", "review", str(scans), "--data", str(data), "--port", str(port)]
    command += ["--database", database] if database else []
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "MEDSEG_REVIEW_KEY": key, "MEDSEG_REVIEW_TEST": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)  # noqa: S603
    try:
        wanted = len([path for path in scans.iterdir() if not path.name.endswith("_seg.nii.gz")])
        while not _answers(process, f"{address}/medseg/healthz"):
            time.sleep(0.2)
        server = Server(process, address, Store(database, data) if database else Store.in_folder(data), key.encode())
        while len(server.store.worklist()) < wanted or any(
            row.case.revision == 0 and (scans / f"{row.case.name}_seg.nii.gz").exists()
            for row in server.store.worklist()
        ):
            time.sleep(0.2)
        yield server
        server.store.close()
    finally:
        process.terminate()
        process.wait(timeout=60)


def _answers(process: subprocess.Popen[bytes], address: str) -> bool:
    if process.poll() is not None:
        raise SystemExit("the server ended")
    try:
        urllib.request.urlopen(address).close()  # noqa: S310 - our own server
    except OSError:
        return False
    return True


def load_of_the_machine() -> str:
    """For the head of what is printed."""
    return f"load of the machine before: {', '.join(f'{one:.1f}' for one in os.getloadavg())}, {os.cpu_count()} cores"


def measure_requests(server: Server) -> None:
    """Each thing alone, twice; then ten clients at once."""
    start = memory_mb(server.pid)[0]
    print(f"server with its cases imported: {start:.0f} MB")
    for row in server.store.worklist():
        print(f"{row.case.name}, {' x '.join(map(str, row.case.shape))}:")
        for purpose, target in server.parts(row.case.id):
            told = []
            for _ in range(2):
                clock, cpu = time.perf_counter(), cpu_seconds(server.pid)
                size = server.get(purpose, target)
                told.append(f"{time.perf_counter() - clock:.2f} s (cpu {cpu_seconds(server.pid) - cpu:.2f} s)")
            print(f"  {purpose}: {size / 1e6:.1f} MB, {told[0]}, again {told[1]}")
        if row.case.revision:
            version = server.store.version(row.case.id, row.case.revision)
            clock, cpu = time.perf_counter(), time.process_time()
            measurements(server.store, segmentation(server.store, row.case.id, version.id))
            wall, work = time.perf_counter() - clock, time.process_time() - cpu
            print(f"  structures and lesions measured: {wall:.2f} s (cpu {work:.2f} s)")
    case = server.store.worklist()[0].case.id
    before = memory_mb(server.pid)
    clock = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        done = list(pool.map(lambda _: sum(server.get(*part) for part in server.parts(case)), range(CLIENTS)))
    now, most = memory_mb(server.pid)
    wall = time.perf_counter() - clock
    print(
        f"{CLIENTS} clients load the first case at once: {sum(done) / 1e6:.0f} MB in {wall:.1f} s; "
        f"server {before[0]:.0f} MB before, {now:.0f} MB after, {most:.0f} MB at most since its start"
    )


def measure_browser(server: Server) -> None:
    """Chromium opens each case; then ten people have the first one open, each with a session of their own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)

        def enter() -> Any:
            tab = browser.new_context(viewport={"width": 1600, "height": 900}).new_page()
            tab.set_default_timeout(600_000)
            tab.goto(server.address)
            tab.get_by_role("textbox", name="Your name").fill("Benchmark")
            tab.get_by_role("button", name="Begin").click()
            tab.get_by_text("Click a line to open it").wait_for()
            return tab

        tab = enter()
        for row in server.store.worklist():
            clock, cpu = time.perf_counter(), cpu_seconds(os.getpid())
            tab.goto(f"{server.address}/review?case={row.case.id}")
            tab.locator(".medseg-viewer[data-phase=preview], .medseg-viewer[data-phase=ready]").wait_for()
            first = f"{time.perf_counter() - clock:.1f} s (cpu {cpu_seconds(os.getpid()) - cpu:.1f} s)"
            tab.locator(".medseg-viewer[data-phase=ready]").wait_for()
            full = f"{time.perf_counter() - clock:.1f} s (cpu {cpu_seconds(os.getpid()) - cpu:.1f} s)"
            heap = tab.evaluate("performance.memory ? performance.memory.usedJSHeapSize : 0") / 1e6
            print(
                f"{row.case.name} in Chromium: first picture {first}, everything {full}, JavaScript heap {heap:.0f} MB"
            )
        first_case = server.store.worklist()[0].case
        before = memory_mb(server.pid)[0]
        for one in (tab, *(enter() for _ in range(CLIENTS - 1))):
            one.goto(f"{server.address}/review?case={first_case.id}")
            one.locator(".medseg-viewer[data-phase=ready]").wait_for()
        now, most = memory_mb(server.pid)
        print(
            f"{CLIENTS} sessions in Chromium have {first_case.name} open: server {before:.0f} MB before, {now:.0f} MB "
            f"now, {most:.0f} MB at most since its start"
        )
        browser.close()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="*", type=Path, help="NAME.nii.gz; beside it its mask, NAME_seg or NAME_label")
    parser.add_argument("--no-browser", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "scans"
        folder.mkdir()
        for scan in options.scans:
            shutil.copy(scan, folder)
            stem = scan.name.removesuffix(".nii.gz")
            for mask in (scan.with_name(f"{stem}_label.nii.gz"), scan.with_name(f"{stem}_seg.nii.gz")):
                if mask.exists():
                    shutil.copy(mask, folder / f"{stem}_seg.nii.gz")
        if not options.scans:
            write_phantom(folder)
        print(load_of_the_machine())
        with serving(folder, Path(name) / "data") as server:
            measure_requests(server)
            if not options.no_browser:
                measure_browser(server)


if __name__ == "__main__":
    main()
