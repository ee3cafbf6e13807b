"""A plan's widths as files of other engines, with what each of them cannot say."""

from __future__ import annotations

import streamlit as st

from app.components import engine_file
from compressor.plan import Plan, QuantizeStep


def section(plan: Plan) -> None:
    """Draw the section; nothing for plans that quantize nothing."""
    if not any(isinstance(step, QuantizeStep) for step in plan.steps):
        return
    with st.expander("Files for other engines, which quantize by themselves", icon=":material/upload_file:"):
        st.caption("Widths alone: scales are chosen by the engine, so its result is another model than ours.")
        engine_file.every("quantize", plan)
