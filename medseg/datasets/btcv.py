"""BTCV: abdominal CT with 13 organs, RawData.zip of the Synapse site, or the folder it unpacks to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medseg.datasets.plan import About, CasePlan, Plan, complete, match
from medseg.datasets.source import Source

LICENCE = "the terms accepted at registration on synapse.org (syn3193805)"
REFERENCE = "Landman et al., MICCAI multi-atlas labeling beyond the cranial vault - workshop and challenge, 2015"
CASES = 30

ABOUT = About(
    name="btcv",
    title="BTCV, 13 organs",
    modality="CT",
    cases="30",
    site="Synapse, synapse.org, project syn3193805 (Abdomen/RawData.zip)",
    licence=LICENCE,
    size="1.6 GB",
    split="24 train, 6 val: dataset_0.json of the Swin UNETR and UNETR tutorials",
    bundles=("swin_unetr_btcv", "dformer_synapse"),
)

LABELS = {
    0: "background",
    1: "spleen",
    2: "right kidney",
    3: "left kidney",
    4: "gallbladder",
    5: "esophagus",
    6: "liver",
    7: "stomach",
    8: "aorta",
    9: "inferior vena cava",
    10: "portal and splenic veins",
    11: "pancreas",
    12: "right adrenal gland",
    13: "left adrenal gland",
}
NUMBERS = (*range(1, 11), *range(21, 41))
"""Numbers of the labelled cases: img0001 to img0010 and img0021 to img0040."""

_VALIDATION = range(35, 41)


def plan(source: Source) -> Plan:
    """The 30 labelled cases with their own label values."""
    parts = {
        "train": [case_name(number) for number in NUMBERS if number not in _VALIDATION],
        "val": [case_name(number) for number in _VALIDATION],
    }
    return plan_organs(source, "BTCV", LABELS, None, parts)


def case_name(number: int) -> str:
    """The name of a case in the folder that is made."""
    return f"case{number:04d}"


def plan_organs(
    source: Source,
    title: str,
    labels: Mapping[int, str],
    remap: Mapping[int, int] | None,
    parts: Mapping[str, Sequence[str]],
) -> Plan:
    """The labelled cases with a choice of the organs."""
    images = match(source, r"(?:.*/)?(?:img|imagesTr)/img(\d{4})\.nii\.gz")
    found = match(source, r"(?:.*/)?(?:label|labelsTr)/label(\d{4})\.nii\.gz")
    cases: list[CasePlan | tuple[str, list[str]]] = []
    for number in NUMBERS:
        key = (f"{number:04d}",)
        if key in images and key in found:
            cases.append(CasePlan(case_name(number), (images[key],), found[key]))
        elif key in images or key in found:
            missing = f"img{key[0]}.nii.gz" if key in found else f"label{key[0]}.nii.gz"
            cases.append((case_name(number), [missing]))
    return Plan(
        title=title,
        channels=("CT",),
        labels=labels,
        cases=complete(source, cases),
        licence=LICENCE,
        reference=REFERENCE,
        remap=remap,
        parts=parts,
        expected=CASES,
    )
