"""The files that go with a segmentation: label map, record, preview, and what was asked for beside them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medseg.errors import UsageError
from medseg.inference.phases import PhaseVolume
from medseg.inference.record import DISCLAIMER
from medseg.inference.run import Result
from medseg.io.dicom import check_referable, not_dicom
from medseg.io.files import case_name, split_suffix
from medseg.io.read import is_dicom_input
from medseg.io.series import is_dicom
from medseg.io.write import NIFTI_SUFFIXES, OutputSet, Target, reserve


@dataclass(frozen=True)
class Outputs:
    """Places for the files of one case, checked to be writable.

    Attributes:
        labels: the label map.
        record: JSON record of the run.
        preview: PNG.
        probabilities: NIfTI of (X, Y, Z, K), or None when not asked for.
        statistics: CSV of the labels' measurements, or None when not asked for.
        uncertainty: NIfTI of each voxel's entropy, or None when not asked for.
        mutual_information: NIfTI beside it, written where there are several passes.
        evidence: NIfTI of where the class sees its evidence, or None when not asked for.
        dicom_seg: DICOM Segmentation, or None when not asked for.
        rtstruct: DICOM RT Structure Set, or None when not asked for.
    """

    labels: Target
    record: Target
    preview: Target
    probabilities: Target | None = None
    statistics: Target | None = None
    uncertainty: Target | None = None
    mutual_information: Target | None = None
    evidence: Target | None = None
    dicom_seg: Target | None = None
    rtstruct: Target | None = None

    def paths(self) -> dict[str, Path]:
        """Kind to path of every file that may be written."""
        targets = {
            "labels": self.labels,
            "record": self.record,
            "preview": self.preview,
            "probabilities": self.probabilities,
            "statistics": self.statistics,
            "uncertainty": self.uncertainty,
            "mutual_information": self.mutual_information,
            "evidence": self.evidence,
            "dicom_seg": self.dicom_seg,
            "rtstruct": self.rtstruct,
        }
        return {kind: target.path for kind, target in targets.items() if target is not None}


def reserve_outputs(
    scans: Sequence[Path],
    output: Path | None = None,
    *,
    overwrite: bool = False,
    probabilities: bool = False,
    statistics: Path | None = None,
    uncertainty: Path | None = None,
    evidence: Path | None = None,
    dicom_seg: Path | None = None,
    rtstruct: Path | None = None,
) -> Outputs:
    """Choose the names of all outputs of a case and check that they can be written, before the work begins.

    Args:
        scans: the case's files; the first names the case.
        output: a label map's name, or a folder (what has no suffix is one); None: beside the scan.
        overwrite: replace outputs of an earlier run.
        probabilities: also a probability map.
        statistics: also a CSV file of this name.
        uncertainty: also a map of this name, and perhaps a second one whose name ends in ``_mi``.
        evidence: also an evidence map of this name.
        dicom_seg: also a DICOM Segmentation of this name.
        rtstruct: also a DICOM RT Structure Set of this name.

    A folder that is not there is made with the outputs, in one that is.

    Raises:
        OutputError: a folder is missing or not writable, or an output exists. UsageError: not a NIfTI suffix, an
            output is an input or another output, or DICOM outputs of a scan that is not DICOM.
    """
    if (dicom_seg is not None or rtstruct is not None) and not is_dicom_input(scans[0]):
        raise not_dicom(scans[0])
    name = f"{case_name(scans[0])}_seg.nii.gz"
    if output is None:
        labels = (scans[0] if scans[0].name not in {"", ".."} else scans[0].resolve()).parent / name
    elif output.is_dir() or not output.suffix:
        labels = output / name
    else:
        labels = output
    names = outputs_beside(labels, probabilities=probabilities)

    def checked(path: Path, *suffixes: str) -> Target:
        # A DICOM file in the folder of the scan may be one of its images.
        image = (
            [path] if is_dicom(path) and any(path.resolve().is_relative_to(scan.resolve()) for scan in scans) else []
        )
        return reserve(path, overwrite=overwrite, inputs=[*scans, *image], new_folder=True, suffixes=suffixes)

    outputs = Outputs(
        labels=checked(labels, *NIFTI_SUFFIXES),
        record=checked(names.record.path),
        preview=checked(names.preview.path),
        probabilities=checked(names.probabilities.path) if names.probabilities is not None else None,
        statistics=checked(statistics, ".csv") if statistics is not None else None,
        uncertainty=checked(uncertainty, *NIFTI_SUFFIXES) if uncertainty is not None else None,
        mutual_information=checked(_second_map(uncertainty)) if uncertainty is not None else None,
        evidence=checked(evidence, *NIFTI_SUFFIXES) if evidence is not None else None,
        dicom_seg=checked(dicom_seg, ".dcm") if dicom_seg is not None else None,
        rtstruct=checked(rtstruct, ".dcm") if rtstruct is not None else None,
    )
    kinds: dict[Path, str] = {}
    for kind, path in outputs.paths().items():
        if (other := kinds.setdefault(path.resolve(), kind)) != kind:
            raise UsageError(path, f"is the name of two outputs, {other} and {kind}", "choose another name")
    return outputs


def outputs_beside(
    labels: Path,
    *,
    probabilities: bool = False,
    uncertainty: bool = False,
    evidence: bool = False,
    dicom_seg: bool = False,
    rtstruct: bool = False,
) -> Outputs:
    """The names of a case's outputs, unchecked; what is there may be replaced.

    Args:
        labels: the label map's name, which the other names follow.
        probabilities: also a probability map.
        uncertainty: also maps of uncertainty.
        evidence: also an evidence map.
        dicom_seg: also a DICOM Segmentation.
        rtstruct: also a DICOM RT Structure Set.
    """
    base, _ = split_suffix(labels)

    def beside(ending: str) -> Target:
        return Target(labels.with_name(base + ending), overwrite=True)

    return Outputs(
        labels=Target(labels, overwrite=True),
        record=beside(".json"),
        preview=beside(".png"),
        probabilities=beside("_probabilities.nii.gz") if probabilities else None,
        uncertainty=beside("_uncertainty.nii.gz") if uncertainty else None,
        mutual_information=beside("_uncertainty_mi.nii.gz") if uncertainty else None,
        evidence=beside("_evidence.nii.gz") if evidence else None,
        dicom_seg=beside(".dcm") if dicom_seg else None,
        rtstruct=beside("_rtstruct.dcm") if rtstruct else None,
    )


def _second_map(uncertainty: Path) -> Path:
    """The name of the map of mutual information beside that of entropy."""
    stem, suffix = split_suffix(uncertainty)
    return uncertainty.with_name(f"{stem}_mi{suffix}")


def write_outputs(result: Result, outputs: Outputs) -> Result:
    """Write every reserved output that the result has; all of them appear, or none.

    Maps of an older result that is replaced, and that this one does not have, are removed: beside the new label map
    they would pass for its own.

    Returns:
        The result, its record naming the outputs.

    Raises:
        OutputError: something cannot be written; nothing is left behind.
        UsageError: DICOM outputs of a scan that is not DICOM.
    """
    dicom = _dicom_outputs(result, outputs)
    if result.mutual_information is None:
        outputs = replace(outputs, mutual_information=None)
    written = {kind: path.name for kind, path in outputs.paths().items()}
    result = result.with_outputs(written)
    record = result.record
    picture = _preview(result)
    outdated = _outdated(outputs)
    with OutputSet() as files:
        files.add_labels(outputs.labels, result.label_map, result.volume, names=result.labels)
        files.add_bytes(outputs.record, (record.model_dump_json(indent=2) + "\n").encode())
        files.add_bytes(outputs.preview, picture)
        for target, numbers in (
            (outputs.probabilities, result.probabilities),
            (outputs.evidence, result.evidence),
        ):
            if target is not None and numbers is not None:
                files.add_float(target, numbers, result.volume)
        for target, values in (
            (outputs.uncertainty, result.uncertainty),
            (outputs.mutual_information, result.mutual_information),
        ):
            if target is not None and values is not None:
                files.add_fractions(target, values, result.volume)
        if outputs.statistics is not None:
            files.add_bytes(outputs.statistics, statistics_csv(result).encode())
        for target, packed in dicom:
            files.add_bytes(target, packed)
    for path in outdated:
        path.unlink(missing_ok=True)
    return result


def _outdated(outputs: Outputs) -> list[Path]:
    """Files beside the label map that the record to be replaced names as its own, and this result does not have."""
    try:
        written = set(json.loads(outputs.record.path.read_text(encoding="utf-8"))["outputs"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # no older record, or none of medseg's
    usual = outputs_beside(
        outputs.labels.path, probabilities=True, uncertainty=True, evidence=True, dicom_seg=True, rtstruct=True
    )
    kept = {path.resolve() for path in outputs.paths().values()}
    return [path for path in usual.paths().values() if path.name in written and path.resolve() not in kept]


def _preview(result: Result) -> bytes:
    """The picture of a result, with the diagnosis where there is one."""
    from medseg.report.findings import diagnosis_lines, diagnosis_strip, focus_on
    from medseg.report.preview import FOOTER, MARGIN, WIDTH, render_preview

    record, volume = result.record, result.volume
    image, names, focus, strip = volume.data[0], result.labels, None, None
    if record.diagnosis is not None and isinstance(volume, PhaseVolume):
        image, focus = volume.data[volume.reference], focus_on(record.diagnosis, volume)
        found = {label.value for label in record.labels if label.voxels}
        names = {value: name for value, name in names.items() if value in found}
        strip = diagnosis_strip(record.diagnosis, volume, WIDTH - 2 * MARGIN)
    return render_preview(
        image,
        result.label_map,
        result.affine,
        names,
        title=record.input.files[0],
        lines=[record.bundle.summary, *diagnosis_lines(record), *record.warnings],
        focus=focus,
        strip=strip,
        footer=FOOTER if record.disclaimer == DISCLAIMER else record.disclaimer,
    )


def _dicom_outputs(result: Result, outputs: Outputs) -> list[tuple[Target, bytes]]:
    """The DICOM objects that were asked for.

    Raises:
        UsageError: the scan is not DICOM.
        InputError: its images cannot be referred to, or are gone.
    """
    found: list[tuple[Target, bytes]] = []
    if outputs.dicom_seg is None and outputs.rtstruct is None:
        return found
    from medseg.report.segmented import Segmented

    check_referable(result.volume)
    if outputs.dicom_seg is not None:
        from medseg.report.dicom_seg import dicom_seg

        found.append((outputs.dicom_seg, dicom_seg(Segmented.of(result))))
    if outputs.rtstruct is not None:
        from medseg.report.rtstruct import rtstruct

        found.append((outputs.rtstruct, rtstruct(Segmented.of(result))))
    return found


def statistics_csv(result: Result) -> str:
    """One row for each label: value, name, voxels, volume (ml), centroid (RAS mm), bounding box, components."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    axes = ("x", "y", "z")
    writer.writerow(
        ["case", "value", "name", "voxels", "volume_ml"]
        + [f"centroid_{axis}_mm" for axis in axes]
        + [f"{end}_{axis}" for axis in axes for end in ("first", "last")]
        + ["components"]
    )
    case = case_name(result.volume.source.path)
    for label in result.statistics:
        centroid = label.centroid_mm or ("", "", "")
        box = [end for bounds in label.bounding_box or (("", ""),) * 3 for end in bounds]
        writer.writerow(
            [case, label.value, label.name, label.voxels, label.volume_ml, *centroid, *box, label.components]
        )
    return text.getvalue()
