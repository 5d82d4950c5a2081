"""Beside the viewer: structures, lesions, verdict, history, and what to do about a conflict."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import streamlit as st
from context import Context, told
from viewer import Conflict

from medseg.review import saving
from medseg.review.compare import Segmentation, legend
from medseg.review.store.models import Case, Label, Prediction
from medseg.review.store.repo import Conflict as StoredConflict
from medseg.review.structures import Measurements
from medseg.review.worklist import label_table

_VERDICTS = {"accepted": "Accept", "needs correction": "Needs correction", "rejected": "Reject"}
_HISTORY_SHOWN = 30
_FLAGS = {
    "organ_not_found": "The organ was not found.",
    "disagreement": "Class and segmentation disagree: look again.",
}


# --- structures -------------------------------------------------------------------------------------------------------


def structures(ctx: Context, case: Case, shown: Segmentation | None, found: Measurements | None) -> None:
    """Visibility, colours and measurements of the structures."""
    rows = labels_of(ctx, case, shown)
    if not rows:
        _first_table(ctx, case)
        return
    names = {row.value: row.name for row in rows}
    if st.session_state.get("structure") not in names:
        st.session_state.structure = rows[0].value
    active = st.selectbox("Structure", list(names), format_func=lambda one: names[one], key="structure")
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        st.button("All", on_click=_show_only, args=(names, None), key="show_all")
        st.button("None", on_click=_show_only, args=(names, ()), key="show_none")
        st.button(
            "Solo", on_click=_show_only, args=(names, (active,)), key="show_solo", help="Show only the structure above"
        )
        row = next(one for one in rows if one.value == active)
        picked = st.color_picker("Colour", _hex(row), key=f"colour_{case.id}_{active}", label_visibility="collapsed")
        if picked != _hex(row):
            st.session_state.setdefault("colours", {})[active] = picked
            st.rerun()
    st.slider("Opacity (%)", 0, 100, key="opacity")
    _maps(ctx, case, shown)
    _table(case, rows, found)


def labels_of(ctx: Context, case: Case, shown: Segmentation | None) -> list[Label]:
    """The label table of what is shown, in the colours that this session gave it."""
    names = dict(shown.names) if shown is not None else {}
    rows = legend(ctx.store, case.id, names) if names else ctx.store.labels(case.id)
    chosen: Mapping[int, str] = st.session_state.get("colours", {})
    for row in rows:
        if row.value in chosen:
            row.r, row.g, row.b = (int(chosen[row.value][place : place + 2], 16) for place in (1, 3, 5))
    return rows


def _table(case: Case, rows: Sequence[Label], found: Measurements | None) -> None:
    measured = {row.value: row for row in found.structures} if found else {}
    visible: Mapping[int, bool] = st.session_state.get("visible", {})
    mean = f"mean {found.unit}".strip() if found else "mean"
    cells: list[dict[str, Any]] = []
    for row in rows:
        one = measured.get(row.value)
        cells.append(
            {
                "see": visible.get(row.value, True),
                "colour": _swatch(row),
                "structure": row.name,
                "ml": one.volume_ml if one else math.nan,
                mean: one.mean if one and one.mean is not None else math.nan,
                "parts": one.components if one else None,
            }
        )
    key = f"structures_{case.id}_{st.session_state.get('visible_round', 0)}"
    st.data_editor(
        cells,
        key=key,
        hide_index=True,
        disabled=["colour", "structure", "ml", mean, "parts"],
        on_change=_seen,
        args=(key, [row.value for row in rows]),
        column_config={
            "see": st.column_config.CheckboxColumn("", width=30),
            "colour": st.column_config.ImageColumn("", width=30),
            "structure": st.column_config.TextColumn(width=112),
            "ml": st.column_config.NumberColumn(format="%.1f", width=58),
            mean: st.column_config.NumberColumn(format="%.0f", width=60),
            "parts": st.column_config.NumberColumn(width=44, help="connected pieces"),
        },
        height=min(38 + 35 * len(cells), 330),
    )


def _seen(key: str, values: Sequence[int]) -> None:
    """A box of the table was ticked or cleared."""
    visible = st.session_state.setdefault("visible", {})
    for place, change in st.session_state[key]["edited_rows"].items():
        if "see" in change:
            visible[values[int(place)]] = change["see"]


def _show_only(names: Mapping[int, str], wanted: Sequence[int] | None) -> None:
    """Show these structures, all of them for None."""
    st.session_state.visible = {value: wanted is None or value in wanted for value in names}
    st.session_state.visible_round = st.session_state.get("visible_round", 0) + 1


def _maps(ctx: Context, case: Case, shown: Segmentation | None) -> None:
    """Switches of the maps of numbers, where a model left some."""
    prediction = ctx.prediction_of(case, shown)
    if prediction is None:
        return
    with st.container(horizontal=True, gap="medium"):
        if prediction.uncertainty_path:
            st.toggle("Uncertainty", key="uncertainty", help="Entropy of the model's probabilities, 0.1 to 1")
        if prediction.evidence_path:
            named = prediction.record["diagnosis"]["named"]
            st.toggle(
                f"Evidence: {named}", key="evidence", help=f"What speaks for {named}, from 0.2 to 1: a learned map"
            )


def _first_table(ctx: Context, case: Case) -> None:
    """A case without labels: run a model, or name what is to be drawn."""
    st.info("No segmentation yet. Run a model, or name the structures that you are going to draw.")
    if not ctx.may_review:
        return
    st.page_link(st.session_state.pages["run"], label="Run a model", icon=":material/play_circle:")
    with st.form("labels", border=False):
        text = st.text_input("Structures, separated by commas", placeholder="liver, tumour")
        if st.form_submit_button("Begin to draw"):
            names = list(dict.fromkeys(" ".join(part.split()) for part in text.split(",") if part.strip()))
            if not names:
                st.error("Name at least one structure.")
            else:
                with told():
                    table = label_table(case.id, dict(enumerate(names, start=1)))
                    ctx.store.set_labels(case.id, table, by=ctx.user)
                    st.rerun()


# --- lesions ----------------------------------------------------------------------------------------------------------


def lesions(
    ctx: Context, case: Case, shown: Segmentation | None, found: Measurements | None, go: Callable[..., None]
) -> None:
    """The connected pieces; a click moves the crosshair. Above them the diagnosis, where a model made one."""
    made = ctx.prediction_of(case, shown)
    if made is not None and made.record.get("diagnosis"):
        diagnosis(made, go, corrected=shown is not None and shown.kind != "prediction" and not _as_made(ctx, shown))
        _maps(ctx, case, shown)
    if found is None or not found.lesions:
        st.info("Nothing is labelled.")
        return
    names = list(dict.fromkeys(row.name for row in found.lesions))
    wanted = st.multiselect("Structures", names, key=f"lesions_of_{case.id}", placeholder="all")
    rows = [row for row in found.lesions if not wanted or row.name in wanted]
    unsure = any(row.max_uncertainty is not None for row in rows)
    cells = [
        {
            "no.": row.number,
            "structure": row.name,
            "ml": row.volume_ml,
            "mm": row.axial_diameter_mm,
            **({"unc.": row.max_uncertainty} if unsure else {}),
            "R, A, S mm": ", ".join(f"{mm:.0f}" for mm in row.centroid_mm),
        }
        for row in rows
    ]
    key = f"lesions_{case.id}"

    def picked() -> None:
        chosen = st.session_state[key]["selection"]
        places = [*chosen["rows"], *(place for place, _ in chosen["cells"])]
        if places:
            go("goto", vox=rows[places[0]].voxel)

    st.dataframe(
        cells,
        key=key,
        hide_index=True,
        on_select=picked,
        selection_mode=["single-row", "single-cell"],
        column_config={
            "no.": st.column_config.NumberColumn(width=28),
            "structure": st.column_config.TextColumn(width=70),
            "ml": st.column_config.NumberColumn(format="%.2f", width=48),
            "mm": st.column_config.NumberColumn(format="%.1f", width=42, help="longest axial diameter"),
            "unc.": st.column_config.NumberColumn(format="%.2f", width=42, help="largest uncertainty in it"),
            "R, A, S mm": st.column_config.TextColumn(width=88, help="centre"),
        },
        height=min(38 + 35 * len(cells), 420),
    )
    st.caption("A click moves the crosshair; J and K go to the next and the one before.")


def diagnosis(made: Prediction, go: Callable[..., None], *, corrected: bool) -> None:
    """The class of the patient, with and without what is known of the patient, and the lesions that it was found on.

    Args:
        made: whose record holds a diagnosis.
        go: sends the viewer a command.
        corrected: the segmentation that is shown is not the model's own any more.
    """
    found = made.record["diagnosis"]
    named = found["named"]
    st.markdown(f"**{found['classes'][named]}** ({named}) is the most probable class.")
    st.markdown(f":small[:orange[{made.record['disclaimer']}]]")
    if corrected:
        st.caption("Of the model's own segmentation, before it was corrected.")
    st.html(_bars(found))
    for text, facts in (("Not known", found["missing"]), ("From the DICOM header", found.get("from_header"))):
        if facts:
            st.caption(f"{text}: {', '.join(facts)}.")
    for flag in found["flags"]:
        st.warning(_FLAGS[flag], icon=":material/warning:")
    if found.get("evidence") and named == next(iter(found["classes"])):
        st.caption(f"{named} has no lesion: its evidence map was not trained and shows nothing.")
    _findings(made, go)


def _bars(found: Mapping[str, Any]) -> str:
    """Two bars for each class, the most probable one first: all that is known, and without age and sex."""
    known, blind = found["probabilities"], found["probabilities_without_metadata"]
    rows = [f"<span>{text}</span><span></span>" for text in ("all that is known", "without age and sex")]
    for code in sorted(known, key=lambda code: -known[code]):
        rows.append(f"<span style='grid-column:1/-1;margin-top:4px'>{html.escape(found['classes'][code])}</span>")
        for value, colour in ((known[code], "#56b4e9"), (blind[code], "#8b95a3")):
            bar = f"<div style='width:{100 * value:.1f}%;height:8px;border-radius:2px;background:{colour}'></div>"
            rows.append(f"<div style='background:#8884;border-radius:2px'>{bar}</div>")
            rows.append(f"<span style='text-align:right'>{value:.1%}</span>")
    grid = "display:grid;grid-template-columns:1fr 46px 1fr 46px;column-gap:6px;align-items:center"
    return f"<div style='{grid};font-size:13px;line-height:1.3'>{''.join(rows)}</div>"


def _findings(made: Prediction, go: Callable[..., None]) -> None:
    """The lesions of the diagnosis, measured; a click moves the crosshair to where the model is surest."""
    rows = made.record["diagnosis"]["findings"]
    if not rows:
        st.caption("No lesion of 0.3 ml or more.")
        return
    planes = ("axial", "coronal", "sagittal")
    cells = []
    for row in rows:
        sizes = {one["plane"]: f"{one['longest_mm']:.0f} x {one['short_mm']:.0f}" for one in row["diameters"]}
        cells.append(
            {"type": row["type"], "part": row["part"], "ml": row["volume_ml"]}
            | {f"{plane} mm": sizes.get(plane, "-") for plane in planes}
            | {"prob.": row["confidence"]}
        )
    key = f"findings_{made.id}"

    def picked() -> None:
        chosen = st.session_state[key]["selection"]
        places = [*chosen["rows"], *(place for place, _ in chosen["cells"])]
        if places:
            go("goto", vox=rows[places[0]]["peak_voxel"])

    st.dataframe(
        cells,
        key=key,
        hide_index=True,
        on_select=picked,
        selection_mode=["single-row", "single-cell"],
        column_config={
            "type": st.column_config.TextColumn(width=42),
            "part": st.column_config.TextColumn(width=40),
            "ml": st.column_config.NumberColumn(format="%.1f", width=37),
            **{
                f"{plane} mm": st.column_config.TextColumn(plane, width=53, help="longest and across it, mm")
                for plane in planes
            },
            "prob.": st.column_config.NumberColumn(format="%.2f", width=40, help="highest probability of a lesion"),
        },
        height=min(38 + 35 * len(cells), 178),
    )


def _as_made(ctx: Context, shown: Segmentation) -> bool:
    """Whether a version or draft holds a model's output as it was."""
    return ctx.store.mask(shown.id).prediction_id is not None


