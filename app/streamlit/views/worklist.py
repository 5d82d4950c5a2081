"""Worklist: the cases with their states, and how new ones come in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st
from context import STATES, Context, show_case, told
from uploader import uploader

from medseg.review.api import PREFIX
from medseg.review.store.models import new_id
from medseg.review.store.repo import WorklistRow
from medseg.review.uploads import drop_upload, parts, upload_folder
from medseg.review.worklist import import_upload

ROWS_SHOWN = 500
_ANY = "all"


def render(ctx: Context) -> None:
    """The page."""
    rows = ctx.store.worklist()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader("Worklist", anchor=False, width="stretch")
        if st.button("Next unreviewed", icon=":material/skip_next:", type="primary", key="next_unreviewed"):
            _open_next(ctx)
    with st.container(horizontal=True):
        state = st.selectbox("State", [_ANY, *STATES], key="filter_state")
        model = st.selectbox("Model", [_ANY, *sorted({row.model for row in rows if row.model})], key="filter_model")
        people = sorted({row.reviewer for row in rows if row.reviewer})
        reviewer = st.selectbox("Reviewer", [_ANY, *people], key="filter_reviewer")
        search = st.text_input("Name contains", key="filter_search")
    found = ctx.store.worklist(
        state=None if state == _ANY else state,
        model=None if model == _ANY else model,
        reviewer=None if reviewer == _ANY else reviewer,
        search=search.strip(),
    )
    if not rows:
        st.info("No case yet. Upload a scan below, or start `medseg review FOLDER` with a folder of scans.")
    else:
        _table(found[:ROWS_SHOWN])
        more = f"; the first {ROWS_SHOWN} are shown" if len(found) > ROWS_SHOWN else ""
        st.caption(f"{len(found)} of {len(rows)} cases{more}. Click a line to open it.")
    _intake(ctx)
    if ctx.may_review:
        _upload(ctx)


def _table(rows: Sequence[WorklistRow]) -> None:
    """The cases; a click opens one."""
    cells: list[dict[str, Any]] = [
        {
            "case": row.case.name,
            "state": row.case.state,
            "modality": row.case.modality or "-",
            "model": row.model or "-",
            "reviewer": row.reviewer or "-",
            "revision": row.case.revision,
            "voxels": " x ".join(map(str, row.case.shape)),
            "last change (UTC)": row.case.changed_at.replace(tzinfo=None),
        }
        for row in rows
    ]
    picked = st.dataframe(
        cells,
        hide_index=True,
        on_select="rerun",
        selection_mode=["single-row", "single-cell"],
        key=f"cases_{st.session_state.get('table_round', 0)}",
        column_config={
            "case": st.column_config.TextColumn(width="large"),
            "last change (UTC)": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm"),
        },
        height=min(38 + 35 * len(cells), 560),
    )
    places = [*picked["selection"]["rows"], *(place for place, _ in picked["selection"]["cells"])]
    if places and places[0] < len(rows):
        # The table forgets its selection, so that coming back does not open the case again.
        st.session_state.table_round = st.session_state.get("table_round", 0) + 1
        _open(rows[places[0]].case.id)


def _open_next(ctx: Context) -> None:
    case = ctx.store.next_unreviewed(ctx.user)
    if case is None:
        st.toast("Every case has a verdict.", icon=":material/done_all:")
        return
    _open(case.id)


def _open(case_id: str) -> None:
    show_case(case_id)
    st.switch_page(st.session_state.pages["review"])


def _intake(ctx: Context) -> None:
    """What became of the folders that the app was started with."""
    progress = ctx.services.intake.progress()

    @st.fragment(run_every=2)
    def watch() -> None:
        if ctx.services.intake.progress().running:
            st.caption(":material/hourglass_top: Scans are being imported.")
        else:
            st.rerun()

    if progress.running:
        watch()
    if progress.problems:
        with st.expander(f"{len(progress.problems)} scans or results were left out", icon=":material/warning:"):
            st.text("\n".join(progress.problems))


def _upload(ctx: Context) -> None:
    with st.expander("Add scans", icon=":material/upload:"):
        if ctx.services.settings.scans:
            st.button("Look for new scans in the folders", on_click=ctx.services.intake.start, key="look_again")
        kind = st.segmented_control(
            "What", ["Files", "DICOM folder"], default="Files", required=True, key="upload_kind", width="content"
        )
        upload = st.session_state.setdefault("upload", new_id())
        folder = kind == "DICOM folder"
        st.caption(
            "A folder of one DICOM series."
            if folder
            else "NIfTI (one or more channels), MetaImage, NRRD, or a zip archive of one DICOM series; each becomes a "
            "case. Names of files are not kept: they may say who the patient is."
        )
        came = uploader(
            upload,
            url=f"{PREFIX}/upload/{upload}",
            token=ctx.token("upload", upload),
            folder=folder,
            largest=ctx.services.settings.upload_mb << 20,
            key=f"upload_{kind}_{upload}",
        )
        name = st.text_input("Pseudonym", key="upload_name", max_chars=80, placeholder="made by medseg when left empty")
        if st.button("Add", type="primary", disabled=not came, key="upload_add"):
            _add(ctx, upload_folder(ctx.store.folder, upload), came, " ".join(name.split()), folder=folder)


def _add(ctx: Context, place: Path, count: int, name: str, *, folder: bool) -> None:
    """Make cases of what was sent: a folder is one, files are one each."""
    files = parts(place)
    if len(files) != count:
        st.error("The files are not there any more; choose them again.")
        return
    scans = [place] if folder else files
    added = 0
    for number, scan in enumerate(scans, start=1):
        case_name = name or f"upload {new_id()[:8]}"
        if name and len(scans) > 1:
            case_name = f"{name} {number}"
        with told(), st.spinner("Reading the scan"):
            import_upload(ctx.store, scan, name=case_name, by=ctx.user)
            added += 1
    drop_upload(place)
    del st.session_state.upload
    if added == len(scans):
        st.toast(f"{added} scan{'s' if added > 1 else ''} added.")
        st.rerun()
