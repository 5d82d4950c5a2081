"""Worklist: the cases with their states, and how new ones come in."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st
from context import STATES, Context, show_case, told

from medseg.review.store.models import new_id
from medseg.review.store.repo import WorklistRow
from medseg.review.worklist import import_upload

ROWS_SHOWN = 500
_ANY = "all"
_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd", ".zip")


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
        turn = st.session_state.setdefault("upload_turn", 0)
        folder = kind == "DICOM folder"
        files = st.file_uploader(
            "A folder of one DICOM series"
            if folder
            else "NIfTI (one or more channels), MetaImage, NRRD, or a zip archive of one DICOM series",
            accept_multiple_files="directory" if folder else True,
            key=f"upload_{kind}_{turn}",
            help="Names of files are not kept: they may say who the patient is.",
        )
        name = st.text_input("Pseudonym", key="upload_name", max_chars=80, placeholder="made by medseg when left empty")
        if st.button("Add", type="primary", disabled=not files, key="upload_add"):
            _add(ctx, files or [], " ".join(name.split()), folder=folder)


def _add(ctx: Context, files: Sequence[Any], name: str, *, folder: bool) -> None:
    """Make cases of uploads: a folder is one, files are one each."""
    groups = [list(files)] if folder else [[file] for file in files]
    added = 0
    for number, group in enumerate(groups, start=1):
        case_name = name or f"upload {new_id()[:8]}"
        if name and len(groups) > 1:
            case_name = f"{name} {number}"
        with (
            told(),
            st.spinner("Reading the scan"),
            tempfile.TemporaryDirectory(dir=ctx.store.folder, prefix=".upload-") as place,
        ):
            import_upload(ctx.store, _write(Path(place), group, folder=folder), name=case_name, by=ctx.user)
            added += 1
    if added == len(groups):
        st.session_state.upload_turn += 1  # a new uploader: the old one's bytes leave the memory
        st.toast(f"{added} scan{'s' if added > 1 else ''} added.")
        st.rerun()


def _write(place: Path, group: Sequence[Any], *, folder: bool) -> Path:
    """Put uploads on disk under names of ours; the file, or the folder of them."""
    for number, upload in enumerate(group):
        suffix = next((end for end in _SUFFIXES if upload.name.lower().endswith(end)), "")
        with (place / f"scan_{number:05}{suffix}").open("xb") as file:
            shutil.copyfileobj(upload, file)
    return place if folder else next(place.iterdir())
