"""Reviewers who save at the same time over HTTP: nothing lost, every conflict told, and how long a save takes.

    python benchmarks/review_api.py                     # SQLite in the data folder
    python benchmarks/review_api.py --postgres          # a PostgreSQL server that is started for it
    python benchmarks/review_api.py --database postgresql://USER@HOST/EMPTY_DATABASE
    python benchmarks/review_api.py --reviewers 5 --versions 5

A server is started as people start it, on a data folder that is gone afterwards, with a few cases that are copies of
one scan. Each reviewer is a process that knows nothing but the server's address and its own signed links: it loads the
scan of a case when it first comes to it, draws, and sends the mask with the version that it believes to be the current
one. Whose save comes second saves the draft on top of what the answer names, until it is accepted.

Afterwards what the reviewers were told is held against database and files: every accepted version and every draft is
there with the voxels that were sent, nothing else is, and the audit trail is intact.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import multiprocessing
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.review.signing import Claim, Purpose, Signer

if TYPE_CHECKING:
    from review_page import Server

SCAN = Path(__file__).parents[1] / "data" / "samples" / "hippocampus_003.nii.gz"
API = "/medseg/api/v1"
PATIENCE_S = 600


@dataclass(frozen=True)
class Work:
    """What a reviewer knows.

    Attributes:
        address: of the server.
        key: signs the links, as the page would for this reviewer.
        user: the reviewer's identifier.
        cases: identifiers.
        labels: (X, Y, Z) uint8, version 1 of each case.
        versions: how many to save.
        seed: of what is drawn, and where.
    """

    address: str
    key: bytes
    user: str
    cases: list[str]
    labels: np.ndarray
    versions: int
    seed: int


@dataclass
class Told:
    """What a reviewer was told.

    Attributes:
        accepted: case, version, SHA-256 of the file, SHA-256 of the voxels sent, for each save that became a version.
        drafts: identifier to SHA-256 of the voxels sent, for each save that came second.
        accepted_s: seconds that each accepted save took.
        refused_s: seconds that each save took which came second.
        scans: SHA-256 of each scan that was loaded.
        problem: what ended the work early.
    """

    accepted: list[tuple[str, int, str, str]] = field(default_factory=list)
    drafts: dict[str, str] = field(default_factory=dict)
    accepted_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    scans: list[str] = field(default_factory=list)
    problem: str = ""


def review(work: Work, start: Barrier, results: Queue[Told]) -> None:
    """A reviewer's day."""
    told = Told()
    try:
        start.wait(PATIENCE_S)
        _save_all(work, told)
    except Exception as error:  # the other side has to hear of it, whatever it is
        told.problem = repr(error)
    results.put(told)


def _save_all(work: Work, told: Told) -> None:
    signer, random = Signer(work.key), np.random.default_rng(work.seed)

    def token(purpose: Purpose, case: str) -> str:
        return signer.sign(Claim(purpose, case, work.user))

    known: dict[str, int] = {}
    drawing = {case: work.labels.copy() for case in work.cases}
    for _ in range(work.versions):
        case = work.cases[random.integers(len(work.cases))]
        if case not in known:
            address = f"{work.address}{API}/volume/{case}?t={token('volume', case)}"
            with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:  # noqa: S310 - our own server
                told.scans.append(hashlib.sha256(answer.read()).hexdigest())
            known[case] = 1
        labels = drawing[case]
        corner = [random.integers(size - 4) for size in labels.shape]
        labels[tuple(slice(at, at + 4) for at in corner)] = random.integers(0, 3, (4, 4, 4))
        voxels = labels.tobytes(order="F")
        digest, draft = hashlib.sha256(voxels).hexdigest(), ""
        while True:
            headers = {"X-Medseg-Token": token("save", case), "If-Match": f'"{known[case]}"'}
            headers |= {"X-Medseg-Draft": draft} if draft else {}
            body = gzip.compress(voxels, 6)
            begin = time.perf_counter()
            status, answer = _post(f"{work.address}{API}/mask/{case}", body, headers)
            seconds = time.perf_counter() - begin
            if status == 200:
                told.accepted_s.append(seconds)
                told.accepted.append((case, answer["revision"], answer["sha256"], digest))
                known[case] = answer["revision"]
                break
            if status != 409:
                raise RuntimeError(f"{status}: {answer}")
            told.refused_s.append(seconds)
            draft, known[case] = answer["draft_id"], answer["theirs"]
            told.drafts[draft] = digest


