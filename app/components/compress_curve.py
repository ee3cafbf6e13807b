"""Size against predicted cost, a budget on it, and what is advised for that budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, compress_search, table
from app.components.table import Column
from app.exhibits import compress as exhibits
from app.exhibits.exhibit import Absent
from app.frames import compress_curve as frames
from app.frames import compress_presets
from app.text import size
from moescope.errors import PlanError, StoreError
from planner.recommendation import Candidate, Recommendation
from store import Run

_LOOKS = {
    "apply": ("Apply", "green", ":material/check_circle:"),
    "with care": ("With care", "orange", ":material/warning:"),
    "leave it": ("Leave it", "red", ":material/block:"),
}
HERE = "this budget"
"""The advice for the slider's budget: one that was kept for it, else a first look."""
_SHOWN = {
    "name": Column("plan", "text"), "mix": Column("mix", "text"), "bytes": Column("experts take", "bytes"),
    "bits": Column("bits"), "kl": Column("predicted KL"), "low": Column("from"), "high": Column("to"),
    "measured": Column("measured KL", help="empty = not measured"), "measured_low": Column("from"),
    "measured_high": Column("to"), "basis": Column("basis", "text"), "risks": Column("risks", "count"),
    "elsewhere": Column("on other text", help="predicted on domains it was not made from"),
}  # fmt: skip


MOST_UNASKED = 16_384
"""Experts of all layers together up to which every plan is priced when the page opens (some seconds)."""

_ASKED = "price-all-of"


@dataclass(frozen=True)
class Budget:
    """What the experts may take.

    Attributes:
        memory: bytes.
        source: which advice is shown: :data:`HERE`, or the file of a kept one.
        kept: recommendations beside the run, the newest first.
    """

    memory: int
    source: str
    kept: list[tuple[str, Recommendation]]

    @property
    def calibration(self) -> str:
        """What measured plans say of prices, as JSON."""
        return frames.measured_factors(self.kept)


def budget(run: Run) -> Budget:
    """Draw the slider, and the choice among kept recommendations."""
    whole = compress_presets.expert_bytes(run)
    kept = data.frame(frames.recommended, run, files=frames.files(run, "recommendation"))
    with st.container(width=330):
        percent = state.choose_share(
            "Budget: what the experts may take, of now", key="budget", default=25,
            help=f"All experts take {size(whole)} now, in the type that their weights are kept in. Other weights of "
            "the model come on top.",
        )  # fmt: skip
    shown, source = st.container(width="content"), HERE
    if kept:
        words = {name: f"kept: {size(frames.budget_of(run, one))}, {_measured_words(one)}" for name, one in kept}
        words[HERE] = "for this budget"
        names = [HERE, *(name for name, _ in kept)]
        source = state.choose("Advice", names, key="advice", words=words.__getitem__)
    memory = int(whole * percent / 100)
    shown.metric("Budget", size(next((frames.budget_of(run, one) for name, one in kept if name == source), memory)))
    return Budget(memory, source, kept)


def _measured_words(found: Recommendation) -> str:
    count = sum(one.measurement is not None for one in found.candidates)
    return f"{count} measured" if count else "nothing measured"


def wanted(run: Run) -> bool:
    """Whether plans are to be priced now: at once, or where there are very many experts, when it was asked for."""
    experts = sum(layer.num_experts for layer in run.layers)
    if experts <= MOST_UNASKED or st.session_state.get(_ASKED) == run.name:
        return True
    st.info(
        f"Pricing every way to compress {experts:,} experts takes a minute or more; a single preset takes seconds.",
        icon=":material/timer:",
    )
    st.button("Price them all", key="price-all", on_click=lambda: st.session_state.update({_ASKED: run.name}))
    return False


def advice(run: Run, asked_for: Budget, asked: dict[str, Any]) -> Recommendation | None:
    """What is advised for the budget; None where nothing can be, which is said.

    asked: domains, guard, engine and allow_invalid, as ``planner.make`` takes them.
    """
    for name, one in asked_for.kept:
        here = asked_for.source == HERE and abs(frames.budget_of(run, one) - asked_for.memory) < 2
        if name == asked_for.source or here:
            return one
    try:
        with st.spinner("Pricing plans from the run's sums"):
            return data.frame(
                frames.advice, run, memory=asked_for.memory, calibration=asked_for.calibration, **asked
            )  # fmt: skip
    except PlanError as error:
        st.warning(f"Nothing can be advised: {state.plain(str(error), 400)}", icon=":material/block:")
        return None


def verdict(found: Recommendation) -> None:
    """The answer in one line."""
    label, colour, icon = _LOOKS[found.verdict]
    best = found.candidates[0] if found.candidates else None
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        st.badge(label, color=colour, icon=icon)  # type: ignore[arg-type]
        words = state.plain(frames.mixture(best.plan), 200) if best else "Nothing reaches this budget."
        st.markdown(f"**{words[0].upper()}{words[1:]}**")


def section(run: Run, found: Recommendation, asked_for: Budget, asked: dict[str, Any]) -> None:
    """Size against cost, why the advice is what it is, and the longer ways to one."""
    best = found.candidates[0] if found.candidates else None
    points = _points(run, found, asked_for, asked)
    try:
        chart.draw(
            exhibits.curve_of(run, points, budget=frames.budget_of(run, found), best=best, theme=state.theme()),
            key="curve",
        )
    except Absent as missing:
        chart.absent(missing)
    _why(found, best, points)
    if best is not None:
        _alternatives(run, found)
    compress_search.form(run, found, best, asked)


def _points(run: Run, found: Recommendation, asked_for: Budget, asked: dict[str, Any]) -> pl.DataFrame:
    with st.spinner("Pricing plans from the run's sums"):
        tried = data.frame(frames.first_look, run, calibration=asked_for.calibration, **asked)
    known, budget = [*tried, *found.candidates], frames.budget_of(run, found)
    try:
        return frames.everything(run, known, kept=asked_for.kept, budget=budget, frames=data.frame)
    except StoreError as error:
        st.error(f"The evaluations beside this run cannot be read: {state.plain(str(error), 300)}")
        return frames.points([frames.priced(run, known)], budget=budget)


def _why(found: Recommendation, best: Candidate | None, points: pl.DataFrame) -> None:
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
    if best is not None and best.risks:
        with st.container(border=True, gap="xsmall"):
            st.markdown("**Look at these first**\n" + "\n".join(f"- {state.plain(risk, 400)}" for risk in best.risks))


def _alternatives(run: Run, found: Recommendation) -> None:
    frame = frames.alternatives(run, found)
    with st.expander(f"All {len(frame)} plans for this budget, the best first", icon=":material/table:"):
        table.show(
            frame.select(*_SHOWN, *(name for name in frame.columns if name not in _SHOWN)), key="alternatives",
            columns=_SHOWN, hide=tuple(name for name in frame.columns if name not in _SHOWN), bordered=False,
            alt="Every plan for the budget: size, bits, predicted and measured divergence",
            read="Ranked by cost, dearer where text unlike the run's is predicted to cost far more.",
        )  # fmt: skip
    if found.refused:
        with st.expander("Presets that reach no plan of this size", icon=":material/layers:"):
            for name, why in found.refused.items():
                st.markdown(f"- **{state.plain(name)}**: {state.plain(why, 300)}")
