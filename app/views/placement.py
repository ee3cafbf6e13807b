"""Placement: which device holds which experts, and is it worth moving them?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from app import data, state
from app.components import (
    chart,
    header,
    placement_charts,
    placement_controls,
    placement_export,
    placement_verdict,
)
from app.components.page import render
from app.components.sections import sections
from app.exhibits import placement as exhibits
from app.exhibits.exhibit import Absent
from app.frames import placement as frames
from app.frames.placement import Placed
from moescope.errors import PlanError
from store import Run


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Placement", run, what="Which device holds which experts, and is it worth moving them?")
    try:
        exhibits.require_placeable(run)
    except Absent as missing:
        chart.absent(missing)
        return
    chosen = placement_controls.controls(run)
    asked = exhibits.asked(run, **chosen)
    found = _placed(run, asked)
    if found is None:
        return
    placement_verdict.sentence(found)
    placement_verdict.figures(found)
    _sections(run, found, chosen, asked)
    placement_verdict.notes(found)


def _sections(run: Run, found: Placed, chosen: dict[str, Any], asked: dict[str, Any]) -> None:
    drawers: dict[str, Callable[[], None]] = {
        "Balance": lambda: placement_charts.balance(run, found, chosen),
        "Devices": lambda: placement_charts.devices(run, found, chosen),
        "Side by side": lambda: _beside(run, found, chosen),
    }
    if found.verdict is not None:
        drawers["Traffic"] = lambda: placement_charts.traffic(run, found, chosen)
    drawers |= {
        "Moving": lambda: _moving(run, found, chosen),
        "Files": lambda: placement_export.section(run, found, asked),
    }
    sections(drawers)


def _beside(run: Run, found: Placed, chosen: dict[str, Any]) -> None:
    placement_verdict.table(found)
    if found.verdict is not None:
        placement_charts.domains(run, chosen)


def _moving(run: Run, found: Placed, chosen: dict[str, Any]) -> None:
    placement_charts.movement(run, chosen)
    placement_verdict.slots(found)


def _placed(run: Run, asked: dict[str, Any]) -> Placed | None:
    """The placement and its scores, or the reason why there is none."""
    try:
        with st.spinner("Placing experts, and scoring them on later text"):
            return data.frame(frames.placed, run, **asked)
    except PlanError as error:
        st.warning(f"No such placement: {state.plain(str(error), 400)}", icon=":material/block:")
        return None


if __name__ == "__main__":
    render(page)
