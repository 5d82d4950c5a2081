"""Review: one case in the viewer, and beside it what is measured, judged, kept and exported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import streamlit as st
from context import Context, case_names, distinct, open_case, show_case, told
from viewer import Command, Image, Label, Lesion, Mask, Overlay, Save, Screenshot, ViewerEvents, ViewerSpec, viewer

from medseg.review.api import PREFIX
from medseg.review.compare import Segmentation, segmentation
from medseg.review.store.models import Case, User
from medseg.review.structures import Measurements, measurements
from views import exports, panel

KEY = "viewer"
PANEL_WIDTH = 360
_KEPT = {"opacity": 50, "uncertainty": False, "evidence": False}
LARGE_VOXELS = 12_000_000
"""A scan of more voxels is shown from a smaller copy until it has come."""


def render(ctx: Context) -> None:
    """The page."""
    case = _case(ctx)
    if case is None:
        st.info("No case is open. Choose one in the worklist.")
        return
    st.query_params["case"] = case.id
    for key, first in _KEPT.items():  # Streamlit forgets switches while another tab hides them
        st.session_state[key] = st.session_state.get(key, first)
    _sidebar(ctx, case)
    shown = _shown(ctx, case)
    phase = _phase(ctx, case, shown)
    with st.container(horizontal=True, wrap=False, gap="small"):
        left = st.container(width="stretch", key="viewer_column")
        right = st.container(width=PANEL_WIDTH, key="panel_column")
    known = st.session_state.get("measured")
    found: Measurements | None = known[1] if known and shown and known[0] == (case.id, shown.id) else None
    with left:
        events = viewer(_spec(ctx, case, shown, found, phase), key=KEY)
    _react(ctx, case, events)
    with right:
        tabs = st.tabs(["Structures", "Lesions", "Verdict", "History", "Export"], key="panel", on_change="rerun")
        if (tabs[0].open or tabs[1].open) and shown is not None and found is None:
            with tabs[0] if tabs[0].open else tabs[1], told(), st.spinner("Measuring"):
                found = measurements(ctx.store, shown)
                st.session_state.measured = ((case.id, shown.id), found)
                st.rerun()  # the viewer jumps between lesions, so it has to know them
        for tab, view in zip(
            tabs,
            (
                lambda: panel.structures(ctx, case, shown, found),
                lambda: panel.lesions(ctx, case, shown, found, send),
                lambda: panel.verdict(ctx, case, dirty=_dirty()),
                lambda: panel.history(ctx, case, shown, dirty=_dirty()),
                lambda: exports.render(ctx, case),
            ),
            strict=True,
        ):
            if tab.open:
                with tab, told():
                    view()


def _case(ctx: Context) -> Case | None:
    """The case that is open; a link to one that is gone says so."""
    case_id = open_case()
    if case_id is None:
        case = ctx.store.next_unreviewed(ctx.user)
        rows = ctx.store.worklist()
        case = case or (rows[0].case if rows else None)
        if case is not None:
            show_case(case.id)
        return case
    with told():
        return ctx.store.case(case_id)
    return None


def _shown(ctx: Context, case: Case) -> Segmentation | None:
    """What the viewer shows: the current version, unless another one was asked for; None before the first."""
    chosen = st.session_state.get("shown")
    with told():
        if chosen is not None:
            return segmentation(ctx.store, case.id, chosen)
        if base := _base(case):
            return segmentation(ctx.store, case.id, ctx.store.version(case.id, base).id)
    return None


def _phase(ctx: Context, case: Case, shown: Segmentation | None) -> tuple[str, int] | None:
    """Prediction and number of the phase that the viewer shows, of those that a diagnosis was made from."""
    made = ctx.prediction_of(case, shown)
    if made is None or not made.phase_paths:
        return None
    names = list(made.phase_paths)
    reference = next(phase["name"] for phase in made.record["diagnosis"]["phases"] if phase["reference"])
    with st.sidebar:
        chosen = st.segmented_control(
            "Phase", names, default=reference, required=True, key=f"phase_{made.id}", help="As the network saw it"
        )
    return made.id, names.index(chosen)


def _base(case: Case) -> int:
    """The revision that is edited: the current one, but while there are unsaved changes the one they were made to."""
    kept = st.session_state.get("base")
    if kept is None or kept[0] != case.id or not _dirty():
        kept = st.session_state.base = (case.id, case.revision)
    return int(kept[1])


def _dirty() -> bool:
    """Whether the viewer holds unsaved changes, as far as it has told."""
    return bool(dict(st.session_state.get(KEY) or {}).get("dirty"))


# --- going from case to case ------------------------------------------------------------------------------------------


def _sidebar(ctx: Context, case: Case) -> None:
    rows = ctx.store.worklist()
    names = case_names(rows)
    ids = list(names)
    row = next(one for one in rows if one.case.id == case.id)
    with st.sidebar:
        if st.session_state.get("case_choice") != case.id:
            st.session_state.case_choice = case.id
        st.selectbox("Case", ids, format_func=lambda one: names[one], key="case_choice", on_change=_chosen)
        with st.container(horizontal=True, gap="small"):
            place = ids.index(case.id)
            if st.button("Previous", key="previous", help="P", width="stretch", disabled=place == 0):
                _go(ids[place - 1])
            if st.button("Next", key="next", help="N", width="stretch", disabled=place == len(ids) - 1):
                _go(ids[place + 1])
        if st.button("Next unreviewed", icon=":material/skip_next:", key="next_unreviewed", width="stretch"):
            following = ctx.store.next_unreviewed(ctx.user, after=case.id)
            if following is None:
                st.toast("No other case waits for you.", icon=":material/done_all:")
            else:
                _go(following.id)
        st.divider()
        facts = {
            "State": case.state,
            "Version": str(case.revision) if case.revision else "none yet",
            "Model": row.model or "-",
            "Modality": case.modality or "not known",
            "Voxels": " x ".join(map(str, case.shape)),
            "Voxel size": " x ".join(f"{mm:.3g}" for mm in case.spacing) + " mm",
        }
        st.markdown("  \n".join(f":gray[{name}] {_plain(value)}" for name, value in facts.items()))
        _assign(ctx, case)
        st.caption("Keys: `?` in the viewer")


def _assign(ctx: Context, case: Case) -> None:
    if not ctx.may_review:
        return
    able = [user for user in ctx.store.users() if user.role != "reader" and _person(user)]
    people = distinct([("", "nobody"), *((user.id, user.display_name) for user in able)])
    choice = st.selectbox(
        "Assigned to",
        list(people),
        index=list(people).index(case.assigned_to or "") if (case.assigned_to or "") in people else 0,
        format_func=lambda one: people[one],
        key=f"assigned_{case.id}",
    )
    if choice != (case.assigned_to or ""):
        with told():
            ctx.store.assign(case.id, choice or None, by=ctx.user)
            st.rerun()


def _person(user: User) -> bool:
    return not user.subject.startswith("medseg:")


def _chosen() -> None:
    """The picker was used."""
    wanted = st.session_state.case_choice
    if _dirty():
        st.session_state.leaving_to = wanted
        st.session_state.case_choice = open_case()
    else:
        show_case(wanted)


def _go(case_id: str) -> None:
    """Open a case; unsaved changes are asked about first."""
    if _dirty():
        st.session_state.leaving_to = case_id
    else:
        show_case(case_id)
    st.rerun()


@st.dialog("Unsaved changes", dismissible=False)
def _ask_about_changes() -> None:
    st.write("This case has changes that are not saved.")
    with st.container(horizontal=True):
        if st.button("Save", type="primary", key="leave_save"):
            send("save")
            st.session_state.after_save = st.session_state.pop("leaving_to")
            st.rerun()
        if st.button("Discard", key="leave_discard"):
            send("discard")
            st.session_state.after_discard = st.session_state.pop("leaving_to")
            st.rerun()
        if st.button("Stay", key="leave_stay"):
            del st.session_state["leaving_to"]
            st.rerun()


# --- the viewer -------------------------------------------------------------------------------------------------------


def send(
    kind: Literal["goto", "save", "reset", "save_over", "discard"],
    *,
    vox: Sequence[int] | None = None,
    revision: int | None = None,
    draft_id: str | None = None,
) -> None:
    """Ask the viewer to do something once."""
    number = st.session_state.get("cmd_number", 0) + 1
    st.session_state.cmd_number = number
    place = None if vox is None else (vox[0], vox[1], vox[2])
    st.session_state.cmd = Command(id=number, type=kind, vox=place, revision=revision, draft_id=draft_id)


def _spec(
    ctx: Context, case: Case, shown: Segmentation | None, found: Measurements | None, phase: tuple[str, int] | None
) -> ViewerSpec:
    """What the viewer shows."""
    current = shown is None or st.session_state.get("shown") is None
    rows = panel.labels_of(ctx, case, shown)
    visible: Mapping[int, bool] = st.session_state.get("visible", {})
    labels = tuple(
        Label(
            value=row.screen_value,
            name=row.name,
            rgb=(row.r, row.g, row.b),
            visible=visible.get(row.value, True),
        )
        for row in rows
    )
    screen = {row.value: row.screen_value for row in rows}
    mask = None
    if shown is not None:
        mask = Mask(
            url=ctx.link("labels", case.id, shown.id),
            name="mask.nii.gz",
            revision=_base(case) if current else ctx.revision_of(shown),
            source="" if current else shown.id,
            title=shown.title,
        )
    save = None
    if ctx.may_review and current and labels:
        save = Save(
            url=f"{PREFIX}/mask/{case.id}",
            token=ctx.token("save", case.id),
            revision=_base(case),
            owner=ctx.user.id,
        )
    return ViewerSpec(
        case_id=case.id,
        image=image_of(ctx, case, phase),
        mask=mask,
        overlays=_overlays(ctx, case, shown),
        modality="CT" if case.modality == "CT" else "MR",
        labels=labels,
        lesions=tuple(
            Lesion(id=row.number, label=screen[row.value], vox=row.voxel)
            for row in (found.lesions[:500] if found else ())
            if row.value in screen
        ),
        opacity=st.session_state.get("opacity", 50) / 100,
        layout=st.session_state.get("layout", "mpr+3d"),
        cmd=st.session_state.get("cmd"),
        save=save,
        screenshot=Screenshot(url=f"{PREFIX}/screenshot/{case.id}", token=ctx.token("screenshot", case.id))
        if save is not None and case.revision and not _dirty()  # reports show it as a picture of the version
        else None,
        height="calc(100vh - 108px)",
        test=ctx.services.settings.test,
    )


def image_of(ctx: Context, case: Case, phase: tuple[str, int] | None = None) -> Image:
    """The scan of a case, or one of its phases; a large one has a smaller copy that is shown until it has come."""
    large = math.prod(case.shape) > LARGE_VOXELS
    packed = phase is not None or case.image_path.lower().endswith(".gz")
    return Image(
        url=ctx.link("volume", case.id) if phase is None else ctx.link("phase", phase[0], str(phase[1])),
        name="image.nii.gz" if packed else "image.nii",
        source="" if phase is None else f"{phase[0]}.{phase[1]}",
        preview_url=ctx.link("reduced", case.id) if large else None,
        poster_url=ctx.link("poster", case.id),
    )


def _overlays(ctx: Context, case: Case, shown: Segmentation | None) -> tuple[Overlay, ...]:
    """Maps of numbers of the prediction that is shown, or that the shown version was made from."""
    if shown is None:
        return ()
    prediction = ctx.prediction_of(case, shown)
    if prediction is None:
        return ()
    found = []
    if prediction.uncertainty_path:
        found.append(
            Overlay(
                id=f"uncertainty-{prediction.id}",
                url=ctx.link("uncertainty", prediction.id),
                name="uncertainty.nii.gz",
                kind="uncertainty",
                title="uncertainty",
                visible=bool(st.session_state.get("uncertainty", False)),
            )
        )
    if prediction.evidence_path:
        found.append(
            Overlay(
                id=f"evidence-{prediction.id}",
                url=ctx.link("evidence", prediction.id),
                name="evidence.nii.gz",
                kind="evidence",
                title=f"evidence: {prediction.record['diagnosis']['named']}",
                colormap="viridis",
                range=(0.2, 1.0),
                visible=bool(st.session_state.get("evidence", False)),
            )
        )
    return tuple(found)


def _react(ctx: Context, case: Case, events: ViewerEvents) -> None:
    """Act on what the viewer told; each event once."""
    done = st.session_state.setdefault("handled", set())

    def new(*mark: object) -> bool:
        if mark in done:
            return False
        done.add(mark)
        return True

    if (saved := events.saved) and new("saved", saved.case_id, saved.revision, saved.sha256):
        st.toast(f"Saved as version {saved.revision}: {saved.changed_voxels} voxels changed.", icon=":material/save:")
        st.session_state.pop("conflict", None)
        if (target := st.session_state.pop("after_save", None)) is not None:
            show_case(target)
        st.rerun()
    if (conflict := events.conflict) and new("conflict", conflict.draft_id):
        st.session_state.conflict = conflict
        st.session_state.pop("after_save", None)
    if events.failed and events.failed.code != "aborted":
        st.session_state.pop("after_save", None)
        st.error(events.failed.message, icon=":material/error:")
    if not events.dirty and (target := st.session_state.pop("after_discard", None)) is not None:
        show_case(target)
        st.rerun()
    if (step := events.step) is not None:
        ids = [row.case.id for row in ctx.store.worklist()]
        place = ids.index(case.id) + step.by
        if 0 <= place < len(ids) and step.case_id == case.id:
            show_case(ids[place])
            st.rerun()
    if st.session_state.get("leaving_to"):
        _ask_about_changes()
    elif st.session_state.get("conflict"):
        panel.conflict(ctx, case, st.session_state.conflict, send)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{one}" if one in "\\`*_{}[]()#+-.!|~$:<>" else one for one in text)
