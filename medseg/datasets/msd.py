"""Medical Segmentation Decathlon: any of its ten tasks, as TaskNN_Name.tar or the folder it unpacks to."""

from __future__ import annotations

import json
import posixpath
from typing import Any

from medseg.datasets.plan import About, CasePlan, Plan, complete
from medseg.datasets.source import Source
from medseg.errors import InputError
from medseg.io.files import split_suffix

LICENCE = "CC-BY-SA 4.0"
REFERENCE = "Medical Segmentation Decathlon: Antonelli et al. 2022, Nature Communications 13; Simpson et al. 2019"

ABOUT = About(
    name="msd",
    title="Medical Segmentation Decathlon",
    modality="CT or MRI",
    cases="484, 20, 131, 260, 32, 63, 281, 303, 41, 126 (Task01 to Task10)",
    site="medicaldecathlon.com",
    licence=LICENCE,
    size="27 MB (Task04) to 27 GB (Task03)",
    split="none published: the labels of imagesTs are withheld",
    bundles=("swin_unetr_hippocampus",),
)

TASKS = {
    "Task01_BrainTumour": 484,
    "Task02_Heart": 20,
    "Task03_Liver": 131,
    "Task04_Hippocampus": 260,
    "Task05_Prostate": 32,
    "Task06_Lung": 63,
    "Task07_Pancreas": 281,
    "Task08_HepaticVessel": 303,
    "Task09_Spleen": 41,
    "Task10_Colon": 126,
}
"""Labelled cases of each task."""


def plan(source: Source) -> Plan:
    """The labelled cases that the archive's own dataset.json lists."""
    here = [name for name in source.sizes if posixpath.basename(name) == "dataset.json"]
    if len(here) != 1:
        problem = f"{len(here)} files dataset.json in it" if here else "no dataset.json in it"
        raise InputError(source.path, problem, "give one task: its archive, or the folder TaskNN_Name")
    folder = posixpath.dirname(here[0])
    described = _described(source, here[0])
    cases: list[CasePlan | tuple[str, list[str]]] = []
    for entry in described["training"]:
        image, label = (posixpath.normpath(posixpath.join(folder, str(entry[key]))) for key in ("image", "label"))
        case = split_suffix(image)[0]
        missing = [name for name in (image, label) if name not in source.sizes]
        cases.append((case, missing) if missing else CasePlan(case, (image,), label))
    modality = described["modality"]
    task = next((name for name in (posixpath.basename(folder), source.path.name.split(".")[0]) if name in TASKS), "")
    return Plan(
        title=task or str(described.get("name", "MSD")),
        channels=tuple(str(modality[key]) for key in sorted(modality, key=int)),
        labels={int(value): str(name) for value, name in sorted(described["labels"].items(), key=lambda e: int(e[0]))},
        cases=complete(source, cases),
        licence=str(described.get("licence") or LICENCE),
        reference=str(described.get("reference") or REFERENCE),
        expected=TASKS.get(task, described.get("numTraining")),
    )


def _described(source: Source, name: str) -> dict[str, Any]:
    try:
        described = json.loads(source.read(name))
        entries = [(entry["image"], entry["label"]) for entry in described["training"]]
        valid = all(str(key).isdecimal() for part in ("modality", "labels") for key in described[part])
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise InputError(source.path, f"{name} is not that of a Decathlon task ({err!r})", "download it again") from err
    if not entries or not valid:
        raise InputError(source.path, f"{name} lists no labelled case, or labels without numbers", "is it this one?")
    return dict(described)