def _post(address: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(address, body, {**headers, "Content-Type": "application/gzip"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310 - our own server
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def check(server: Server, first: set[str], told: list[Told]) -> str:
    """Hold what the reviewers were told against database and files.

    Args:
        server: still running.
        first: identifiers of the masks that were there before.
        told: by the reviewers.

    Returns:
        What was found, in one line.
    """
    import nibabel as nib
    from sqlalchemy import select
    from sqlalchemy.orm import Session

    from medseg.review.store.models import Mask

    store = server.store
    with Session(store.engine) as session:
        masks = list(session.scalars(select(Mask)))
    for row in masks:
        found = hashlib.sha256(store.file(row.path).read_bytes()).hexdigest()
        assert found == row.sha256, f"{row.path} has other bytes"
    rows = {row.id: row for row in masks if row.id not in first}
    accepted = {(case, revision): (sha256, voxels) for one in told for case, revision, sha256, voxels in one.accepted}
    drafts = {draft: voxels for one in told for draft, voxels in one.drafts.items()}
    assert len(accepted) == sum(len(one.accepted) for one in told), "two saves were told to be the same version"
    assert len(drafts) == sum(len(one.refused_s) for one in told), "two conflicts were told to be the same draft"
    saved = {(row.case_id, row.revision): row for row in rows.values() if row.kind == "saved"}
    assert set(saved) == set(accepted), "versions and what was told of them differ"
    assert {row.id for row in rows.values() if row.kind == "draft"} == set(drafts), "drafts and what was told differ"
    for row in rows.values():
        sha256, voxels = accepted[row.case_id, row.revision] if row.kind == "saved" else (row.sha256, drafts[row.id])
        assert row.sha256 == sha256, f"{row.path} was told with another hash"
        content = np.asarray(nib.load(store.file(row.path)).dataobj).astype(np.uint8)
        assert hashlib.sha256(content.tobytes(order="F")).hexdigest() == voxels, f"{row.path} has other voxels"
    cases = [row.case for row in store.worklist()]
    for case in cases:
        revisions = [version.revision for version in store.versions(case.id)]
        assert revisions == list(range(1, case.revision + 1)), "versions are missing"
        assert store.drafts(case.id) == [], "a draft that was saved on top is still open"
    files = {file.absolute() for case in cases for file in (store.folder / case.id).glob("mask_r*.nii.gz")}
    assert files == {store.file(row.path).absolute() for row in masks}, "files without a row, or rows without a file"
    images = {case.image_sha256 for case in cases}
    assert {scan for one in told for scan in one.scans} <= images, "a scan came with other bytes"
    actions = Counter(line.action for line in store.trail())
    assert actions["saved"] == len(accepted) + len(first)
    assert actions["save_conflict"] == len(drafts)
    trail = store.check_trail()
    assert trail.broken_at is None, f"audit trail broken at line {trail.broken_at}"
    return (
        f"{len(accepted)} versions, {len(drafts)} conflicts told and kept as drafts, 0 lost; {len(files)} files with "
        f"the hashes of their rows and the voxels that were sent; audit trail of {trail.lines} lines intact"
    )


def percentiles(name: str, seconds: list[float]) -> str:
    """A line of the table."""
    if not seconds:
        return f"{name:>10}  none"
    found = [*np.percentile(seconds, (50, 95, 99)), max(seconds)]
    return f"{name:>10} {len(seconds):6} " + " ".join(f"{1000 * one:8.0f}" for one in found)


def write_cases(folder: Path, count: int) -> None:
    """Copies of one scan and its mask; a text in their headers makes them different scans."""
    import nibabel as nib

    folder.mkdir()
    for number in range(count):
        for source, end in ((SCAN, ""), (SCAN.with_name(SCAN.name.replace(".nii", "_label.nii")), "_seg")):
            image = nib.load(source)
            image.header["descrip"] = f"copy {number}"
            nib.save(image, folder / f"case{number}{end}.nii.gz")


@contextmanager
def database(options: argparse.Namespace) -> Iterator[str]:
    """Address of the database; "" is SQLite in the data folder."""
    from postgres_server import postgres_server, programs

    if not options.postgres:
        yield options.database
        return
    binaries = programs()
    if binaries is None:
        raise SystemExit("initdb was not found (Debian package postgresql)")
    with postgres_server(binaries, fsync=True) as address:
        yield address


def main() -> None:
    """Run and print."""
    import nibabel as nib  # here, because each reviewer's process imports this file
    from review_page import cpu_seconds, load_of_the_machine, memory_mb, serving

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgres", action="store_true", help="start a PostgreSQL server for this")
    parser.add_argument("--database", default="", help="address of an empty database")
    parser.add_argument("--reviewers", type=int, default=20)
    parser.add_argument("--versions", type=int, default=50, help="for each reviewer to save")
    parser.add_argument("--cases", type=int, default=5)
    options = parser.parse_args()
    print(load_of_the_machine(), flush=True)
    with tempfile.TemporaryDirectory() as name, database(options) as address:
        scans = Path(name) / "scans"
        write_cases(scans, options.cases)
        with serving(scans, Path(name) / "data", database=address) as server:
            store = server.store
            cases = [row.case.id for row in store.worklist()]
            first = {store.version(case, 1).id for case in cases}
            labels = np.asarray(nib.load(store.file(store.version(cases[0], 1).path)).dataobj).astype(np.uint8)
            people = [
                store.sign_in(f"local:reviewer {number}", f"Reviewer {number}") for number in range(options.reviewers)
            ]
            context = multiprocessing.get_context("spawn")
            start, results = context.Barrier(len(people) + 1), context.Queue()
            processes = [
                context.Process(
                    target=review,
                    args=(
                        Work(server.address, server.key, user.id, cases, labels, options.versions, seed),
                        start,
                        results,
                    ),
                )
                for seed, user in enumerate(people)
            ]
            for process in processes:
                process.start()
            start.wait(PATIENCE_S)
            begin, cpu = time.perf_counter(), cpu_seconds(server.pid)
            told = [results.get() for _ in processes]
            wall, work = time.perf_counter() - begin, cpu_seconds(server.pid) - cpu
            for process in processes:
                process.join()
            for problem in sorted({one.problem for one in told} - {""}):
                raise SystemExit(f"a reviewer was stopped: {problem}")
            print(
                f"{store.engine.dialect.name}: {options.reviewers} reviewers x {options.versions}, {len(cases)} cases"
            )
            print(check(server, first, told))
            print("      save  count   median     95 %     99 %  longest  (ms)")
            print(percentiles("accepted", [second for one in told for second in one.accepted_s]))
            print(percentiles("conflict", [second for one in told for second in one.refused_s]))
            print(percentiles("all", [second for one in told for second in one.accepted_s + one.refused_s]))
            count = sum(len(one.accepted_s) + len(one.refused_s) for one in told)
            now, most = memory_mb(server.pid)
            print(
                f"{wall:.1f} s in all, {count / wall:.1f} saves a second; server: {1000 * work / count:.0f} ms of "
                f"processor time a save, {now:.0f} MB after, {most:.0f} MB at most"
            )


if __name__ == "__main__":
    main()
