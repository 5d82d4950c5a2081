"""What is known of a case's current version, on paper: JSON, CSV, HTML and PDF with pictures."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

from medseg.errors import UsageError
from medseg.evaluation.volumes import label_statistics
from medseg.io.read import read_volume
from medseg.report.preview import render_preview
from medseg.review.masks import Lesion, Overlap, compare, lesions, read_mask
from medseg.review.store.repo import BANNER, Store

_STRUCTURES = ("value", "name", "voxels", "volume_ml", "components")
_LESIONS = ("number", "name", "voxels", "volume_ml", "axial_diameter_mm")
_LISTED_LESIONS = 40
_STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}"
    "img{max-width:100%}table{border-collapse:collapse;margin:.5rem 0 1.5rem}"
    "td,th{border:1px solid #ccd2da;padding:.2rem .6rem;text-align:left}.banner{background:#fff3cd;padding:.5rem 1rem}"
)


@dataclass(frozen=True)
class CaseReport:
    """A case's current version.

    Attributes:
        facts: what names the version and who stands for it.
        structures: measurements of each label.
        lesions: connected pieces.
        compared: the version against the prediction that it started from; empty without one.
        picture: PNG of three planes.
    """

    facts: dict[str, Any]
    structures: tuple[dict[str, Any], ...]
    lesions: tuple[Lesion, ...]
    compared: tuple[Overlap, ...]
    picture: bytes

    def to_json(self) -> str:
        """Everything but the picture."""
        content = {
            "disclaimer": BANNER,
            **self.facts,
            "structures": self.structures,
            "lesions": [asdict(lesion) for lesion in self.lesions],
            "compared_with_prediction": [asdict(overlap) for overlap in self.compared],
        }
        return json.dumps(content, indent=2) + "\n"

    def to_csv(self) -> str:
        """A row for each structure and lesion, each with the facts that name the version."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        named = ("case_id", "revision", "mask_sha256", "model", "model_version", "reviewer", "verdict", "signed_at")
        measured = ("value", "name", "number", "voxels", "volume_ml", "axial_diameter_mm", "max_uncertainty")
        writer.writerow([*named, "kind", *measured, "disclaimer"])
        rows = [("structure", row) for row in self.structures] + [("lesion", asdict(row)) for row in self.lesions]
        for kind, row in rows:
            cells = [row.get(key) for key in measured]
            writer.writerow([*(_cell(self.facts[key]) for key in named), kind, *map(_cell, cells), BANNER])
        return text.getvalue()

    def to_html(self) -> str:
        """One file that needs nothing else."""
        parts = [f"<h2>{title}</h2>{_html_table(head, rows)}" for title, head, rows in self._tables()]
        picture = base64.b64encode(self.picture).decode()
        name = html.escape(str(self.facts["case"]))
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
            f'</head><body><p class="banner">{BANNER}</p><h1>{name}</h1>'
            f'<img alt="Three planes" src="data:image/png;base64,{picture}">{"".join(parts)}</body></html>\n'
        )

    def to_pdf(self) -> bytes:
        """A4 pages, the banner on each."""
        from reportlab.lib.pagesizes import A4
        from reportlab.lib.styles import getSampleStyleSheet
        from reportlab.lib.units import mm
        from reportlab.lib.utils import ImageReader
        from reportlab.platypus import Image, Paragraph, SimpleDocTemplate, Spacer, Table

        styles = getSampleStyleSheet()
        width = A4[0] - 36 * mm
        pixels = ImageReader(io.BytesIO(self.picture)).getSize()
        height = width * pixels[1] / pixels[0]
        shrink = min(1.0, 150 * mm / height)
        story: list[Any] = [
            Paragraph(html.escape(str(self.facts["case"])), styles["Title"]),
            Image(io.BytesIO(self.picture), width * shrink, height * shrink),
        ]
        for title, head, rows in self._tables():
            story += [Spacer(1, 4 * mm), Paragraph(title, styles["Heading2"])]
            cells = [[Paragraph(html.escape(cell), styles["BodyText"]) for cell in row] for row in (head, *rows)]
            story.append(Table(cells, repeatRows=1, style=[("GRID", (0, 0), (-1, -1), 0.4, "#ccd2da")]))

        def banner(canvas: Any, _document: Any) -> None:
            canvas.setFont("Helvetica", 8)
            canvas.drawCentredString(A4[0] / 2, 9 * mm, BANNER)

        file = io.BytesIO()
        margins = dict.fromkeys(("leftMargin", "rightMargin", "topMargin", "bottomMargin"), 18 * mm)
        document = SimpleDocTemplate(file, pagesize=A4, title=BANNER, pageCompression=1, **margins)
        document.build(story, onFirstPage=banner, onLaterPages=banner)
        return file.getvalue()

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, head and rows of each table of the document."""
        found = [("Version", ["", ""], [[key.replace("_", " "), _cell(value)] for key, value in self.facts.items()])]
        for title, keys, rows in (
            ("Structures", _STRUCTURES, list(self.structures)),
            ("Lesions", _LESIONS, [asdict(row) for row in self.lesions[:_LISTED_LESIONS]]),
            ("Against the prediction", tuple(Overlap.__dataclass_fields__), [asdict(row) for row in self.compared]),
        ):
            if rows:
                head = [key.replace("_", " ") for key in keys]
                found.append((title, head, [[_cell(row[key]) for key in keys] for row in rows]))
        if len(self.lesions) > _LISTED_LESIONS:
            title, head, rows_ = found[2]
            found[2] = (f"{title} (first {_LISTED_LESIONS} of {len(self.lesions)})", head, rows_)
        return found


def case_report(store: Store, case_id: str) -> CaseReport:
    """Measure a case's current version.

    Raises:
        UsageError: the case has no version yet.
        InputError: no such case, or a file cannot be read.
    """
    case = store.case(case_id)
    if case.revision == 0:
        raise UsageError(case.name, "has no segmentation yet", "run a model or draw one first")
    version = store.version(case_id, case.revision)
    names = {row.value: row.name for row in store.labels(case_id)}
    volume = read_volume(store.file(case.image_path))
    labels, _ = read_mask(store.file(version.path), case.shape)
    made = store.predictions(case_id)
    start = next((row.prediction_id for row in reversed(store.versions(case_id)) if row.prediction_id), None)
    prediction = next((row for row in made if row.id == start), None)
    signed = next((row for row in reversed(store.reviews(case_id)) if row.revision == case.revision), None)
    compared: list[Overlap] = []
    if prediction is not None:
        first, _ = read_mask(store.file(prediction.mask_path), case.shape)
        compared = compare(labels, first, volume.affine, names)
    facts = {
        "case": case.name,
        "case_id": case.id,
        "revision": case.revision,
        "mask_sha256": version.sha256,
        "image_sha256": case.image_sha256,
        "model": prediction.model if prediction else "",
        "model_version": prediction.bundle_version if prediction else "",
        "author": store.user(version.author_id).display_name,
        "saved_at": version.created_at.isoformat(timespec="seconds"),
        "reviewer": signed.reviewer_name if signed else "",
        "verdict": signed.verdict if signed else "not signed",
        "comment": signed.comment if signed else "",
        "signed_at": signed.created_at.isoformat(timespec="seconds") if signed else "",
    }
    lines = [f"Revision {case.revision}, {facts['verdict']}", BANNER]
    return CaseReport(
        facts,
        tuple(asdict(row) for row in label_statistics(labels, volume.affine, names)),
        tuple(lesions(labels, volume.affine, names)),
        tuple(compared),
        render_preview(volume.data[0], labels, volume.affine, names, title=case.name, lines=lines),
    )


def _cell(value: object) -> str:
    """A value as text; a spreadsheet shall not take what people typed for a formula."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return "'" + text if text[:1] in {"=", "+", "-", "@"} and not isinstance(value, int) else text


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"
