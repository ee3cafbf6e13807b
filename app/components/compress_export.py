"""A plan's widths as files of other engines, with what each of them cannot say."""

from __future__ import annotations

import streamlit as st

from app import state
from app.components import chart
from compressor.exporters import EXPORTERS
from compressor.plan import Plan, QuantizeStep
from moescope.errors import MoescopeError

SHOWN = 10
"""Sentences about what is left out that are listed."""


def section(plan: Plan) -> None:
    """Draw the section; nothing for plans that quantize nothing."""
    if not any(isinstance(step, QuantizeStep) for step in plan.steps):
        return
    with st.expander("Files for other engines, which quantize by themselves", icon=":material/upload_file:"):
        st.caption("Widths alone: scales are chosen by the engine, so its result is another model than ours.")
        for engine in EXPORTERS:
            if engine.step != "quantize":
                continue
            try:
                exported = engine.export(plan)
            except MoescopeError as error:
                st.markdown(f"- **{state.plain(engine.title)}**: {state.plain(str(error), 400)}")
                continue
            st.download_button(
                engine.title, exported.text, f"{chart.file_name(engine.name)}{engine.suffix}", "text/plain",
                key=f"export-{engine.name}", icon=":material/download:", on_click="ignore",
            )  # fmt: skip
            lines = [*exported.notes, *(f"left out: {one}" for one in exported.left_out[:SHOWN])]
            if len(exported.left_out) > SHOWN:
                lines.append(f"left out: {len(exported.left_out) - SHOWN} more; moescope export --json lists all")
            st.caption("\n".join(f"- {state.plain(line, 300)}" for line in lines))
