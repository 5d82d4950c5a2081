"""Synapse, eight organs: BTCV as TransUNet and those after it use it."""

from __future__ import annotations

from medseg.datasets import btcv
from medseg.datasets.plan import About, Plan
from medseg.datasets.source import Source

ABOUT = About(
    name="synapse",
    title="Synapse, 8 organs of BTCV",
    modality="CT",
    cases="30",
    site=btcv.ABOUT.site,
    licence=btcv.LICENCE,
    size=btcv.ABOUT.size,
    split="18 train, 12 test: the lists of TransUNet's repository",
    bundles=("transunet_synapse", "paratranscnn_synapse"),
)

_ORGANS = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
_TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)


def plan(source: Source) -> Plan:
    """The same 30 cases with the eight organs, numbered as TransUNet numbers them; the other five are background."""
    labels = {0: "background", **dict(enumerate(_ORGANS, start=1))}
    value_of = {name: value for value, name in btcv.LABELS.items()}
    remap = {value_of[name]: value for value, name in labels.items()}
    parts = {
        "train": [btcv.case_name(number) for number in btcv.NUMBERS if number not in _TEST],
        "test": [btcv.case_name(number) for number in _TEST],
    }
    return btcv.plan_organs(source, "Synapse", labels, remap, parts)
