"""MSD Task07: portal venous CT of pancreas and tumor."""

from __future__ import annotations

from medseg.datasets import msd
from medseg.datasets.plan import About, Plan
from medseg.datasets.source import Source
from medseg.errors import InputError

ABOUT = About(
    name="msd_pancreas",
    title="MSD Task07 Pancreas",
    modality="CT",
    cases="281",
    site="medicaldecathlon.com",
    licence=msd.LICENCE,
    size="11 GB",
    split="none published: the labels of imagesTs are withheld",
)


def plan(source: Source) -> Plan:
    """As any task of the Decathlon, if it is this one."""
    found = msd.plan(source)
    names = [name.lower() for name in found.labels.values()]
    if len(names) != 3 or "pancreas" not in names[1]:
        raise InputError(source.path, f"labels {', '.join(names)}: not Task07_Pancreas", "see medseg data list")
    return found
