"""compare."""
import streamlit as st
def render(ctx): st.write("compare")
