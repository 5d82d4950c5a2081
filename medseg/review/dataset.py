"""Corrected cases as a data set in the Decathlon's layout, for `medseg train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from medseg.errors import InputError, UsageError
from medseg.io.files import sha256_of
from medseg.io.read import read_volume
from medseg.io.write import OutputSet, reserve
from medseg.review.masks import read_mask
from medseg.review.report import version_facts
from medseg.review.store.models import User
from medseg.review.store.repo import BANNER, Store


def export_dataset(store: Store, cases: Sequence[str], folder: Path, *, name: str, channel: str, by: User) -> Path:
    """Write images and the current, accepted versions of cases.

    Args:
        store: the store.
        cases: identifiers of accepted cases with one label table.
        folder: a folder that does not exist yet, or is empty.
        name: the data set's name.
        channel: what the images are: "CT", "MRI", ...
        by: who exports.

    Returns:
        The folder; files are called after the case's identifier, and their headers hold no identity.

    Raises:
        UsageError: no case, a case that is not accepted, or label tables that differ.
        InputError: an image or mask was changed or lost since the case was added.
        OutputError: something cannot be written.
    """
    chosen = [store.case(case_id) for case_id in cases]
    if not chosen:
        raise UsageError("cases", "none chosen", "accept some first")
    tables = []
    for case in chosen:
        if case.state != "accepted":
            raise UsageError(case.name, f"is {case.state!r}", "export accepted cases")
        tables.append({row.value: row.name for row in store.labels(case.id)})
    if any(table != tables[0] for table in tables):
        raise UsageError("cases", "their label tables differ", "export those of one table together")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(folder, "is not empty", "give a new folder")
    listed, versions = [], {}
    for case in chosen:
        version = store.version(case.id, case.revision)
        image_path, mask_path = store.file(case.image_path), store.file(version.path)
        for path, expected in ((image_path, case.image_sha256), (mask_path, version.sha256)):
            if sha256_of(path) != expected:
                raise InputError(path.name, "was changed since it was added", "restore it")
        image = read_volume(image_path)
        labels, _ = read_mask(mask_path, case.shape)
        places = {"image": f"imagesTr/{case.id}.nii.gz", "label": f"labelsTr/{case.id}.nii.gz"}
        with OutputSet() as files:
            files.add_float(reserve(folder / places["image"], make_parents=True), image.data[0], image)
            files.add_labels(reserve(folder / places["label"], make_parents=True), labels, image, names=tables[0])
        listed.append(places)
        facts = version_facts(store, case)
        del facts["case"]  # a pseudonym is the house's own
        versions[case.id] = facts
    described = {
        "name": name,
        "description": f"Corrected and accepted in medseg's review app. {BANNER}",
        "modality": {"0": channel},
        "labels": {"0": "background", **{str(value): label for value, label in tables[0].items()}},
        "numTraining": len(listed),
        "training": listed,
        "versions": versions,
    }
    # Last: a folder without it is no data set, so a broken export is not taken for one.
    with OutputSet() as files:
        files.add_bytes(folder / "dataset.json", (json.dumps(described, indent=2) + "\n").encode())
    store.note(
        by,
        "exported",
        detail={"kind": "dataset", "masks": {case: facts["mask_sha256"] for case, facts in versions.items()}},
    )
    return folder
