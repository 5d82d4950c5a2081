"""Run: a bundle on a case, beside everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st
from context import Context, case_names, open_case, show_case, told

from medseg.bundles.locate import DEFAULT_BUNDLE, all_bundles, is_ensemble, weights_of
from medseg.io.patients import AGES
from medseg.review.runnable import Runnable, holds_phases
from medseg.review.store.models import Case, Job

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
    with st.container(border=True):  # no form: what is asked for depends on the model
        with st.container(horizontal=True, vertical_alignment="bottom"):
            case_id = st.selectbox(
                "Case", ids, index=ids.index(here) if here in ids else 0, format_func=lambda one: names[one]
            )
            bundle = st.selectbox(
                "Model", bundles, index=bundles.index(DEFAULT_BUNDLE) if DEFAULT_BUNDLE in bundles else 0
            )
            device = st.selectbox("Device", ["auto", "cpu", "cuda"], width=130)
        model = Runnable.of(bundle)
        asked = _patient(ctx, model, ctx.store.case(case_id), names) if model.phases else _Asked(case_id, {})
        with st.container(horizontal=True, vertical_alignment="center"):
            if not model.phases:
                unsure = st.checkbox("Uncertainty", help="Also keep how sure the model is of each voxel; slower.")
                asked.options["uncertainty"] = unsure
            force = st.checkbox("Go on although the scan is not what the model was trained on")
        if st.button("Run", type="primary", icon=":material/play_arrow:", key="run", disabled=asked.case_id is None):
            with told():
                job = ctx.services.queue.submit(
                    asked.case_id or case_id, bundle, by=ctx.user, device=device, force=force, **asked.options
                )
                position = ctx.services.queue.position(job.id)
                st.toast("It begins." if not position else f"In the queue: {position} before it.")


@dataclass
class _Asked:
    """What the form has come to.

    Attributes:
        case_id: the case that gets the result; None while something is missing.
        options: of `JobQueue.submit`.
    """

    case_id: str | None
    options: dict[str, Any]


def _patient(ctx: Context, model: Runnable, case: Case, names: dict[str, str]) -> _Asked:
    """What a model that diagnoses wants to know: which case is which phase, age, sex, whether to register.

    The keys of what is typed hold the case, so that nothing of one patient is sent with another.
    """
    st.markdown(f":small[:orange[{model.disclaimer}] Uncertainty and evidence map are kept with the result.]")
    whole, single = "All in this case's file", "One case for each phase"
    holds = holds_phases(ctx.store, case, len(model.phases))
    how = st.segmented_control(
        "Phases", [single, whole], default=whole if holds else single, required=True, key=f"phases_{case.id}"
    )
    chosen: dict[str, str] = {}
    if how == single:
        known = model.phase_of(case)
        with st.container(horizontal=True):
            for phase in model.phases:
                ids = ["", *names]
                one = st.selectbox(
                    phase,
                    ids,
                    index=ids.index(case.id) if phase == known else 0,
                    format_func=lambda one: names.get(one, "not there"),
                    key=f"phase_{case.id}_{phase}",
                )
                if one:
                    chosen[phase] = one
    with st.container(horizontal=True, vertical_alignment="bottom"):
        low, high = AGES
        age = st.number_input(
            "Age (years)", low, high, value=None, step=1.0, placeholder="unknown", key=f"age_{case.id}", width=150
        )
        sexes = {"": "unknown", "F": "female", "M": "male"}
        sex = st.selectbox("Sex", list(sexes), format_func=sexes.get, key=f"sex_{case.id}", width=150)
        align = st.checkbox(
            "Register the phases", key=f"align_{case.id}", help="Lay each onto the reference by a motion"
        )
    st.caption(
        "Age and sex are forgotten when the run has ended. Where they are unknown, a DICOM header may tell them."
    )
    options = {"uncertainty": True, "evidence": True, "align": align, "age": age, "sex": sex or None, "phases": chosen}
    if how == whole:
        return _Asked(case.id, options)
    if not chosen:
        st.error("Choose a case for one phase at least.")
        return _Asked(None, options)
    if len(set(chosen.values())) < len(chosen):
        st.error("One case stands for two phases.")
        return _Asked(None, options)
    reference = model.reference(list(chosen))
    st.info(f"{reference} is the reference: the result is kept with `{names[chosen[reference]]}`.")
    return _Asked(chosen[reference], options)


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
