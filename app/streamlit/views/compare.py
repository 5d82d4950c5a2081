"""Compare: two label maps of one case, side by side or as their difference, with Dice and volumes."""

from __future__ import annotations

import streamlit as st
from context import Context, case_names, distinct, open_case, show_case, told
from viewer import Compare, Label, Mask, ViewerSpec, viewer

from medseg.review.compare import (
    BOTH,
    ONLY_FIRST,
    ONLY_SECOND,
    OTHER_LABEL,
    Segmentation,
    legend,
    overlaps,
    read_segmentation,
    segmentations,
)
from medseg.review.store.models import Case
from views.review import image_of

PANEL_WIDTH = 380
_DIFFERENCE = (
    (ONLY_FIRST, "A only", (230, 159, 0)),
    (ONLY_SECOND, "B only", (86, 180, 233)),
    (BOTH, "both alike", (0, 158, 115)),
    (OTHER_LABEL, "labelled differently", (213, 94, 0)),
)


def render(ctx: Context) -> None:
    """The page."""
    rows = ctx.store.worklist()
    if not rows:
        st.info("No case yet.")
        return
    names = case_names(rows)
    ids = list(names)
    if open_case() not in ids:
        show_case(ids[0])
    with st.container(horizontal=True):
        case_id = st.selectbox(
            "Case", ids, index=ids.index(str(open_case())), format_func=lambda one: names[one], key="compare_case"
        )
        if case_id != open_case():
            show_case(case_id)
            st.rerun()
        case = ctx.store.case(case_id)
        found = {one.id: one for one in segmentations(ctx.store, case_id)}
        if len(found) < 2:
            st.info("This case has fewer than two segmentations: run another model, or save a version.")
            return
        first, second = _pair(case_id, found)
    view = st.segmented_control(
        "View", ["Side by side", "Difference"], default="Side by side", required=True, key="compare_view"
    )
    with st.container(horizontal=True, wrap=False, gap="small"):
        left, right = st.container(width="stretch"), st.container(width=PANEL_WIDTH)
    with right, told():
        value = _table(ctx, case, first, second)
    with left, told():
        viewer(_spec(ctx, case, first, second, value if view == "Difference" else None, view), key="compare_viewer")


def _pair(case_id: str, found: dict[str, Segmentation]) -> tuple[Segmentation, Segmentation]:
    """Which two; those that the review page asked for, or the two newest."""
    asked = st.session_state.pop("compare_pair", None)
    ids = list(found)
    titles = distinct((one.id, one.title) for one in found.values())
    for place, side in enumerate("AB"):
        key = f"compare_{side}_{case_id}"
        if asked is not None and asked[place] in found:
            st.session_state[key] = asked[place]
        elif st.session_state.get(key) not in found:
            st.session_state[key] = ids[place]
    first, second = (
        found[st.selectbox(side, ids, format_func=lambda one: titles[one], key=f"compare_{side}_{case_id}")]
        for side in "AB"
    )
    return first, second


def _table(ctx: Context, case: Case, first: Segmentation, second: Segmentation) -> int | None:
    """Dice and volumes; the label whose line was clicked."""
    with st.spinner("Comparing"):
        rows = overlaps(ctx.store, case.id, first.id, second.id)
    cells = [
        {
            "structure": row.name,
            "Dice": row.dice,
            "A ml": row.first_ml,
            "B ml": row.second_ml,
            "diff. %": row.difference_percent,
        }
        for row in rows
    ]
    picked = st.dataframe(
        cells,
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key=f"overlaps_{first.id}_{second.id}",
        column_config={
            "structure": st.column_config.TextColumn(width=110),
            "Dice": st.column_config.NumberColumn(format="%.3f", width=55),
            "A ml": st.column_config.NumberColumn(format="%.1f", width=55),
            "B ml": st.column_config.NumberColumn(format="%.1f", width=55),
            "diff. %": st.column_config.NumberColumn(format="%.1f", width=55, help="of B's volume"),
        },
        height=min(38 + 35 * len(cells), 480),
    )
    st.caption("Tick a structure to see the difference of this one alone.")
    places = picked["selection"]["rows"]
    return rows[places[0]].value if places and places[0] < len(rows) else None


def _spec(
    ctx: Context, case: Case, first: Segmentation, second: Segmentation, value: int | None, view: str | None
) -> ViewerSpec:
    common = {
        "case_id": case.id,
        "image": image_of(ctx, case),
        "modality": "CT" if case.modality == "CT" else "MR",
        "height": "calc(100vh - 250px)",
        "test": ctx.services.settings.test,
    }
    if view == "Difference":
        place = "" if value is None else str(value)
        mask = Mask(
            url=ctx.link("difference", case.id, first.id, second.id, place),
            name="difference.nii.gz",
            revision=0,
            source=f"difference {first.id} {second.id} {place}",
            title="difference of A and B",
        )
        labels = tuple(Label(value=number, name=name, rgb=rgb) for number, name, rgb in _DIFFERENCE)
        return ViewerSpec(mask=mask, labels=labels, layout="mpr", **common)
    tables = [read_segmentation(ctx.store, one)[1] for one in (first, second)]
    rows = {row.screen_value: row for table in tables for row in legend(ctx.store, case.id, table)}
    masks = [
        Mask(
            url=ctx.link("labels", case.id, one.id),
            name="labels.nii.gz",
            revision=0,
            source=one.id,
            title=f"{side}: {one.title}",
        )
        for side, one in zip("AB", (first, second), strict=True)
    ]
    return ViewerSpec(
        compare=Compare(first=masks[0], second=masks[1]),
        labels=tuple(
            Label(value=shown, name=row.name, rgb=(row.r, row.g, row.b)) for shown, row in sorted(rows.items())
        ),
        layout="compare",
        **common,
    )
