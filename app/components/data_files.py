"""The section Files: the report, the run itself, and every figure with the command that writes it."""

from __future__ import annotations

import shlex

import polars as pl
import streamlit as st

from app import data, state
from app.components import table
from app.components.report_button import report_button
from app.frames.figures import listed
from moescope.sizes import size
from store import Run

MOST_BYTES = 200 << 20
"""The largest run file that the page hands out through the browser."""


def section(run: Run) -> None:
    """Draw the section."""
    name = shlex.quote(run.name)
    st.subheader("Report", anchor=False)
    st.caption("Provenance, findings with their evidence and every figure, in one file that opens from disk.")
    report_button(run)
    st.code(f"moescope report {name} -o report.html", language="bash")
    st.subheader("Run file", anchor=False)
    _file(run)
    st.subheader("Figures", anchor=False)
    frame = data.reference(listed).with_columns(
        pl.format("moescope figure {} {} -o {}.svg", pl.lit(name), "name", "name").alias("command")
    )
    table.show(
        frame.select("title", "page", "choices", "command"), key="figures", alt="All figures and their commands",
        columns={
            "title": table.Column("figure", "text", width=250),
            "page": table.Column("page", "text", width=90),
            "choices": table.Column(
                "choices", "text", "for --layer, --expert, --domain, --phase and --set NAME=VALUE", width=190
            ),
            "command": table.Column("command", "text", width=400),
        },
        read="The ending of the file says what is written: svg, png, pdf, html, or the data as csv, parquet, json. "
        "`moescope figure RUN --check` says which of them this run has.", height=560,
    )  # fmt: skip


def _file(run: Run) -> None:
    if run.live:
        st.caption("The run is still being collected; its file appears when it is finished.")
        return
    path = run.path
    try:
        bytes_ = path.stat().st_size
    except OSError:
        st.caption("The file is gone.")
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
        if bytes_ <= MOST_BYTES:
            st.download_button(
                f"{state.plain(path.name, 60)}, {size(bytes_)}", path.read_bytes, path.name, "application/octet-stream",
                key="run-file", icon=":material/download:", on_click="ignore",
            )  # fmt: skip
        st.caption(f"{state.code(str(path))}, {size(bytes_)}: one DuckDB file; docs/schema.md says what is in it.")
