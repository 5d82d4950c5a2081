"""Export: the current version as files; each names version, hash, signer and what it must not be used for."""

from __future__ import annotations

import re
from collections.abc import Mapping

import streamlit as st
from context import Context, told

from medseg.review.dataset import export_dataset
from medseg.review.exports import Kind, export_case, kinds
from medseg.review.store.models import Case
from medseg.review.worklist import EXPORTS

_FORMS: Mapping[Kind, tuple[str, str]] = {
    "nifti": ("Labels (NIfTI)", "_seg.nii.gz"),
    "dicom-seg": ("Labels (DICOM SEG)", "_seg.dcm"),
    "rtstruct": ("Contours (DICOM RTSTRUCT)", "_rtstruct.dcm"),
    "pdf": ("Report (PDF)", ".pdf"),
    "html": ("Report (HTML)", ".html"),
    "csv": ("Measurements (CSV)", ".csv"),
    "json": ("Everything (JSON)", ".json"),
}


def render(ctx: Context, case: Case) -> None:
    """What there is to take away of a case."""
    if not case.revision:
        st.info("There is no segmentation to export yet.")
        return
    st.caption(f"Version {case.revision}, {case.state}. Files are made when you press.")
    for kind in kinds(ctx.store, case):
        label, suffix = _FORMS[kind]
        st.download_button(
            label,
            lambda kind=kind: export_case(ctx.store, case.id, kind, by=ctx.user).content,
            file_name=f"{case.id}_v{case.revision}{suffix}",
            mime="application/octet-stream",
            key=f"export_{kind}",
            on_click="ignore",
            width="stretch",
        )
    if ctx.may_review:
        st.divider()
        _dataset(ctx)


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
