"""Export: the current version as files; each names version, hash, signer and what it must not be used for."""

from __future__ import annotations

import re
from collections.abc import Callable

import streamlit as st
from context import Context, told

from medseg.review.dataset import export_dataset
from medseg.review.report import case_report
from medseg.review.store.models import Case
from medseg.review.worklist import EXPORTS


def render(ctx: Context, case: Case) -> None:
    """What there is to take away of a case."""
    if not case.revision:
        st.info("There is no segmentation to export yet.")
        return
    st.caption(f"Version {case.revision}, {case.state}. Files are made when you press.")
    stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', case.name)}_v{case.revision}"

    def offer(label: str, suffix: str, mime: str, make: Callable[[], bytes | str]) -> None:
        kind = suffix.rpartition(".")[2]

        def made() -> bytes | str:
            content = make()
            ctx.store.note(ctx.user, "exported", case_id=case.id, detail={"kind": kind, "revision": case.revision})
            return content

        st.download_button(
            label, made, file_name=stem + suffix, mime=mime, key=f"export_{label}", on_click="ignore", width="stretch"
        )

    offer("Labels (NIfTI)", "_seg.nii.gz", "application/gzip", lambda: _mask(ctx, case))
    offer("Report (PDF)", ".pdf", "application/pdf", lambda: case_report(ctx.store, case.id).to_pdf())
    offer("Report (HTML)", ".html", "text/html", lambda: case_report(ctx.store, case.id).to_html())
    offer("Measurements (CSV)", ".csv", "text/csv", lambda: case_report(ctx.store, case.id).to_csv())
    offer("Everything (JSON)", ".json", "application/json", lambda: case_report(ctx.store, case.id).to_json())
    if ctx.may_review:
        st.divider()
        _dataset(ctx)


def _mask(ctx: Context, case: Case) -> bytes:
    return ctx.store.file(ctx.store.version(case.id, case.revision).path).read_bytes()


def _dataset(ctx: Context) -> None:
    """Accepted cases as a data set for `medseg train`."""
    accepted = ctx.store.worklist(state="accepted")
    st.markdown(f"**Data set of accepted cases** ({len(accepted)})")
    with st.form("dataset", border=False):
        name = st.text_input("Name", max_chars=60, placeholder="liver_corrected")
        channel = st.selectbox("Images are", ["CT", "MRI", "PET"])
        if st.form_submit_button("Write data set", disabled=not accepted):
            folder = re.sub(r"[^A-Za-z0-9._-]+", "_", name.strip()).strip("._")
            if not folder:
                st.error("Give the data set a name.")
                return
            with told(), st.spinner("Writing"):
                cases = [row.case.id for row in accepted]
                export_dataset(
                    ctx.store, cases, ctx.store.folder / EXPORTS / folder, name=folder, channel=channel, by=ctx.user
                )
                st.success(f"{len(cases)} cases are in {EXPORTS}/{folder} of the data folder: `medseg train` reads it.")
