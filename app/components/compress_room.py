"""Room to cut, before any plan: which layers do little, and which of their neurons."""

from __future__ import annotations

import streamlit as st

from app import data, state
from app.components import chart
from app.figures import room as figures
from app.frames import room as frames
from store import Run


def section(run: Run) -> None:
    """Draw the section; nothing where the run knows neither."""
    depth, width = data.frame(frames.depth, run), data.frame(frames.width, run)
    if depth.is_empty() and width.is_empty():
        return
    st.subheader("Where there is room", anchor=False)
    tokens = f"{run.info.tokens:,} tokens."
    with chart.pair():
        chart.show(
            figures.influence(depth, theme=state.theme()),
            depth,
            key="influence",
            read="Layers near the background hardly turn the residual stream: their experts can be spared first. "
            "Where domains differ, a cut that one of them does not feel may cost another.",
            rests_on=f"1 - mean cos(r, r + y), y the routed experts' sum. {tokens}",
            alt="Map of layers and domains: how far the routed experts turn the residual stream",
        )
        chart.show(
            figures.width(width, theme=state.theme()),
            width,
            key="width",
            read="Where a quarter of the neurons holds nearly all, experts can be slimmed; where it holds about a "
            "quarter, all neurons do alike.",
            rests_on=f"Sum of |a| times |w| over all experts of a layer (SparseUnifiedModel). {tokens}",
            alt="Map of layers and parts of the width: part of the width score that the strongest neurons hold",
        )
