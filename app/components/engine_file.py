"""A plan as files of engines, to download, each with what its engine cannot say."""

from __future__ import annotations

import streamlit as st

from app import state
from app.components import chart
from app.left_out import told_once
from compressor.exporters import EXPORTERS, Exporter
from compressor.plan import Plan
from moescope.errors import MoescopeError

SHOWN = 8
"""Sentences about what is left out that are listed."""


def every(step: str, plan: Plan) -> None:
    """A card for each engine that is told such a step."""
    st.caption("Written from the engines' sources; none was run. What a format cannot say is listed beside it.")
    with st.grid(2, min_column_width=400, gap="small"):
        for engine in EXPORTERS:
            if engine.step == step:
                with st.container(border=True, gap="xsmall", height="stretch"):
                    show(engine, plan)


def show(engine: Exporter, plan: Plan) -> None:
    """Draw the button and its sentences, or why there is no file."""
    try:
        exported = engine.export(plan)
    except MoescopeError as error:
        st.markdown(f"**{state.plain(engine.title)}**")
        st.caption(state.plain(f"No file: {error}", 400))
        return
    st.download_button(
        engine.title, exported.content, f"{chart.file_name(engine.name)}{engine.suffix}",
        "application/octet-stream" if exported.binary is not None else "text/plain",
        key=f"export-{engine.name}", icon=":material/download:", on_click="ignore",
    )  # fmt: skip
    left_out = told_once(exported.left_out)
    lines = [*exported.notes, *(f"left out: {one}" for one in left_out[:SHOWN])]
    if len(left_out) > SHOWN:
        lines.append(f"left out: {len(left_out) - SHOWN} more; moescope export --json lists all")
    st.caption("\n".join(f"- {state.plain(line, 300)}" for line in lines))
