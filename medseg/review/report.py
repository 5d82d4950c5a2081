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
from medseg.io.read import read_volume
from medseg.report.preview import render_preview
from medseg.review.compare import overlaps, read_segmentation, segmentation
from medseg.review.derived import HEAVY_WORK, pictured
from medseg.review.masks import Overlap
from medseg.review.saving import screenshots
from medseg.review.store.models import Case, now
from medseg.review.store.repo import BANNER, Store
from medseg.review.structures import Measurements, measurements

_STRUCTURES = ("value", "name", "volume_ml", "mean", "sd", "components")
_LESIONS = ("number", "name", "volume_ml", "axial_diameter_mm", "centroid_mm", "max_uncertainty")
_MEASURED = (
    *("value", "name", "number", "voxels", "volume_ml", "mean", "sd", "components"),
    *("axial_diameter_mm", "centroid_mm", "voxel", "max_uncertainty"),
)
_LISTED_LESIONS = 40
_MOST_PICTURES = 12
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
        measured: structures and lesions.
        compared: the version against the prediction that it started from; empty without one.
        pictures: PNG of three planes, then those that people took of the version in the viewer.
        diagnosis: what the model said of the patient, see `medseg.inference.record.DiagnosisRecord`; None where it says
            nothing. It is not changed by corrections.
    """

    facts: dict[str, Any]
    measured: Measurements
    compared: tuple[Overlap, ...]
    pictures: tuple[bytes, ...]
    diagnosis: dict[str, Any] | None = None

    def to_json(self) -> str:
        """Everything but the pictures."""
        content = {
            "disclaimer": BANNER,
            **self.facts,
            "intensity_unit": self.measured.unit,
            "structures": [asdict(row) for row in self.measured.structures],
            "lesions": [asdict(row) for row in self.measured.lesions],
            "compared_with_prediction": [asdict(overlap) for overlap in self.compared],
            "diagnosis": self.diagnosis,
        }
        return json.dumps(content, indent=2) + "\n"

    def to_csv(self) -> str:
        """A row for each structure and lesion, each with the facts that name the version."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        named = [key for key in self.facts if key not in {"case", "comment"}]
        writer.writerow([*named, "kind", *_MEASURED, "disclaimer"])
        rows = [("structure", asdict(row)) for row in self.measured.structures]
        rows += [("lesion", asdict(row)) for row in self.measured.lesions]
        for kind, row in rows:
            cells = [row.get(key) for key in _MEASURED]
            writer.writerow([*(_cell(self.facts[key]) for key in named), kind, *map(_cell, cells), BANNER])
        return text.getvalue()

    def to_html(self) -> str:
        """One file that needs nothing else."""
        parts = [f"<h2>{html.escape(title)}</h2>{_html_table(head, rows)}" for title, head, rows in self._tables()]
        pictures = "".join(
            f'<img alt="{"Three planes" if number == 0 else f"Picture {number} from the viewer"}" '
            f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
            for number, picture in enumerate(self.pictures)
        )
        name = html.escape(str(self.facts["case"]))
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
            f'</head><body><p class="banner">{BANNER}</p><h1>{name}</h1>'
            f'{pictures}{"".join(parts)}<p class="banner">{BANNER}</p></body></html>\n'
        )

    def to_pdf(self) -> bytes:
        """A4 pages, the banner on each."""
        from reportlab.lib.pagesizes import A4
        from reportlab.lib.styles import getSampleStyleSheet
        from reportlab.lib.units import mm
        from reportlab.platypus import Paragraph, SimpleDocTemplate, Spacer, Table

        font = _pdf_font()
        styles = getSampleStyleSheet()
        for style in ("Title", "Heading2", "BodyText"):
            styles[style].fontName = font
        styles["Heading2"].keepWithNext = 1
        styles["BodyText"].fontSize, styles["BodyText"].leading, styles["BodyText"].splitLongWords = 8, 10, 1
        width = A4[0] - 36 * mm
        first, *others = (_pdf_picture(picture, width, 150 * mm) for picture in self.pictures)
        story: list[Any] = [Paragraph(html.escape(str(self.facts["case"])), styles["Title"]), first]
        for title, head, rows in self._tables():
            story += [Spacer(1, 4 * mm), Paragraph(html.escape(title), styles["Heading2"])]
            lines = [head, *rows] if any(head) else rows
            cells = [[Paragraph(html.escape(cell), styles["BodyText"]) for cell in row] for row in lines]
            # Two columns are names and values: the values are the long ones.
            widths = [width * 0.25, width * 0.75] if len(head) == 2 else [width / len(head)] * len(head)
            grid = [("GRID", (0, 0), (-1, -1), 0.4, "#ccd2da"), ("VALIGN", (0, 0), (-1, -1), "TOP")]
            story.append(Table(cells, colWidths=widths, repeatRows=1 if any(head) else 0, style=grid))
        for picture in others:
            story += [Spacer(1, 6 * mm), picture]
        foot = f"{BANNER} Case {self.facts['case_id']}, version {self.facts['revision']}"

        def banner(canvas: Any, document: Any) -> None:
            canvas.setFont(font, 8)
            canvas.drawString(18 * mm, 9 * mm, foot)
            canvas.drawRightString(A4[0] - 18 * mm, 9 * mm, str(document.page))

        file = io.BytesIO()
        margins = dict.fromkeys(("leftMargin", "rightMargin", "topMargin", "bottomMargin"), 18 * mm)
        document = SimpleDocTemplate(file, pagesize=A4, title=BANNER, pageCompression=1, **margins)
        document.build(story, onFirstPage=banner, onLaterPages=banner)
        return file.getvalue()

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, head and rows of each table of the document."""
        found = [("Version", ["", ""], [[key.replace("_", " "), _cell(value)] for key, value in self.facts.items()])]
        unit = f" {self.measured.unit}" if self.measured.unit else ""
        listed = self.measured.lesions[:_LISTED_LESIONS]
        count = len(self.measured.lesions)
        of_all = f" (first {_LISTED_LESIONS} of {count})" if count > _LISTED_LESIONS else ""
        for title, keys, rows in (
            ("Structures", _STRUCTURES, [asdict(row) for row in self.measured.structures]),
            (f"Lesions{of_all}", _LESIONS, [asdict(row) for row in listed]),
            ("Against the prediction", tuple(Overlap.__dataclass_fields__), [asdict(row) for row in self.compared]),
        ):
            if rows:
                head = [key.replace("_", " ") + (unit if key in {"mean", "sd"} else "") for key in keys]
                found.append((title, head, [[_cell(row[key]) for key in keys] for row in rows]))
        return found if self.diagnosis is None else [found[0], *_diagnosis_tables(self.diagnosis), *found[1:]]


def version_facts(store: Store, case: Case) -> dict[str, Any]:
    """What every export says of a case's current version: which bytes, from which model, who stands for it.

    Raises:
        UsageError: the case has no version yet.
    """
    if case.revision == 0:
        raise UsageError(case.name, "has no segmentation yet", "run a model or draw one first")
    version = store.version(case.id, case.revision)
    prediction = store.origin(case.id, case.revision)
    signed = next((row for row in reversed(store.reviews(case.id)) if row.revision == case.revision), None)
    return {
        "case": case.name,
        "case_id": case.id,
        "revision": case.revision,
        "mask_sha256": version.sha256,
        "image_sha256": case.image_sha256,
        "model": prediction.model if prediction else "",
        "model_version": prediction.bundle_version if prediction else "",
        "model_disclaimer": prediction.record.get("disclaimer", "") if prediction else "",
        "author": store.user(version.author_id).display_name,
        "saved_at": version.created_at.isoformat(timespec="seconds"),
        "reviewer": signed.reviewer_name if signed else "",
        "verdict": signed.verdict if signed else "not signed",
        "comment": signed.comment if signed else "",
        "signed_at": signed.created_at.isoformat(timespec="seconds") if signed else "",
        "exported_at": now().isoformat(timespec="seconds"),
    }


def case_report(store: Store, case_id: str) -> CaseReport:
    """Measure a case's current version.

    Raises:
        UsageError: the case has no version yet.
        InputError: no such case, or a file cannot be read.
    """
    case = store.case(case_id)
    facts = version_facts(store, case)
    version = segmentation(store, case_id, store.version(case_id, case.revision).id)
    prediction = store.origin(case_id, case.revision)
    measured = measurements(store, version)
    compared = overlaps(store, case_id, version.id, prediction.id) if prediction else []
    lines = [f"Version {case.revision}, {facts['verdict']}", BANNER]
    with HEAVY_WORK:
        labels, names = read_segmentation(store, version)
        volume = read_volume(store.file(pictured(case, prediction)))
        planes = render_preview(volume.data[0], labels, volume.affine, names, title=case.name, lines=lines)
    taken = [path.read_bytes() for path in screenshots(store, case_id, case.revision)[-_MOST_PICTURES:]]
    diagnosis = prediction.record.get("diagnosis") if prediction else None
    return CaseReport(facts, measured, tuple(compared), (planes, *taken), diagnosis)


def _diagnosis_tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Classes, the most probable one first, and lesions, as the model found them."""
    known, blind = found["probabilities"], found["probabilities_without_metadata"]
    classes = [
        [found["classes"][code], f"{known[code]:.1%}", f"{blind[code]:.1%}"]
        for code in sorted(known, key=lambda code: -known[code])
    ]
    missing = f" (not known: {', '.join(found['missing'])})" if found["missing"] else ""
    flags = f" ({', '.join(found['flags'])})".replace("_", " ") if found["flags"] else ""
    tables = [(f"Model's diagnosis{missing}{flags}", ["class", "all that is known", "without age and sex"], classes)]
    planes = ("axial", "coronal", "sagittal")
    rows = []
    for one in found["findings"]:
        sizes = {size["plane"]: f"{size['longest_mm']:.0f} x {size['short_mm']:.0f}" for size in one["diameters"]}
        rows.append([one["type"], one["part"], _cell(one["volume_ml"]), *(sizes.get(plane, "") for plane in planes)])
    if rows:
        tables.append(("Model's findings", ["type", "part", "ml", *(f"{plane} mm" for plane in planes)], rows))
    return tables


def _pdf_font() -> str:
    """The name of a registered font with as many letters as this machine has to offer."""
    from PIL import ImageFont
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFError, TTFont

    for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "Vera.ttf"):
        try:
            path = name if name == "Vera.ttf" else ImageFont.truetype(name).path  # reportlab brings Vera along
            pdfmetrics.registerFont(TTFont("medseg", path))
        except (OSError, TTFError):
            continue
        return "medseg"
    return "Helvetica"


def _pdf_picture(picture: bytes, width: float, height: float) -> Any:
    """A picture as large as fits into width and height (points)."""
    from reportlab.lib.utils import ImageReader
    from reportlab.platypus import Image

    x, y = ImageReader(io.BytesIO(picture)).getSize()
    scale = min(width / x, height / y)
    return Image(io.BytesIO(picture), x * scale, y * scale)


def _cell(value: object) -> str:
    """A value as text; a spreadsheet shall not take what people typed for a formula."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        return " ".join(_cell(one) for one in value)
    text = str(value)
    return "'" + text if text[:1] in {"=", "+", "-", "@"} and not isinstance(value, int) else text


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = line(head, "th") if any(head) else ""
    return "<table>" + top + "".join(line(row, "td") for row in rows) + "</table>"
