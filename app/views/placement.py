"""Placement: which device holds which experts, and is it worth moving them?"""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import data, state
from app.components import header, placement_charts, placement_controls, placement_export, placement_verdict
from app.components.page import render
from app.frames import placement as frames
from app.frames.placement import Placed
from moescope.errors import PlanError
from planner.placing import placeable
from store import Run


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Placement", run, what="Which device holds which experts, and is it worth moving them?")
    if run.live:
        st.info(
            "Placements rest on the whole run: they can be made when the collection ends.",
            icon=":material/hourglass_top:",
        )
        return
    try:
        placeable(run, allow_invalid=True)
    except PlanError as error:
        st.info(f"Nothing can be placed: {state.plain(str(error), 400)}", icon=":material/layers:")
        return
    asked = placement_controls.controls(run)
    found = _placed(run, asked)
    if found is None:
        return
    placement_verdict.sentence(found)
    placement_verdict.figures(found)
    placement_verdict.notes(found)
    placement_charts.every(found)
    st.subheader("Placements beside each other", anchor=False)
    placement_verdict.table(found)
    placement_verdict.slots(found)
    placement_export.section(run, found, asked)


def _placed(run: Run, asked: dict[str, Any]) -> Placed | None:
    """The placement and its scores, or the reason why there is none."""
    try:
        with st.spinner("Placing experts, and scoring them on later text"):
            found: Placed = data.made(frames.placed, run, **asked)
    except PlanError as error:
        st.warning(f"No such placement: {state.plain(str(error), 400)}", icon=":material/block:")
        return None
    return found


if __name__ == "__main__":
    render(page)
