"""Size against predicted cost, a budget on it, and what is advised for that budget."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, compress_search
from app.figures import compress_curve as figures
from app.frames import compress_curve as frames
from app.frames import compress_presets
from app.text import size
from moescope.errors import PlanError, StoreError
from planner.recommendation import Candidate, Recommendation
from store import Run

_number = st.column_config.NumberColumn
_LOOKS = {
    "apply": ("Apply", "green", ":material/check_circle:"),
    "with care": ("With care", "orange", ":material/warning:"),
    "leave it": ("Leave it", "red", ":material/block:"),
}
HERE = "this budget"
"""The advice for the slider's budget: one that was kept for it, else a first look."""


def section(run: Run, asked: dict[str, Any]) -> Recommendation | None:
    """Draw the section.

    Args:
        run: a finished run.
        asked: domains, guard, engine and allow_invalid, as ``planner.make`` takes them.

    Returns:
        what is advised for the budget; None where nothing can be.
    """
    st.subheader("Size against cost", anchor=False)
    whole = compress_presets.expert_bytes(run)
    kept = data.made(frames.recommended, run, files=frames.files(run, "recommendation"))
    asked_for, source = _budget(run, whole, kept)
    drawn, advised = st.container(), st.container()
    try:
        with st.spinner("Pricing plans from the run's sums"):
            priced = {**asked, "calibration": frames.measured_factors(kept)}
            tried = data.made(frames.first_look, run, **priced)
            found = _advice(run, kept, source, asked_for, priced)
    except PlanError as error:
        st.warning(f"Nothing can be advised: {state.plain(str(error), 400)}", icon=":material/block:")
        return None
    budget = frames.budget_of(run, found)
    best = found.candidates[0] if found.candidates else None
    points = _points(run, [*tried, *(one for _, each in kept for one in each.candidates), *found.candidates], budget)
    with drawn:
        _figure(run, points, budget, best)
    with advised:
        _verdict(run, found, best, points)
        if best is not None:
            _best(run, best, whole)
            _alternatives(run, found)
        compress_search.form(run, found, best, asked)
    return found


def _budget(run: Run, whole: int, kept: list[tuple[str, Recommendation]]) -> tuple[int, str]:
    """The budget of the experts, bytes, and which advice is shown."""
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        percent = state.choose_share(
            "Budget: what the experts may take, of what they take now", key="budget", default=25,
            help=f"All experts take {size(whole)} now, in the type that their weights are kept in. Other weights of "
            "the model come on top.",
        )  # fmt: skip
        shown, source = st.container(width="content"), HERE
        if kept:
            words = {name: f"kept: {size(frames.budget_of(run, one))}, {_measured_words(one)}" for name, one in kept}
            words[HERE] = "for this budget"
            names = [HERE, *(name for name, _ in kept)]
            source = state.choose("Advice", names, key="advice", words=words.__getitem__)
    budget = int(whole * percent / 100)
    shown.metric("Budget", size(next((frames.budget_of(run, one) for name, one in kept if name == source), budget)))
    return budget, source


def _measured_words(found: Recommendation) -> str:
    count = sum(one.measurement is not None for one in found.candidates)
    return f"{count} measured" if count else "nothing measured"


def _advice(
    run: Run, kept: list[tuple[str, Recommendation]], source: str, memory: int, priced: dict[str, Any]
) -> Recommendation:
    for name, one in kept:
        if name == source or (source == HERE and abs(frames.budget_of(run, one) - memory) < 2):
            return one
    found: Recommendation = data.made(frames.advice, run, memory=memory, **priced)
    return found


def _points(run: Run, candidates: list[Candidate], budget: int) -> pl.DataFrame:
    parts = [data.made(frames.stored_curve, run, files=frames.files(run, "curve")), frames.priced(run, candidates)]
    try:
        parts.append(frames.priced(run, frames.evaluated(run)))
    except StoreError as error:
        st.error(f"The evaluations beside this run cannot be read: {state.plain(str(error), 300)}")
    return frames.points(parts, budget=budget)