# --- verdict ----------------------------------------------------------------------------------------------------------


def verdict(ctx: Context, case: Case, *, dirty: bool) -> None:
    """What is judged, by whom, and the verdicts so far."""
    if not case.revision:
        st.info("There is no segmentation to judge yet.")
        return
    version = ctx.store.version(case.id, case.revision)
    made = ctx.store.origin(case.id, case.revision)
    st.markdown(
        f"Version **{case.revision}**, SHA-256 `{version.sha256[:12]}`  \n"
        + (f"Model `{made.model} {made.bundle_version}`  \n" if made else "")
        + f"Image SHA-256 `{case.image_sha256[:12]}`"
    )
    if ctx.may_review:
        _sign(ctx, case, dirty=dirty)
    for review in reversed(ctx.store.reviews(case.id)):
        with st.container(border=True, gap=None):
            st.markdown(f"**{_VERDICTS[review.verdict]}** · version {review.revision}")
            st.caption(f"{review.reviewer_name}, {review.created_at:%Y-%m-%d %H:%M} UTC")
            if review.comment:
                st.text(review.comment)


def _sign(ctx: Context, case: Case, *, dirty: bool) -> None:
    turn = len(ctx.store.reviews(case.id))
    chosen = st.radio("Verdict", list(_VERDICTS), format_func=_VERDICTS.get, key=f"verdict_{case.id}_{turn}")
    comment = st.text_area(
        "Comment" if chosen == "accepted" else "Comment (needed)", key=f"comment_{case.id}_{turn}", height=90
    )
    if dirty:
        st.warning("Save or discard your changes first: a verdict stands for a saved version.")
    if st.button(f"Sign as {ctx.user.display_name}", type="primary", key="sign", disabled=dirty, width="stretch"):
        signed = ctx.store.add_review(case.id, case.revision, chosen, comment=comment, by=ctx.user)
        if isinstance(signed, StoredConflict):
            st.error(f"{signed.by} saved version {signed.theirs} meanwhile; look at it first.")
        else:
            st.toast(f"Signed: {_VERDICTS[chosen].lower()}.", icon=":material/draw:")
            st.rerun()
    if ctx.services.settings.login is None:
        st.caption("Without a login the name is not checked.")


