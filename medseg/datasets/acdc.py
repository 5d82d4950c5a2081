"""ACDC: cine MRI of the heart, end of diastole and of systole."""

from __future__ import annotations

from medseg.datasets.plan import About, CasePlan, Plan, complete, match
from medseg.datasets.source import Source

ABOUT = About(
    name="acdc",
    title="ACDC, automated cardiac diagnosis challenge",
    modality="MRI",
    cases="200 frames of 100 patients to train, 100 frames of 50 patients to test",
    site="CREATIS, humanheart-project.creatis.insa-lyon.fr",
    licence="CC BY-NC-SA 4.0",
    size="2.3 GB",
    split="the challenge's own: patients 001 to 100 train, 101 to 150 test",
)

_FIRST_TEST = 101


def plan(source: Source) -> Plan:
    """Two labelled frames of each patient; the whole cine series is left out."""
    cases: list[CasePlan | tuple[str, list[str]]] = []
    frames = match(source, r"(?:.*/)?patient(\d{3})/patient\d{3}_frame(\d{2})\.nii(?:\.gz)?")
    labels = match(source, r"(?:.*/)?patient(\d{3})/patient\d{3}_frame(\d{2})_gt\.nii(?:\.gz)?")
    for key in sorted(frames.keys() | labels.keys()):
        name = f"patient{key[0]}_frame{key[1]}"
        if key in frames and key in labels:
            cases.append(CasePlan(name, (frames[key],), labels[key]))
        else:
            cases.append((name, [f"{name}_gt.nii.gz" if key in frames else f"{name}.nii.gz"]))
    made = complete(source, cases)
    train = [case.name for case in made if int(case.name[7:10]) < _FIRST_TEST]
    parts = {"train": train, "test": [case.name for case in made if case.name not in set(train)]}
    return Plan(
        title="ACDC",
        channels=("MRI",),
        labels={0: "background", 1: "right ventricle", 2: "myocardium", 3: "left ventricle"},
        cases=made,
        licence=ABOUT.licence,
        reference="Bernard et al., IEEE Transactions on Medical Imaging 37, 2018, doi 10.1109/TMI.2018.2837502",
        parts=parts,
        expected=300,
    )
