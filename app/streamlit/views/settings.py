"""Settings: who is there, what they may do, and what this installation is."""

from __future__ import annotations

from typing import get_args

import streamlit as st
from context import Context, log_out, told

import medseg
from medseg.review.store.models import Role
from medseg.review.store.repo import BANNER

_MAY = {
    "reader": "sees everything, changes nothing",
    "reviewer": "also saves, signs, uploads, runs and exports",
    "admin": "also gives roles, and cancels or drops what belongs to others",
}


def render(ctx: Context) -> None:
    """The page."""
    st.subheader("Settings", anchor=False)
    with st.container(border=True):
        st.markdown(f"**{ctx.user.display_name}** · {ctx.user.role}: {_MAY[ctx.user.role]}")
        if ctx.services.settings.login is not None:
            st.button("Log out", on_click=log_out, args=(ctx.services,), key="log_out")
        else:
            st.caption("This page has no login: the name is not checked. It is kept in this browser for a month.")
            if st.button("I am somebody else", key="log_out"):
                st.session_state.clear()
                st.session_state.nobody = True
                st.rerun()
    if ctx.user.role == "admin":
        _people(ctx)
    settings = ctx.services.settings
    with st.container(border=True):
        st.markdown("**Installation**")
        engine = ctx.store.engine.dialect.name
        st.markdown(
            f"medseg {medseg.__version__} · {'PostgreSQL' if engine == 'postgresql' else 'SQLite'} · "
            f"uploads up to {settings.upload_mb} MB · "
            + ("login by OpenID Connect" if settings.login else "no login, this machine only")
        )
        st.caption(BANNER)


def _people(ctx: Context) -> None:
    with st.container(border=True):
        st.markdown("**People**")
        for user in ctx.store.users():
            if user.subject.startswith("medseg:"):
                continue
            with st.container(horizontal=True, vertical_alignment="center"):
                st.text(user.display_name, width="stretch")
                roles = list(get_args(Role))
                role = st.selectbox(
                    "Role",
                    roles,
                    index=roles.index(user.role),
                    key=f"role_{user.id}",
                    width=150,
                    label_visibility="collapsed",
                    disabled=user.id == ctx.user.id,
                )
                if role != user.role:
                    with told():
                        ctx.store.set_role(user.id, role, by=ctx.user)
                        st.rerun()
