"""Compress: what can be cut, what is it expected to cost, and what did it cost?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl
import streamlit as st

from app import data, state
from app.components import (
    compress_apply,
    compress_bits,
    compress_controls,
    compress_curve,
    compress_measured,
    compress_plan,
    compress_room,
    header,
)
from app.components.page import render
from app.components.sections import sections
from app.frames import compress_curve as curve_frames
from app.frames import compress_presets as frames
from compressor.plan import Plan
from moescope.errors import PlanError
from planner.recommendation import Candidate, Recommendation
from store import Run


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Compress", run, what="What can be cut, what is it expected to cost, and what did it cost?")
    if run.live:
        st.info(
            "Plans rest on the whole run: they can be made when the collection ends.", icon=":material/hourglass_top:"
        )
        return
    known = data.frame(frames.presets, run)
    if known.filter("here").is_empty():
        _nothing(known)
        return
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        kind = compress_controls.kind()
        asked_for = compress_curve.budget(run)
    common = compress_controls.common(run)
    advised = kind == compress_controls.ADVISED and compress_curve.wanted(run)
    found = compress_curve.advice(run, asked_for, common) if advised else None
    if found is not None:
        plan, made, best = _advised(run, found, common)
        compress_curve.verdict(found)
    else:
        made, best = compress_controls.preset(run, known) | common, None
        plan = _made(run, made)
    calibration = asked_for.calibration if found is None else compress_bits.key_of(found.calibration)
    if plan is not None:
        if found is None:
            words = state.plain(curve_frames.mixture(plan), 200)
            st.markdown(f"**{words[0].upper()}{words[1:]}**")
        compress_plan.figures(run, plan, calibration=calibration, candidate=best)
    refused = found is None and kind == compress_controls.ADVISED  # and the reason stands above
    _sections(run, known, plan, made, found, None if refused else asked_for, common, calibration)
    compress_apply.running_jobs(run)


def _sections(
    run: Run,
    known: pl.DataFrame,
    plan: Plan | None,
    made: dict[str, Any],
    found: Recommendation | None,
    asked_for: compress_curve.Budget | None,
    common: dict[str, Any],
    calibration: str,
) -> None:
    drawers: dict[str, Callable[[], None]] = {}
    if asked_for is not None:
        drawers["Size and cost"] = lambda: _size_and_cost(run, found, asked_for, common)
    if plan is not None:
        drawers["Plan"] = lambda: _plan(run, plan, calibration)
    drawers |= {
        "Presets": lambda: _presets(run, known, _sized(run, made, found, common)),
        "Room": lambda: compress_room.section(run),
    }
    if plan is not None:
        drawers["Apply"] = lambda: compress_apply.section(run, plan, made)
    drawers["Measured"] = lambda: compress_measured.section(run, plan)
    sections(drawers)


def _size_and_cost(
    run: Run, found: Recommendation | None, asked_for: compress_curve.Budget, common: dict[str, Any]
) -> None:
    if found is None and not compress_curve.wanted(run):
        return
    advised = compress_curve.advice(run, asked_for, common) if found is None else found
    if advised is not None:
        compress_curve.section(run, advised, asked_for, common)


def _advised(
    run: Run, found: Recommendation, common: dict[str, Any]
) -> tuple[Plan | None, dict[str, Any], Candidate | None]:
    """The best plan of a recommendation, and the arguments that give it again, where there are any."""
    if not found.candidates:
        return None, {}, None
    best = found.candidates[0]
    if not best.recipe:
        return best.plan, {}, best
    others = found.memory - curve_frames.budget_of(run, found)
    return best.plan, {**best.recipe, **common, **({"other_weights": others} if others > 0 else {})}, best


def _made(run: Run, asked: dict[str, Any]) -> Plan | None:
    try:
        return data.plan(run, **asked)
    except PlanError as error:
        st.warning(f"No such plan: {state.plain(str(error), 400)}", icon=":material/block:")
        return None


def _plan(run: Run, plan: Plan, calibration: str) -> None:
    compress_plan.section(run, plan)
    compress_bits.maps(run, plan)
    compress_bits.details(run, plan, calibration=calibration)
    compress_plan.tables(run, plan)
    compress_plan.rests_on(plan)


def _sized(run: Run, made: dict[str, Any], found: Recommendation | None, common: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a plan of the same size that every preset takes."""
    if found is None:
        return made
    preset = {"preset": made["preset"]} if "preset" in made else {}
    return preset | {"memory": curve_frames.budget_of(run, found)} | common


def _presets(run: Run, known: pl.DataFrame, made: dict[str, Any]) -> None:
    """Presets at the size of the plan that is shown; arguments that only its own preset takes are left out."""
    asked = {name: value for name, value in made.items() if name in compress_controls.SHARED}
    names = known.filter("here")["preset"].to_list()
    compress_plan.presets(run, asked | {"preset": made.get("preset", frames.first_choice(names))})
    _missing(known)


def _missing(known: pl.DataFrame) -> None:
    lacking = known.filter(~pl.col("here"))
    if lacking.is_empty():
        return
    with st.expander("Presets that this run cannot give", icon=":material/layers:"):
        for row in lacking.iter_rows(named=True):
            st.markdown(f"- **{state.plain(row['title'])}**: {state.plain(row['missing'] or '', 300)}")


def _nothing(known: pl.DataFrame) -> None:
    """An empty state with the reason."""
    reasons = known["missing"].drop_nulls().unique(maintain_order=True).to_list()
    st.info(
        f"No plan can be made of this run: {state.plain(reasons[0] if reasons else 'it has no MoE layer', 400)}",
        icon=":material/layers:",
    )
    if len(reasons) > 1:
        _missing(known)


if __name__ == "__main__":
    render(page)
