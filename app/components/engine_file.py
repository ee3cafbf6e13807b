"""A plan as the file of one engine, to download, with what the engine cannot say."""

from __future__ import annotations

import streamlit as st

from app import state
from app.components import chart
from compressor.exporters import Exporter
from compressor.plan import Plan
from moescope.errors import MoescopeError

SHOWN = 8
"""Sentences about what is left out that are listed."""


def show(engine: Exporter, plan: Plan) -> None:
    """Draw the button and its sentences, or why there is no file."""
    try:
        exported = engine.export(plan)
    except MoescopeError as error:
        st.markdown(f"**{state.plain(engine.title)}**: {state.plain(str(error), 400)}")
        return
    st.download_button(
        engine.title, exported.content, f"{chart.file_name(engine.name)}{engine.suffix}",
        "application/octet-stream" if exported.binary is not None else "text/plain",
        key=f"export-{engine.name}", icon=":material/download:", on_click="ignore",
    )  # fmt: skip
    lines = [*exported.notes, *(f"left out: {one}" for one in exported.left_out[:SHOWN])]
    if len(exported.left_out) > SHOWN:
        lines.append(f"left out: {len(exported.left_out) - SHOWN} more; moescope export --json lists all")
    st.caption("\n".join(f"- {state.plain(line, 300)}" for line in lines))
