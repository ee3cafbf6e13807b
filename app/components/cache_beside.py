"""What else is published, on demand: it takes some seconds more."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import data, state
from app.components import table
from app.components.table import Column
from app.frames import caching_beside as frames
from store import Run

_COLUMNS = {
    **{
        name: Column(name, "share")
        for name in (
            "hit rate", "steps that wait", "recall", "chance", "precision", "steps whole", "of what LRU lacks"
        )
    },
    "policy": Column("policy", "text", width=250),
    "foreseen by": Column("foreseen by", "text", width=230),
    "sequences": Column("sequences", "text", width=250),
    "experts read per token and layer": Column("experts read", help="per token and layer"),
    "ms per token, loaded": Column("ms per token", help="where missing experts are loaded"),
    "of which wasted": Column("of which wasted, MB"),
}  # fmt: skip


def section(run: Run, asked: dict[str, Any]) -> None:
    """Draw the section. asked: of :func:`app.frames.caching.answer`."""
    st.caption("Policies, prefetchers, batches and bit planes as published, replayed on this trace with this memory.")
    if not state.choose_flag("Replay them too", key="replayed", default=False, help="Some seconds more"):
        return
    with st.spinner("Replaying published policies"):
        found = data.frame(frames.compared, run, **asked)
    for name, title, frame, read in (
        ("policies", "Policies", frames.policies(found), "Which expert makes room, with the slots of this memory. "
         "Below the line of those that know the future no engine can be; their distance is what a better policy could "
         "win."),
        ("foreseen", "Experts foreseen", frames.foreseen(found), "Which experts come next, one layer ahead, as many as "
         "a token uses. Only what an LRU cache lacks can be saved; what is wasted delays what is needed. Drawn: true "
         "routes with as many mistakes as were recorded or are named."),
        ("outlook", "Forecasts", frames.outlook(found), "Hit rates of text yet to come, forecast from the requests for "
         "fitting; came: what the requests for judging gave."),
        ("batches", "Batches", frames.batches(found), "What runs together. All know the true routes, which flatters "
         "them; the fewer experts a token reads, the fewer loads."),
        ("planes", "Bit planes", frames.planes(found), "Nested widths of 2, 3 and 4 bits, loaded plane by plane on an "
         "empty device. Where the link decides, no order of loads gains much."),
    ):  # fmt: skip
        if frame.is_empty():
            continue
        st.markdown(f"**{title}**")
        table.show(frame, key=f"beside-{name}", columns=_COLUMNS, alt=f"{title} beside each other", read=read)
