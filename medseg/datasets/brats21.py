"""BraTS 2021, task 1: gliomas in four MR sequences."""

from __future__ import annotations

from medseg.datasets.plan import About, CasePlan, Plan, complete, match
from medseg.datasets.source import Source

ABOUT = About(
    name="brats21",
    title="BraTS 2021, task 1",
    modality="MRI",
    cases="1251",
    site="RSNA-ASNR-MICCAI BraTS 2021, synapse.org, project syn25829067",
    licence="the terms accepted at registration on synapse.org",
    size="13 GB",
    split="none written: the five folds of the Swin UNETR authors are a file of theirs (brats21_folds.json)",
    bundles=("swin_unetr_brats21",),
)

_SEQUENCES = {"flair": "FLAIR", "t1ce": "T1ce", "t1": "T1", "t2": "T2"}


def plan(source: Source) -> Plan:
    """The cases with a label map; those of the validation set have none and are left out."""
    files = match(source, r"(?:.*/)?(BraTS2021_\d{5})_(flair|t1ce|t1|t2|seg)\.nii(?:\.gz)?")
    cases: list[CasePlan | tuple[str, list[str]]] = []
    for name in sorted({key[0] for key in files if key[1] == "seg"}):
        missing = [f"{name}_{part}.nii.gz" for part in _SEQUENCES if (name, part) not in files]
        images = tuple(files.get((name, part), "") for part in _SEQUENCES)
        cases.append((name, missing) if missing else CasePlan(name, images, files[name, "seg"]))
    return Plan(
        title="BraTS 2021",
        channels=tuple(_SEQUENCES.values()),
        labels={0: "background", 1: "necrotic tumor core", 2: "peritumoral edema", 4: "enhancing tumor"},
        cases=complete(source, cases),
        licence=ABOUT.licence,
        reference="Baid et al., The RSNA-ASNR-MICCAI BraTS 2021 Benchmark, 2021, arXiv 2107.02314",
        expected=1251,
    )