# --- history ----------------------------------------------------------------------------------------------------------


def history(ctx: Context, case: Case, shown: Segmentation | None, *, dirty: bool) -> None:
    """Versions, drafts and predictions: look at them, compare them, bring one back."""
    if dirty:
        st.warning("Save or discard your changes to look at other versions.")
    people = {user.id: user.display_name for user in ctx.store.users()}
    looked = shown.id if shown is not None else ""
    current = ctx.store.version(case.id, case.revision).id if case.revision else ""

    def entry(one: str, text: str, caption: str, act: str, do: Callable[[], Any] | None) -> None:
        with st.container(border=True, gap=None):
            st.markdown(text + (" · :green[current]" if one == current else ""))
            st.caption(caption)
            with st.container(horizontal=True, gap="small"):
                if st.button("Shown" if one == looked else "View", key=f"view_{one}", disabled=dirty or one == looked):
                    st.session_state.shown = None if one == current else one
                    st.rerun()
                if one != current and st.button("Compare", key=f"compare_{one}", disabled=dirty or not current):
                    st.session_state.compare_pair = (current, one)
                    st.switch_page(st.session_state.pages["compare"])
                if do is not None and ctx.may_review and st.button(act, key=f"act_{one}", disabled=dirty):
                    _done(do())

    for draft in ctx.store.drafts(case.id):
        entry(
            draft.id,
            f"**Draft** on version {draft.base_revision}",
            f"{people.get(draft.author_id, '')}, {draft.created_at:%Y-%m-%d %H:%M} UTC, "
            f"{draft.changed_voxels} voxels changed",
            "Save on top",
            lambda draft=draft: saving.save_draft(ctx.store, draft.id, base_revision=case.revision, by=ctx.user),
        )
    versions = list(reversed(ctx.store.versions(case.id)))
    for version in versions[:_HISTORY_SHOWN]:
        came = ""
        if version.restored_from is not None:
            came = f", version {version.restored_from} again"
        elif version.prediction_id:
            came = ", a model's output"
        entry(
            version.id,
            f"**Version {version.revision}**",
            f"{people.get(version.author_id, '')}, {version.created_at:%Y-%m-%d %H:%M} UTC, "
            f"{version.changed_voxels} voxels changed{came}",
            "Restore",
            None
            if version.id == current
            else lambda version=version: saving.restore(
                ctx.store, case.id, version.revision, base_revision=case.revision, by=ctx.user
            ),
        )
    if len(versions) > _HISTORY_SHOWN:
        st.caption(f"The {_HISTORY_SHOWN} newest of {len(versions)} versions.")
    for made in ctx.store.predictions(case.id):
        entry(
            made.id,
            f"**{made.model}** {made.bundle_version}",
            f"{made.created_at:%Y-%m-%d %H:%M} UTC"
            + (f", {made.runtime_s:.0f} s on {made.device}" if made.runtime_s is not None else ""),
            "Make current",
            lambda made=made: saving.adopt(ctx.store, made.id, base_revision=case.revision, by=ctx.user),
        )


