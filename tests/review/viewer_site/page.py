"""A page with nothing but the viewer: the spec comes from a file, and what the viewer tells goes to another one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import streamlit as st

sys.path.insert(0, str(Path(__file__).parents[3] / "app" / "streamlit"))

from viewer import ViewerSpec, viewer

FOLDER = Path(os.environ["VIEWER_SITE"])

st.set_page_config(layout="wide")
st.html("<style>.block-container{padding:3.5rem .5rem 0}header{opacity:.2}</style>")
st.button("Run again")
events = viewer(ViewerSpec.model_validate_json((FOLDER / "spec.json").read_text()), key="viewer")
with (FOLDER / "events.jsonl").open("a") as file:
    told = events.model_dump(mode="json", exclude_none=True)
    file.write(json.dumps(told) + "\n")
