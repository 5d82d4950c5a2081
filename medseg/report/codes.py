"""Codes of segments for DICOM: the bundle's own for a label, else one found by the label's name, else a generic one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medseg.bundles.spec import Code, LabelCode

if TYPE_CHECKING:
    from collections.abc import Mapping

_STRUCTURE = Code("91723000", "SCT", "Anatomical Structure")
_ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
_TISSUE = Code("85756007", "SCT", "Tissue")
GENERIC = LabelCode(_TISSUE, _TISSUE)
"""For labels that nobody coded: what segmentation editors write for a segment without terminology."""

_SIDES = {"left": Code("7771000", "SCT", "Left"), "right": Code("24028007", "SCT", "Right")}

# Names of labels, sides removed, to the keywords of pydicom's SNOMED dictionary. Only names that mean one thing.
_STRUCTURES = {
    **{
        name: "".join(word.capitalize() for word in name.split())
        for name in (
            *("spleen", "kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta", "inferior vena cava"),
            *("portal vein", "splenic vein", "pancreas", "adrenal gland", "duodenum", "colon", "small intestine"),
            *("rectum", "prostate", "uterus", "bladder", "heart", "lung", "trachea", "pulmonary artery", "brain"),
            *("cerebellum", "hippocampus", "spinal cord", "eye", "optic nerve", "parotid gland", "femur", "vertebra"),
        )
    },
    "oesophagus": "Esophagus",
    "gall bladder": "Gallbladder",
    "urinary bladder": "Bladder",
    "postcava": "InferiorVenaCava",
    "lungs": "Lung",
}
_ABNORMALITIES = {
    **dict.fromkeys(("tumor", "tumour", "enhancing tumor", "enhancing tumour"), "Neoplasm"),
    **dict.fromkeys(("edema", "oedema", "peritumoral edema", "peritumoural oedema"), "Edema"),
    **dict.fromkeys(("necrosis", "necrotic tumor core", "necrotic tumour core"), "Necrosis"),
    "cyst": "Cyst",
}


def label_code(value: int, name: str, codes: Mapping[int, LabelCode]) -> LabelCode:
    """The code of a label.

    Args:
        value: in the label map.
        name: in the bundle's table.
        codes: that the bundle states.
    """
    if value in codes:
        return codes[value]
    words = name.lower().replace("_", " ").replace("-", " ").split()
    sides = [word for word in words if word in _SIDES]
    plain = " ".join(word for word in words if word not in _SIDES)
    for category, table in ((_STRUCTURE, _STRUCTURES), (_ABNORMAL, _ABNORMALITIES)):
        if plain in table and len(sides) < 2:
            return LabelCode(category, _snomed(table[plain]), _SIDES[sides[0]] if sides else None)
    return GENERIC


def _snomed(keyword: str) -> Code:
    """A code of pydicom's dictionary of SNOMED CT."""
    from pydicom.sr.codedict import codes

    table: Any = codes.SCT
    found = getattr(table, keyword)
    return Code(found.value, found.scheme_designator, found.meaning)
