"""What leaves the review app: a case's current version as one file of a kind, which says where it comes from."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from medseg.bundles.spec import LabelCode
from medseg.errors import InputError, MedsegError, UsageError
from medseg.inference.record import DISCLAIMER
from medseg.io.dicom import check_referable
from medseg.io.read import is_dicom_input, read_volume
from medseg.report.segmented import Segmented
from medseg.review.compare import read_segmentation, segmentation
from medseg.review.derived import HEAVY_WORK
from medseg.review.report import case_report, version_facts
from medseg.review.store.models import Case, Prediction, User
from medseg.review.store.repo import BANNER, Store

Kind = Literal["nifti", "dicom-seg", "rtstruct", "pdf", "html", "csv", "json"]

_FORMS: dict[Kind, tuple[str, str]] = {
    "nifti": ("_seg.nii.gz", "application/gzip"),
    "dicom-seg": ("_seg.dcm", "application/dicom"),
    "rtstruct": ("_rtstruct.dcm", "application/dicom"),
    "pdf": (".pdf", "application/pdf"),
    "html": (".html", "text/html"),
    "csv": (".csv", "text/csv"),
    "json": (".json", "application/json"),
}
_COMMENT = 6
"""NIfTI's code of a header extension that holds plain text."""


@dataclass(frozen=True)
class Export:
    """A file to hand over.

    Attributes:
        name: made of the case's identifier and version: a case's own name may be the house's business.
        media_type: of the content.
        content: the file.
    """

    name: str
    media_type: str
    content: bytes


def kinds(store: Store, case: Case) -> tuple[Kind, ...]:
    """What a case can be exported as: DICOM only where it came from DICOM and the images are still there."""
    found: tuple[Kind, ...] = get_args(Kind)
    return found if _has_dicom(store, case) else tuple(one for one in found if one not in {"dicom-seg", "rtstruct"})


def export_case(store: Store, case_id: str, kind: Kind, *, by: User) -> Export:
    """Make a file of a case's current version; the audit trail keeps who took what, with its SHA-256.

    Raises:
        UsageError: the case has no version yet, or DICOM is asked for of a scan that was none.
        InputError: no such case; a file cannot be read; DICOM images that changed or cannot be referred to.
    """
    case = store.case(case_id)
    if kind == "nifti":
        content = _nifti(store, case)
    elif kind in {"dicom-seg", "rtstruct"}:
        content = _dicom(store, case, kind)
    else:
        report = case_report(store, case_id)
        forms: dict[str, Callable[[], str | bytes]] = {
            "pdf": report.to_pdf,
            "html": report.to_html,
            "csv": report.to_csv,
            "json": report.to_json,
        }
        made = forms[kind]()
        content = made if isinstance(made, bytes) else made.encode()
    suffix, media_type = _FORMS[kind]
    detail = {"kind": kind, "revision": case.revision, "sha256": hashlib.sha256(content).hexdigest()}
    store.note(by, "exported", case_id=case_id, detail=detail)
    return Export(f"{case_id}_v{case.revision}{suffix}", media_type, content)


def statement(facts: dict[str, Any]) -> str:
    """The facts of a version on one line, for headers."""
    model = f"{facts['model']} {facts['model_version']}".strip() or "none"
    signed = f"{facts['verdict']} by {facts['reviewer']}, {facts['signed_at']}" if facts["reviewer"] else "not signed"
    said = facts["model_disclaimer"]
    own = f"{said} " if said not in {"", DISCLAIMER} else ""
    return (
        f"{own}{BANNER} Case {facts['case_id']}, version {facts['revision']}, mask SHA-256 {facts['mask_sha256']}; "
        f"model {model}; {signed}; exported {facts['exported_at']}"
    )


def _nifti(store: Store, case: Case) -> bytes:
    """The version's file, voxels and geometry untouched, with its facts as JSON in a header extension."""
    import nibabel

    nib: Any = nibabel
    facts = version_facts(store, case)
    path = store.file(store.version(case.id, case.revision).path)
    try:
        image = nib.load(path)
    except (OSError, nib.filebasedimages.ImageFileError) as err:
        raise InputError(path.name, "the version's file cannot be read", "check the data folder") from err
    text = json.dumps({"disclaimer": BANNER, **facts}, ensure_ascii=False).encode()
    image.header["descrip"] = BANNER.encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension(_COMMENT, text))
    packed: bytes = gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
    return packed


def _dicom(store: Store, case: Case, kind: Kind) -> bytes:
    """DICOM SEG or RTSTRUCT on the images that the case came from."""
    from medseg.report.dicom_seg import dicom_seg
    from medseg.report.rtstruct import rtstruct

    facts = version_facts(store, case)
    if not _has_dicom(store, case):
        remedy = "export NIfTI, or import the DICOM series"
        raise UsageError(case.name, "did not come from DICOM, or its images are gone", remedy)
    prediction = store.origin(case.id, case.revision)
    with HEAVY_WORK:
        volume = read_volume(store.file(case.sources[0]))
        check_referable(volume)
        image = read_volume(store.file(case.image_path))
        if volume.shape != image.shape or not np.array_equal(volume.data[0], image.data[0]):
            raise InputError(case.name, "its DICOM images are no longer those of the case", "restore them")
        labels, _ = read_segmentation(store, segmentation(store, case.id, store.version(case.id, case.revision).id))
        version = store.version(case.id, case.revision)
        origin: Literal["AUTOMATIC", "SEMIAUTOMATIC", "MANUAL"] = "SEMIAUTOMATIC"
        if prediction is None or version.prediction_id is not None:
            origin = "MANUAL" if prediction is None else "AUTOMATIC"
        found = Segmented(
            volume,
            labels,
            {row.value: row.name for row in store.labels(case.id)},
            facts["model"],
            facts["model_version"],
            origin=origin,
            codes=_codes(prediction),
            statement=statement(facts),
        )
        return dicom_seg(found) if kind == "dicom-seg" else rtstruct(found)


def _has_dicom(store: Store, case: Case) -> bool:
    """Whether the scan that a case was made from is DICOM and still there."""
    if len(case.sources) != 1:
        return False
    try:
        return is_dicom_input(store.file(case.sources[0]))
    except MedsegError:
        return False


def _codes(prediction: Prediction | None) -> dict[int, LabelCode]:
    """The codes that the bundle of a prediction gives its labels, where that very version is installed."""
    from medseg.bundles.load import load_bundle

    if prediction is None or Path(prediction.model).name != prediction.model:
        return {}
    try:
        bundle = load_bundle(prediction.model)
    except MedsegError:
        return {}
    return dict(bundle.spec.codes) if bundle.version == prediction.bundle_version else {}
