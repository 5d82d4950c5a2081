"""run."""
import streamlit as st
def render(ctx): st.write("run")
