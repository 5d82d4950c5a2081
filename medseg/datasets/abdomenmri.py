"""AbdomenMRI: the MR scans of AMOS 2022 with 13 organs, as U-Mamba and Swin-UMamba use them."""

from __future__ import annotations

from medseg.datasets.plan import About, CasePlan, Plan, complete, match
from medseg.datasets.source import Source

ABOUT = About(
    name="abdomenmri",
    title="AbdomenMRI, the MR scans of AMOS 2022",
    modality="MRI",
    cases="60",
    site="AMOS 2022, amos22.grand-challenge.org (amos22.zip)",
    licence="as stated on the challenge's site; its paper's page names a CC BY-NC licence",
    size="24 GB with the CT scans, which are left out",
    split="all 60 are training cases; the authors' 50 test scans carry labels of their own and are not in AMOS",
    bundles=("swin_umamba_abdomenmri", "swin_umamba_d_abdomenmri"),
)

_FIRST_MR = 500  # AMOS: numbers below are CT
_AMOS = (
    "background",
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "bladder",
    "prostate or uterus",
)
_ORGANS = (
    "background",
    "liver",
    "right kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior vena cava",
    "right adrenal gland",
    "left adrenal gland",
    "gallbladder",
    "esophagus",
    "stomach",
    "duodenum",
    "left kidney",
)


def plan(source: Source) -> Plan:
    """The labelled MR scans of both its parts; bladder and prostate or uterus become background."""
    images = match(source, r"(?:.*/)?images(?:Tr|Va)/amos_(\d{4})\.nii\.gz")
    labels = match(source, r"(?:.*/)?labels(?:Tr|Va)/amos_(\d{4})\.nii\.gz")
    cases: list[CasePlan | tuple[str, list[str]]] = []
    for key in sorted(key for key in images.keys() | labels.keys() if int(key[0]) > _FIRST_MR):
        name = f"amos_{key[0]}"
        if key in images and key in labels:
            cases.append(CasePlan(name, (images[key],), labels[key]))
        else:
            cases.append((name, ["its label map" if key in images else "its image"]))
    made = complete(source, cases)
    return Plan(
        title="AbdomenMRI",
        channels=("MRI",),
        labels=dict(enumerate(_ORGANS)),
        cases=made,
        licence=ABOUT.licence,
        reference="Ji et al., AMOS, NeurIPS 2022, arXiv 2206.08023; labels as in U-Mamba, arXiv 2401.04722",
        remap={_AMOS.index(name): value for value, name in enumerate(_ORGANS)},
        parts={"train": [case.name for case in made]},
        expected=60,
    )
