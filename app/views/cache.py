"""Cache: does caching experts pay on a machine, with how much memory, and how fast will it be?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from app import data, state
from app.components import (
    cache_beside,
    cache_charts,
    cache_controls,
    cache_export,
    cache_kept,
    cache_token,
    cache_verdict,
    chart,
    header,
)
from app.components.page import render
from app.components.sections import sections
from app.exhibits import caching
from app.exhibits.exhibit import Absent
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
    try:
        caching.require_order(run)
    except Absent as missing:
        chart.absent(missing)
        return
    try:
        chosen = cache_controls.controls(run)
        if chosen is None:
            return
        asked = caching.asked(run, frames=data.frame, **chosen)
        with st.spinner("Replaying caches and timing them: some seconds"):
            found = data.frame(frames.answer, run, **asked)
    except PlanError as error:
        st.warning(f"No answer for this choice: {state.plain(str(error), 500)}", icon=":material/block:")
        return
    _draw(run, found, chosen, asked)


def _draw(run: Run, found: Study, chosen: dict[str, Any], asked: dict[str, Any]) -> None:
    cache_verdict.card(found)
    cache_verdict.metrics(found)
    drawers: dict[str, Callable[[], None]] = {
        "Speed": lambda: cache_charts.speed(run, found, chosen),
        "Hit rates": lambda: cache_charts.hits(run, chosen),
    }
    if len(found.domains) > 1:
        drawers["Domains"] = lambda: cache_charts.domains(run, chosen)
    drawers |= {
        "One token": lambda: cache_token.section(run, found, asked),
        "Published ways": lambda: cache_beside.section(run, asked),
        "Plan and files": lambda: _plan(run, found, asked),
    }
    sections(drawers)
    cache_verdict.notes(found)


def _plan(run: Run, found: Study, asked: dict[str, Any]) -> None:
    cache_export.section(run, found, asked)
    cache_kept.section(run)


if __name__ == "__main__":
    render(page)
