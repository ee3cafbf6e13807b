"""The studies of caching that lie beside a run: ``moescope cache`` keeps each of its answers there."""

from __future__ import annotations

import streamlit as st

from app.components import table
from app.components.table import Column
from app.frames import caching_kept as frames
from store import Run

_COLUMNS = {
    "answer": Column("answer", "text", width="large"),
    "machine": Column("machine", "text"),
    "memory": Column("device memory", "bytes"),
    "slots": Column("experts on it", "count"),
    "way": Column("fastest way", "text"),
    "ms": Column("ms per token"),
    "bound": Column("bound, ms"),
    "asked": Column("asked", "text"),
    "file": Column("file", "text"),
}


def section(run: Run) -> None:
    """Draw the table; nothing where no study was kept."""
    found = frames.kept(run)
    if found.is_empty():
        return
    st.subheader("Studies beside this run", anchor=False)
    table.show(
        found, key="cache-kept", columns=_COLUMNS, alt="Every study that was kept: answer, machine, memory, time",
        read="What `moescope cache` found and kept, the newest first.",
    )  # fmt: skip
