"""The plan on the page Compress: key figures, the map of what becomes of every expert, tables, presets compared."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart
from app.figures import compress as figures_of
from app.figures.style import safe
from app.frames import compress as frames
from app.frames import compress_presets
from app.frames.compress_bits import price as priced
from app.text import size
from compressor.plan import Plan, SlimStep
from store import Run

_number = st.column_config.NumberColumn
_PLAIN: dict[str, Any] = {"delta_color": "off", "delta_arrow": "off"}


def figures(run: Run, plan: Plan, *, calibration: str = "") -> None:
    """What the plan saves and is expected to cost, in a row; what it rests on, below.

    Args:
        run: the plan's run.
        plan: the plan.
        calibration: what its price rests on, as JSON; empty = the run's sums alone.
    """
    estimate, kept, whole = plan.estimate, frames.kept(plan), compress_presets.expert_bytes(run)
    experts = sum(shape.num_experts for shape in plan.source.layers)
    active, was = estimate.active_parameters_after, estimate.active_parameters
    error = estimate.weighed_error
    price = next(data.of_plan(priced, run, plan, calibration=calibration).iter_rows(named=True), None)
    columns = st.columns(3 + (price is not None) + (price is None or error is not None))
    columns[0].metric("Experts", f"{kept:,}", _change(kept, experts, f"{experts:,}"), **_PLAIN)
    columns[1].metric(
        "Weights of all experts", size(whole - estimate.bytes_saved),
        _change(whole - estimate.bytes_saved, whole, size(whole)), **_PLAIN,
        help=f"{_short(estimate.expert_parameters_after)} of {_short(estimate.expert_parameters)} parameters, as they "
        "are stored, in the type that the run was recorded with.",
    )  # fmt: skip
    columns[2].metric(
        "Parameters per token", _short(active), _change(active, was, _short(was)), **_PLAIN,
        help="Expert parameters that one token uses.",
    )  # fmt: skip
    if price is None or error is not None:
        _error(columns[3], error)
    if price is not None:
        columns[-1].metric(
            "Predicted KL", f"{price['kl']:.3g}", f"{price['low']:.3g} to {price['high']:.3g}", **_PLAIN,
            help="Divergence from the model as it is, nats per token, from the run's sums"
            + (f" corrected by {price['plans']} measured plans" if price["plans"] else " alone")
            + f", with an interval that holds {price['coverage']:.0%} of measured values. It compares plans of every "
            "kind; only a measurement says what the model loses.",
        )  # fmt: skip
    first, *others = frames.rests_on(plan)
    st.caption(state.plain(first, 600))
    if others:
        with st.expander("What it rests on, and what it does not know", icon=":material/info:"):
            st.markdown("\n".join(f"- {state.plain(line, 800)}" for line in others))


def _error(column: Any, error: float | None) -> None:
    column.metric(
        "Predicted error", "unknown" if error is None else f"{error:.3g}", "of the layers' output", **_PLAIN,
        help="Squared error of the MoE layers' outputs over their square, before anything is routed anew, mean over "
        "layers, each weighed by how far it turns the residual stream; 0 = unchanged. "
        "It ranks plans of one size that drop; it does not say what the model loses.",
    )  # fmt: skip


def maps(plan: Plan, found: pl.DataFrame) -> None:
    """Layers by experts: what becomes of each, and for slim the neurons that stay."""
    name = safe(frames.title(plan))
    evidence = frames.evidence_of(plan)
    by = f"Scores: {evidence.score}, {evidence.source or 'own'}." if evidence else ""
    chart.show(
        figures_of.plan_map(found, title=f"What becomes of every expert: {name}", theme=state.theme()),
        found,
        key="plan-map",
        read="Blue experts stay, orange ones go, purple ones are merged into another; the further from the background, "
        "the higher in its layer by the score. Strong orange: the plan lets an expert go that the score holds dear. "
        "Rings: protected super experts.",
        rests_on=f"{len(found):,} experts; {plan.provenance.tokens:,} tokens. {by}",
        alt="Map of layers and experts: what stays, what goes, what is merged and what is protected",
    )
    if any(isinstance(step, SlimStep) for step in plan.steps):
        chart.show(
            figures_of.neuron_map(found, title=f"Neurons that stay: {name}", theme=state.theme()),
            found,
            key="plan-neurons",
            read="The share of its neurons that each expert keeps: those near the background lose most. One colour all "
            "over means that the form asks for the same width everywhere.",
            rests_on=f"{len(found):,} experts. {by}",
            alt="Map of layers and experts: share of neurons kept",
        )


def presets(run: Run, asked: dict[str, Any]) -> None:
    """All presets that the run can give, at what was asked for."""
    st.subheader("Presets beside each other", anchor=False)
    rest = {name: value for name, value in asked.items() if name != "preset"}
    with st.spinner("Planning with every preset"):
        frame = data.frame(compress_presets.comparison, run, **rest)
    made = frame.filter(pl.col("refused").is_null())
    priced = len(made["weighed_error"].drop_nulls())
    chart.show(
        figures_of.preset_errors(frame, title="Predicted error by preset", chosen=asked["preset"], theme=state.theme()),
        frame,
        key="presets",
        read="Shorter is better, among plans that cut as much: what each choice is expected to change in the outputs "
        "of the MoE layers before tokens are routed anew, layers weighed by how "
        "far they turn the residual stream. It is an estimate from the run; measured damage can differ.",
        rests_on=f"{len(made)} of {len(frame)} presets can be planned so, {priced} are priced: merges and slimming "
        f"are not. {run.info.tokens:,} tokens.",
        alt="Bars: predicted error of every preset",
    )
    with st.expander("All figures: every preset", icon=":material/table:"):
        st.dataframe(
            frame,
            hide_index=True,
            alt="Every preset: score, experts, bytes saved, predicted layer error, or why it is refused",
            column_config={
                "experts_after": _number("experts that stay", format="localized"),
                "parameters_after": _number("expert parameters", format="compact"),
                "layer_error": _number("predicted error, layers alike", format="%.4g"),
                "weighed_error": _number("predicted error, layers weighed", format="%.4g"),
                "kept_mass": _number("score that stays", format="percent"),
            },
        )


def tables(found: pl.DataFrame) -> None:
    """What the map shows, as tables."""
    with st.expander("All figures: every layer, and every expert", icon=":material/table:"):
        st.dataframe(
            frames.reasons(found),
            hide_index=True,
            alt="What happens to each layer and why",
            column_config={"label": "layer", "what": "what happens"},
        )
        st.dataframe(
            frames.layers(found),
            hide_index=True,
            alt="Every layer: experts kept, dropped, merged, protected, scores at the edge",
            column_config={
                "label": "layer",
                "neurons_kept": _number("neurons kept", format="percent"),
                "highest_cut": _number("highest score cut", format="%.4g"),
                "lowest_kept": _number("lowest score kept", format="%.4g", help="protected experts left out"),
            },
        )
        st.dataframe(
            found.drop("layer", "step"),
            hide_index=True,
            height=320,
            alt="Every expert: what becomes of it, score and reason",
            column_config={
                "label": "layer",
                "score": _number(format="%.4g"),
                "part": _number(format="percent"),
                "neurons_kept": _number("neurons kept", format="percent"),
            },
        )


def _change(after: float, before: float, words: str) -> str:
    return "unchanged" if after == before else f"{(after - before) / before:+.1%} of {words}"


def _short(count: float) -> str:
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {letter}"
    return f"{count:.0f}"
