"""Run: a bundle on a case, beside everything else."""

from __future__ import annotations

import streamlit as st
from context import Context, case_names, open_case, show_case, told

from medseg.bundles.locate import DEFAULT_BUNDLE, all_bundles, is_ensemble, weights_of
from medseg.review.store.models import Job

JOBS_SHOWN = 15
_POLL_S = 1.0
_ENDED = {"done": ":green[done]", "failed": ":red[failed]", "cancelled": ":gray[cancelled]"}


def render(ctx: Context) -> None:
    """The page."""
    st.subheader("Run a model", anchor=False)
    rows = ctx.store.worklist()
    if not rows:
        st.info("No case yet. Add a scan in the worklist.")
        return
    if ctx.may_review:
        _form(ctx, case_names(rows))
    st.subheader("Runs", anchor=False)
    waiting = bool(ctx.store.jobs(state="queued") or ctx.store.jobs(state="running"))
    # The list renews itself while something runs; the rest of the page stays as it is.
    st.fragment(_jobs, run_every=_POLL_S if waiting else None)(ctx, renewing=waiting)


def _form(ctx: Context, names: dict[str, str]) -> None:
    ids = list(names)
    bundles = [root.name for root in all_bundles() if weights_of(root) or is_ensemble(root)]
    here = open_case()
    with st.form("run", border=True):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            case_id = st.selectbox(
                "Case", ids, index=ids.index(here) if here in ids else 0, format_func=lambda one: names[one]
            )
            bundle = st.selectbox(
                "Model", bundles, index=bundles.index(DEFAULT_BUNDLE) if DEFAULT_BUNDLE in bundles else 0
            )
            device = st.selectbox("Device", ["auto", "cpu", "cuda"], width=130)
        with st.container(horizontal=True, vertical_alignment="center"):
            unsure = st.checkbox("Uncertainty", help="Also keep how sure the model is of each voxel; slower.")
            force = st.checkbox("Go on although the scan is not what the model was trained on")
        if st.form_submit_button("Run", type="primary", icon=":material/play_arrow:"):
            with told():
                job = ctx.services.queue.submit(
                    case_id, bundle, by=ctx.user, device=device, force=force, uncertainty=unsure
                )
                position = ctx.services.queue.position(job.id)
                st.toast("It begins." if not position else f"In the queue: {position} before it.")


def _jobs(ctx: Context, *, renewing: bool) -> None:
    """The newest runs; a page that nobody renews any more is drawn once more when the last run has ended."""
    jobs = list(reversed(ctx.store.jobs()))[:JOBS_SHOWN]
    if not jobs:
        st.caption("None yet.")
    names = {row.case.id: row.case.name for row in ctx.store.worklist()}
    people = {user.id: user.display_name for user in ctx.store.users()}
    for job in jobs:
        with st.container(border=True, gap=None):
            _job(ctx, job, names.get(job.case_id, "-"), people.get(job.created_by, "-"))
    if renewing and not any(job.state in {"queued", "running"} for job in jobs):
        st.rerun()


def _job(ctx: Context, job: Job, case: str, person: str) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        with st.container(width="stretch", gap=None):
            st.markdown(f"**{job.bundle}** on `{case}`")
            st.caption(f"{person}, {job.created_at:%Y-%m-%d %H:%M} UTC")
        if job.state in {"queued", "running"}:
            mine = job.created_by == ctx.user.id or ctx.user.role == "admin"
            if ctx.may_review and st.button("Cancel", key=f"cancel_{job.id}", disabled=not mine or job.cancel):
                with told():
                    ctx.services.queue.cancel(job.id, by=ctx.user)
                    st.rerun(scope="fragment")
        else:
            st.markdown(_ENDED[job.state])
            if job.state == "done" and st.button("Open", key=f"open_{job.id}"):
                show_case(job.case_id)
                # Where the case's version is this result, the version is shown: it can be corrected.
                revision = ctx.store.case(job.case_id).revision
                same = revision and ctx.store.version(job.case_id, revision).prediction_id == job.prediction_id
                st.session_state.shown = None if same else job.prediction_id
                st.switch_page(st.session_state.pages["review"])
    if job.state == "queued":
        before = ctx.services.queue.position(job.id)
        st.progress(0.0, f"waiting, {before} before it")
    elif job.state == "running":
        st.progress(
            min(job.progress, 1.0), "stopping" if job.cancel else f"{job.message or 'starting'} ({job.progress:.0%})"
        )
    elif job.state == "failed":
        st.error(job.message, icon=":material/error:")
