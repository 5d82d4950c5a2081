"""The page's script: who is there, which view is shown. Everything else is in the views and in medseg.review."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import streamlit as st
from context import COOKIE, Context, log_out, open_case, show_case
from views import audit, compare, review, run, settings, worklist

from medseg.errors import InputError
from medseg.review.server import Services, services
from medseg.review.settings import Login
from medseg.review.signing import login_of
from medseg.review.store.models import User
from medseg.review.store.repo import BANNER

MONTH_S = 30 * 86400

STYLE = f"""<style>
/* A message lies over the tabs for some seconds: clicks go through it. */
[data-testid="stToastContainer"], [data-testid="stToastContainer"] * {{pointer-events: none !important}}
[data-testid="stMainBlockContainer"] {{padding: 3.4rem 1rem 2.2rem 1rem; max-width: none}}
[data-testid="stSidebar"] {{width: 280px !important; min-width: 280px !important}}
[data-testid="stSidebar"][aria-expanded="false"] {{width: 0 !important; min-width: 0 !important}}
[data-testid="stSidebarUserContent"] {{padding-top: 0; padding-bottom: 3rem}}
[data-testid="stVerticalBlock"] {{gap: .6rem}}
.st-key-panel_column {{
  max-height: calc(100vh - 108px) !important; overflow-y: auto; overflow-x: hidden; flex-shrink: 0;
}}
body::after {{
  content: "{BANNER}"; position: fixed; z-index: 1000000; left: 0; right: 0; bottom: 0; height: 22px;
  background: #3a2f0b; color: #ffe9a8; font: 12px/22px "Source Sans", sans-serif; text-align: center;
}}
</style>"""

_REMEMBER = """
export default function (c) {
  document.cookie = `${c.data.name}=${c.data.value}; path=/; max-age=${c.data.age}; SameSite=Strict`
}
"""


def _somebody(found: Services) -> User | None:
    """Who is there; None when somebody has to say so first, or may not come in."""
    if found.settings.login is not None:
        claims = _claims(found)
        role = found.settings.login.role(claims)
        if role is None:
            return None
        subject = f"{claims['iss']}|{claims['sub']}"
        if st.session_state.get("subject") != subject:
            name = str(claims.get("name") or claims.get("email") or claims["sub"])
            st.session_state.user_id = found.store.sign_in(subject, name, role=role).id
            st.session_state.subject = subject
        return found.store.user(st.session_state.user_id)
    known = st.session_state.get("user_id") or ("" if "nobody" in st.session_state else st.context.cookies.get(COOKIE))
    try:
        user = found.store.user(str(known or ""))
    except InputError:
        return None
    if not user.subject.startswith("local:"):
        return None
    st.session_state.user_id = user.id
    return user


def _ask(found: Services) -> None:
    """The page for somebody who is not known yet."""
    st.title("medseg review")
    st.info(BANNER)
    if found.settings.login is not None:
        _ask_to_log_in(found, found.settings.login)
        return
    if "nobody" in st.session_state:
        _remember("", 0)
    with st.form("who", width=420):
        name = " ".join(st.text_input("Your name", max_chars=80, help="It stands on every verdict you sign.").split())
        st.caption("This page has no login: the name is not checked.")
        if st.form_submit_button("Begin", type="primary"):
            if re.search(r"\w", name):
                st.session_state.user_id = found.store.sign_in(f"local:{name.casefold()}", name).id
                st.rerun()
            st.error("Write your name.")


def _claims(found: Services) -> dict[str, Any]:
    """What the provider says of whoever has logged in; a tab may not know yet that another one has logged out."""
    if not st.user.is_logged_in or found.signer.ended(login_of(st.context.cookies)):
        return {}
    return dict(st.user.to_dict())


def _ask_to_log_in(found: Services, login: Login) -> None:
    if claims := _claims(found):
        st.error("You are logged in, but you have no role on this page.")
        st.write("Whoever runs the page can give you one: this is how it has to name you.")
        address = str(claims.get("email")) if claims.get("email_verified") is True else ""
        st.code("\n".join(filter(None, (str(claims.get("sub", "")), address))), language=None)
        st.button("Log out", on_click=log_out, args=(found,), key="log_out")
        return
    here = urlsplit(st.context.url or "")
    if here.netloc and f"{here.scheme}://{here.netloc}" != login.address:  # the provider sends browsers back there
        st.link_button(f"Log in at {login.address}", login.address, type="primary")
        return
    st.button("Log in", type="primary", on_click=st.login, key="log_in")


def _remember(user_id: str, age: int) -> None:
    """Keep in this browser who is there, for so many seconds."""
    component = st.components.v2.component("medseg_remember", html="<span></span>", js=_REMEMBER)
    component(key="remember", data={"name": COOKIE, "value": user_id, "age": age})


def _main() -> None:
    st.set_page_config(page_title="medseg review", page_icon="🩻", layout="wide")
    st.html(STYLE)
    found = services()
    user = _somebody(found)
    if user is None:
        _ask(found)
        return
    if found.settings.login is None and st.context.cookies.get(COOKIE) != user.id:
        _remember(user.id, MONTH_S)
    if open_case() is None and (wanted := st.query_params.get("case")):
        show_case(wanted)
    ctx = Context(found, user)
    pages = {
        view.__name__.rpartition(".")[2]: st.Page(
            lambda view=view: view.render(ctx),
            title=title,
            icon=icon,
            url_path=view.__name__.rpartition(".")[2],
            default=view is worklist,
        )
        for view, title, icon in (
            (worklist, "Worklist", ":material/list:"),
            (review, "Review", ":material/visibility:"),
            (compare, "Compare", ":material/compare:"),
            (run, "Run", ":material/play_circle:"),
            (audit, "Audit trail", ":material/history:"),
            (settings, "Settings", ":material/settings:"),
        )
    }
    st.session_state.pages = pages
    st.navigation(list(pages.values()), position="top").run()


_main()