def _figure(run: Run, points: pl.DataFrame, budget: int, best: Candidate | None) -> None:
    measured = len(points["measured"].drop_nulls())
    chart.show(
        figures.cost_by_size(points, budget=budget, chosen=best.plan.digest if best else "", theme=state.theme()),
        points,
        key="curve",
        read="Left is smaller, lower costs less: at the dashed budget, the best plan is the lowest point at its left. "
        "Hollow points are predicted, and most were not measured; filled ones were, and a filled point far from its "
        "hollow one says how wrong the prediction was. Intervals stand in the hover.",
        rests_on=f"{len(points):,} plans, {measured} of them measured; {run.info.tokens:,} tokens of the run.",
        alt="Points: size of all experts against predicted divergence for plans of every kind, with the budget",
    )


def _verdict(run: Run, found: Recommendation, best: Candidate | None, points: pl.DataFrame) -> None:
    label, colour, icon = _LOOKS[found.verdict]
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        st.badge(label, color=colour, icon=icon)  # type: ignore[arg-type]
        words = state.plain(frames.mixture(best.plan), 200) if best else "Nothing reaches this budget."
        st.markdown(f"**{words[0].upper()}{words[1:]}**")
    st.markdown("\n".join(f"- {state.plain(reason, 500)}" for reason in found.reasons))
    other = frames.cheaper(points, best.kl if best is not None else None)
    if other is not None:
        st.caption(
            f"Among all plans on the curve, {state.plain(other['name'])} ({state.plain(other['mix'])}, "
            f"{size(other['bytes'])}) is predicted to cost less, {other['kl']:.3g} nats, on the text that it was made "
            "from."
        )
    for sentence in found.evidence:
        st.caption(state.plain(sentence, 400))


def _best(run: Run, best: Candidate, whole: int) -> None:
    """The best plan in figures, measured beside predicted, and its risks."""
    price, seen = best.prediction, best.measurement
    bits = frames.priced(run, [best])["bits"][0]
    columns = st.columns(4)
    change = f"{(best.bytes - whole) / whole:+.1%} of {size(whole)}"
    plain: dict[str, Any] = {"delta_color": "off", "delta_arrow": "off"}
    columns[0].metric("Weights of all experts", size(best.bytes), change, **plain)
    columns[1].metric("Bits of a weight that stays", f"{bits:.3g}", "scales and zero points counted", **plain)
    columns[2].metric(
        "Predicted KL, nats per token", "unknown" if price is None else f"{price.kl:.3g}",
        "" if price is None else f"{price.low:.3g} to {price.high:.3g}, {price.coverage:.0%}", **plain,
        help=f"Divergence from the model as it is: {frames.rests_on(best)}.",
    )  # fmt: skip
    columns[3].metric(
        "Measured KL", "not measured" if seen is None else f"{seen.kl:.3g}",
        "" if seen is None else f"{seen.low:.3g} to {seen.high:.3g}, 95%; {seen.tokens:,} tokens", **plain,
    )  # fmt: skip
    if best.risks:
        with st.container(border=True, gap="xsmall"):
            st.markdown("**Look at these first**\n" + "\n".join(f"- {state.plain(risk, 400)}" for risk in best.risks))


def _alternatives(run: Run, found: Recommendation) -> None:
    frame = frames.alternatives(run, found)
    with st.expander(f"All {len(frame)} plans for this budget, the best first", icon=":material/table:"):
        st.dataframe(
            frame,
            hide_index=True,
            alt="Every plan for the budget: size, bits, predicted and measured divergence",
            column_order=[
                "name", "mix", "bytes", "bits", "kl", "low", "high", "measured", "measured_low", "measured_high",
                "elsewhere", "basis", "risks",
            ],
            column_config={
                "name": "plan",
                "bytes": _number("experts take", format="bytes"),
                "bits": _number(format="%.3g"),
                "kl": _number("predicted KL", format="%.3g"),
                **{name: _number(format="%.3g") for name in ("low", "high")},
                "measured": _number("measured KL", format="%.3g", help="empty = not measured"),
                "measured_low": _number("from", format="%.3g"),
                "measured_high": _number("to", format="%.3g"),
                "elsewhere": _number("on other text", format="%.3g", help="predicted on domains it was not made from"),
            },
        )  # fmt: skip
        chart.caption("Ranked by cost, dearer where text unlike the run's is predicted to cost far more.", frame, None,
                      key="alternatives")  # fmt: skip
    if found.refused:
        with st.expander("Presets that reach no plan of this size", icon=":material/layers:"):
            for name, why in found.refused.items():
                st.markdown(f"- **{state.plain(name)}**: {state.plain(why, 300)}")
