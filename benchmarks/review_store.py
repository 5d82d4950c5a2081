"""Reviewers who save at the same time: nothing lost, and how long a save takes.

    python benchmarks/review_store.py --url sqlite:////tmp/review.sqlite
    python benchmarks/review_store.py --url postgresql://USER@HOST/EMPTY_DATABASE

Each reviewer is a process with connections of its own. All save versions of a few cases, so that conflicts happen; a
reviewer whose save came second saves again on top. Only the store is measured: no mask is written.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np

from medseg.review.store.models import new_id
from medseg.review.store.repo import Conflict, NewMask, Store


def review(
    url: str, folder: Path, number: int, cases: list[str], versions: int
) -> tuple[list[float], list[str], list[str]]:
    """Save `versions` versions; seconds of each save, and the masks saved and kept as drafts."""
    store = Store(url, folder)
    user = store.sign_in(f"local:reviewer {number}", f"Reviewer {number}")
    random = np.random.default_rng(number)
    seconds, saved, kept = [], [], []
    for _ in range(versions):
        case = cases[random.integers(len(cases))]
        base, draft = store.case(case).revision, None
        while True:
            mask_id = new_id()
            mask = NewMask(mask_id, folder / case / f"{mask_id}.nii.gz", mask_id, 1)
            begin = time.perf_counter()
            found = store.add_version(case, mask, base_revision=base, by=user, draft_id=draft)
            seconds.append(time.perf_counter() - begin)
            if not isinstance(found, Conflict):
                saved.append(mask_id)
                break
            kept.append(found.draft_id)
            base, draft = found.theirs, found.draft_id
    store.close()
    return seconds, saved, kept


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--reviewers", type=int, default=20)
    parser.add_argument("--versions", type=int, default=50)
    parser.add_argument("--cases", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Store(options.url, folder)
        admin = store.sign_in("local:admin", "Admin", role="admin")
        cases = [new_id() for _ in range(options.cases)]
        for case in cases:
            place = folder / case / "image.nii.gz"
            facts = {"name": "case", "image": place, "image_sha256": case, "sources": [place], "grid": place}
            store.add_case(case, shape=(1, 1, 1), spacing=(1, 1, 1), modality="", by=admin, **facts)
        begin = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(options.reviewers) as pool:
            work = [(options.url, folder, number, cases, options.versions) for number in range(options.reviewers)]
            results = pool.starmap(review, work, chunksize=1)
        wall = time.perf_counter() - begin
        seconds = np.concatenate([one for one, _, _ in results]) * 1000
        saved = {mask for _, one, _ in results for mask in one}
        kept = {mask for _, _, one in results for mask in one}
        rows = {case: store.versions(case) for case in cases}
        assert all([row.revision for row in found] == list(range(1, len(found) + 1)) for found in rows.values())
        assert {row.id for found in rows.values() for row in found} == saved
        assert len(saved) == options.reviewers * options.versions
        assert all(store.mask(draft).kind == "draft" for draft in kept)
        check = store.check_trail()
        assert check.broken_at is None
        low, middle, high = np.percentile(seconds, (50, 95, 99))
        print(f"{store.engine.dialect.name}: {options.reviewers} reviewers x {options.versions} versions, ", end="")
        print(f"{options.cases} cases: {len(saved)} saved, {len(kept)} conflicts kept as drafts, 0 lost")
        print(f"save: median {low:.0f} ms, 95 % {middle:.0f} ms, 99 % {high:.0f} ms, longest {seconds.max():.0f} ms")
        print(f"{wall:.1f} s in all with the start of the processes; audit trail of {check.lines} lines intact")
        store.close()


if __name__ == "__main__":
    main()