def _done(result: Any) -> None:
    """A version was to be made."""
    if isinstance(result, StoredConflict):
        st.error(f"{result.by} saved version {result.theirs} meanwhile; nothing was changed. Your copy is a draft.")
        return
    st.session_state.shown = None
    st.toast(f"Version {result.mask.revision} is current.", icon=":material/restore:")
    st.rerun()


# --- conflict ---------------------------------------------------------------------------------------------------------


@st.dialog("Somebody else saved first", dismissible=False)
def conflict(ctx: Context, case: Case, found: Conflict, go: Callable[..., None]) -> None:
    """Two people edited one version: nothing is lost, somebody has to choose."""
    st.write(
        f"{found.by} saved version {found.theirs} ({found.at[:16].replace('T', ' ')} UTC) while you were working on "
        f"version {found.yours}. Your drawing is kept as a draft."
    )
    if st.button("Look at theirs beside mine", key="conflict_compare", width="stretch"):
        _settle()
        st.session_state.compare_pair = (ctx.store.version(case.id, found.theirs).id, found.draft_id)
        st.switch_page(st.session_state.pages["compare"])
    if st.button("Save mine on top of theirs", key="conflict_over", width="stretch"):
        _settle()
        go("save_over", revision=found.theirs, draft_id=found.draft_id)
        st.rerun()
    if st.button("Drop mine", key="conflict_drop", width="stretch"):
        _settle()
        with told():
            ctx.store.drop_draft(found.draft_id, by=ctx.user)
        go("discard")
        st.rerun()
    if st.button("Go on drawing", key="conflict_stay", width="stretch"):
        _settle()
        st.rerun()


def _settle() -> None:
    st.session_state.pop("conflict", None)


def _hex(row: Label) -> str:
    return f"#{row.r:02x}{row.g:02x}{row.b:02x}"


def _swatch(row: Label) -> str:
    """A square of a structure's colour, as the table shows pictures."""
    square = f"<rect width='18' height='18' rx='3' fill='%23{_hex(row)[1:]}'/>"
    return f"data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg' width='18' height='18'>{square}</svg>"
