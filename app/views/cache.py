"""Cache: does caching experts pay on a machine, with how much memory, and how fast will it be?"""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import data, state
from app.components import cache_beside, cache_charts, cache_controls, cache_export, cache_token, cache_verdict, header
from app.components.page import render
from app.frames import caching as frames
from moescope.errors import PlanError
from planner.cache.study import Study
from store import Run


def page(run: Run) -> None:
    """Draw the page."""
    header.title(
        "Cache",
        run,
        what="Will it run on my machine: does caching experts pay, with how much memory, and how fast?",
    )
    if run.live:
        st.info(
            "Caches are replayed on the whole trace: this can be answered when the collection ends.",
            icon=":material/hourglass_top:",
        )
        return
    if header.omitted("What a cache would do", run, "trace", "order"):
        return
    try:
        asked = cache_controls.controls(run)
        if asked is None:
            return
        with st.spinner("Replaying caches and timing them: some seconds"):
            found: Study = data.made(frames.answer, run, **asked)
    except PlanError as error:
        st.warning(f"No answer for this choice: {state.plain(str(error), 500)}", icon=":material/block:")
        return
    _draw(run, found, asked)


def _draw(run: Run, found: Study, asked: dict[str, Any]) -> None:
    cache_verdict.card(found)
    cache_verdict.metrics(found)
    cache_verdict.notes(found)
    cache_charts.times(found)
    cache_charts.ways(found)
    st.subheader("Where hits come from", anchor=False)
    cache_charts.hits(found)
    cache_charts.domains(found)
    cache_token.section(run, found, asked)
    cache_beside.section(run, asked)
    cache_export.section(run, found, asked)


if __name__ == "__main__":
    render(page)
