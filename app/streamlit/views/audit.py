"""Audit trail: who did what, and whether every line follows from the one before."""

from __future__ import annotations

from collections import deque

import streamlit as st
from context import Context, case_names

LINES_SHOWN = 500


def render(ctx: Context) -> None:
    """The page."""
    st.subheader("Audit trail", anchor=False)
    rows = ctx.store.worklist()
    names = case_names(rows)
    people = {user.id: user for user in ctx.store.users()}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        case_id = st.selectbox(
            "Case", ["", *names], format_func=lambda one: names.get(one, "all"), key="audit_case", width="stretch"
        )
        if st.button("Check", icon=":material/verified:", key="audit_check"):
            st.session_state.audit_checked = ctx.store.check_trail()
        if ctx.may_review:
            st.download_button(
                "Export",
                lambda: _exported(ctx),
                file_name="audit_trail.jsonl",
                mime="application/jsonl",
                icon=":material/download:",
                key="audit_export",
                on_click="ignore",
            )
    if found := st.session_state.get("audit_checked"):
        if found.broken_at is None:
            st.success(f"{found.lines} lines, each follows from the one before. Last hash: `{found.head[:16]}`")
        else:
            st.error(f"Line {found.broken_at} of {found.lines} does not follow from those before it.")
    lines = deque(ctx.store.trail(case_id=case_id or None), maxlen=LINES_SHOWN)
    st.dataframe(
        [
            {
                "no.": line.id,
                "time (UTC)": line.at[:19].replace("T", " "),
                "who": people[line.user_id].display_name if line.user_id in people else line.user_id,
                "what": line.action.replace("_", " "),
                "case": names.get(line.case_id or "", ""),
                "version": line.revision,
                "detail": line.detail,
                "as": people[line.user_id].subject if line.user_id in people else "",
                "hash": line.hash[:12],
            }
            for line in reversed(lines)
        ],
        hide_index=True,
        column_config={"detail": st.column_config.TextColumn(width="large")},
        height=min(38 + 35 * len(lines), 520),
    )
    st.caption(f"The newest {len(lines)} lines; the export holds all of them, with what their hashes cover.")


def _exported(ctx: Context) -> str:
    ctx.store.note(ctx.user, "exported", detail={"kind": "audit trail"})
    return "".join(ctx.store.export_trail())
