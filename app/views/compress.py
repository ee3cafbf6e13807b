"""Compress: what can be cut, what is it expected to cost, and what did it cost?"""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from app import data, state
from app.components import (
    compress_apply,
    compress_bits,
    compress_curve,
    compress_measured,
    compress_plan,
    compress_room,
    header,
)
from app.components.page import render
from app.frames import compress
from app.frames import compress_curve as curve_frames
from app.frames import compress_presets as frames
from compressor.plan import Plan
from moescope.errors import PlanError
from planner.engines import ENGINES
from planner.recommendation import Recommendation
from store import Run

GIB = 2**30
_FORMS = {
    "default": "the preset's own",
    "uniform": "all layers alike",
    "per_layer": "each layer its own",
    "shared": "the router keeps its rows",
    "padded": "padded to the largest",
    "masked": "zeroed, shapes stay",
    "packed": "packed words",
    "dense": "on grids, type stays",
}
_ENGINES = {"ours": "compressor.load too"} | {
    name: engine.title for name, engine in ENGINES.items() if name != "transformers"
}
ADVISED, PRESET = "advised", "preset"


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Compress", run, what="What can be cut, what is it expected to cost, and what did it cost?")
    if run.live:
        st.info(
            "Plans rest on the whole run: they can be made when the collection ends.", icon=":material/hourglass_top:"
        )
        return
    known = data.frame(frames.presets, run)
    here = known.filter("here")
    if here.is_empty():
        _nothing(run, known)
        return
    common = _common(run)
    advised = compress_curve.section(run, common)
    st.subheader("One plan in detail", anchor=False)
    shown = state.choose(
        "Plan", [ADVISED, PRESET] if advised else [PRESET], key="plan", segmented=True,
        words={ADVISED: "the best for the budget", PRESET: "of a preset"}.__getitem__,
    )  # fmt: skip
    asked: dict[str, Any] | None = None
    if shown == ADVISED and advised is not None:
        plan, made = _advised(run, advised, common)
    else:
        made = asked = _controls(run, known) | common
        plan = _made(run, asked)
    if plan is not None:
        _detail(run, plan, advised)
    beside = st.container()
    compress_room.section(run)
    if plan is not None:
        compress_apply.section(run, plan, made)
    compress_apply.running_jobs(run)
    compress_measured.section(run, plan)
    _missing(known)
    if asked is not None:
        with beside:  # the slowest comes last, in its place
            compress_plan.presets(run, asked)


def _advised(run: Run, found: Recommendation, common: dict[str, Any]) -> tuple[Plan | None, dict[str, Any]]:
    """The best plan of a recommendation, and the arguments that give it again, where there are any."""
    if not found.candidates:
        st.info("Nothing reaches this budget: look at plans of a preset, or allow more.", icon=":material/block:")
        return None, {}
    best = found.candidates[0]
    if not best.recipe:
        return best.plan, {}
    others = found.memory - curve_frames.budget_of(run, found)
    return best.plan, {**best.recipe, **common, **({"other_weights": others} if others > 0 else {})}


def _made(run: Run, asked: dict[str, Any]) -> Plan | None:
    try:
        return data.plan(run, **asked)
    except PlanError as error:
        st.warning(f"No such plan: {state.plain(str(error), 400)}", icon=":material/block:")
        return None


def _detail(run: Run, plan: Plan, advised: Recommendation | None) -> None:
    calibration = advised.calibration if advised is not None else None
    compress_plan.figures(run, plan, calibration=compress_bits.key_of(calibration))
    units = compress.units(plan)
    compress_plan.maps(plan, units)
    compress_bits.maps(plan)
    compress_bits.details(run, plan, calibration)
    compress_plan.tables(units)


def _common(run: Run) -> dict[str, Any]:
    """What all plans of the page share; domains as a tuple, so that it can be a key."""
    asked: dict[str, Any] = {}
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        if len(run.domains) > 1:
            domains = state.choose_some("Whose text counts", run.domains, key="domains", none="all domains")
            asked |= {"domains": tuple(domains)} if domains else {}
        engine = state.choose("Loaded by", list(_ENGINES), key="engine", words=_ENGINES.__getitem__)
        asked |= {"engine": engine} if engine != "ours" else {}
        asked["guard"] = state.choose_flag(
            "Protect super experts",
            key="guard",
            default=True,
            help="Experts whose outputs feed the massive activations; without them a model can break.",
        )
        if run.badge.status == "invalid":
            asked["allow_invalid"] = state.choose_flag("Plan all the same", key="allow-invalid", default=False)
    return asked


def _controls(run: Run, known: pl.DataFrame) -> dict[str, Any]:
    """Preset, amount and form, as ``planner.make`` takes them."""
    names = known.filter("here")["preset"].to_list()
    titles = dict(known.select("preset", "title").iter_rows())
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        preset = state.choose(
            "Preset", names, key="preset", default=frames.first_choice(names), words=titles.__getitem__
        )
        by = state.choose("By", ["share", "memory"], key="by", segmented=True)
        asked: dict[str, Any] = {"preset": preset}
        if by == "share":
            percent = state.choose_share("Share to remove", key="share", default=25)
            asked["share"] = percent / 100
        else:
            asked["memory"] = _memory(run)
        form = state.choose("Stored", list(_FORMS), key="form", words=_FORMS.__getitem__)
        asked |= {"form": form} if form != "default" else {}
    return asked


def _memory(run: Run) -> int:
    most = frames.expert_bytes(run) / GIB
    value = state.choose_size(
        "Experts may take, GiB", key="memory", low=1e-6, high=max(most, 1e-3), default=float(f"{0.75 * most:.4g}"),
        help=f"Weights of all experts, in the type that the run was recorded with; now {most:.3g} GiB. Other weights "
        "of the model come on top.",
    )  # fmt: skip
    return int(value * GIB)


def _missing(known: pl.DataFrame) -> None:
    lacking = known.filter(~pl.col("here"))
    if lacking.is_empty():
        return
    with st.expander("Presets that this run cannot give", icon=":material/layers:"):
        for row in lacking.iter_rows(named=True):
            st.markdown(f"- **{state.plain(row['title'])}**: {state.plain(row['missing'] or '', 300)}")


def _nothing(run: Run, known: pl.DataFrame) -> None:
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
