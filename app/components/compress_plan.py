"""The plan on the page Compress: key figures, the map of what becomes of every expert, tables, presets compared."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, table
from app.components.compress_bits import of_plan
from app.components.table import Column
from app.exhibits import compress as exhibits
from app.exhibits import compress_plan as plan_exhibits
from app.exhibits.listed import listed
from app.frames import compress as frames
from app.frames import compress_curve, compress_presets
from app.frames.compress_bits import price as priced
from app.text import size
from compressor.plan import Plan, SlimStep
from moescope.errors import StoreError
from planner.finalists import Measurement
from planner.recommendation import Candidate
from store import Run

_PLAIN: dict[str, Any] = {"delta_color": "off", "delta_arrow": "off", "border": True, "height": "stretch"}
_PRESETS = {
    "title": Column("preset", "text"), "step": Column("step", "text"), "experts_after": Column("experts that stay"),
    "parameters_after": Column("expert parameters", "compact"),
    "layer_error": Column("predicted error, layers alike"), "weighed_error": Column("predicted error, layers weighed"),
    "kept_mass": Column("score that stays", "share"), "refused": Column("refused", "text", width="large"),
}  # fmt: skip
_LAYERS = {
    "neurons_kept": Column("neurons kept", "share"), "highest_cut": Column("highest score cut"),
    "lowest_kept": Column("lowest score kept", help="protected experts left out"),
}  # fmt: skip
_UNITS = {
    "into": Column("into", "text"), "part": Column("part", "share"), "neurons_kept": Column("neurons kept", "share"),
    "why": Column("why", "text", width="large"),
}  # fmt: skip


def figures(run: Run, plan: Plan, *, calibration: str = "", candidate: Candidate | None = None) -> None:
    """What the plan saves, is expected to cost, and did cost, in a row.

    Args:
        run: the plan's run.
        plan: the plan.
        calibration: what its price rests on, as JSON; empty = the run's sums alone.
        candidate: the plan among those that are advised, with its price and what was measured.
    """
    estimate, whole = plan.estimate, compress_presets.expert_bytes(run)
    kept, experts = frames.kept(plan), sum(shape.num_experts for shape in plan.source.layers)
    left = whole - estimate.bytes_saved if candidate is None else candidate.bytes
    with st.grid(6, min_column_width=150, gap="small"):
        st.metric(
            "Experts take", size(left), _change(left, whole, size(whole)), **_PLAIN,
            help=f"{_short(estimate.expert_parameters_after)} of {_short(estimate.expert_parameters)} parameters, as "
            "they are stored, in the type that the run was recorded with.",
        )  # fmt: skip
        st.metric("Experts", f"{kept:,}", _change(kept, experts, f"{experts:,}"), **_PLAIN)
        if estimate.bits is not None:
            st.metric("Bits a weight", f"{estimate.bits:.3g}", "scales counted", **_PLAIN, help="Of weights that stay.")
        active, was = estimate.active_parameters_after, estimate.active_parameters
        st.metric(
            "Active", _short(active), _change(active, was, _short(was)), **_PLAIN,
            help="Parameters of experts that one token uses.",
        )  # fmt: skip
        price = _price(run, plan, calibration, candidate)
        _predicted(price)
        if estimate.weighed_error is not None or price is None:
            _error(estimate.weighed_error)
        _measured(_seen(run, plan, candidate))


def _price(run: Run, plan: Plan, calibration: str, candidate: Candidate | None) -> dict[str, Any] | None:
    if candidate is not None and candidate.prediction is not None:
        return candidate.prediction.model_dump()
    return next(data.of_plan(priced, run, plan, calibration=calibration).iter_rows(named=True), None)


def _predicted(price: dict[str, Any] | None) -> None:
    if price is None:
        st.metric("Predicted KL", "unknown", "takes activations", **_PLAIN)
        return
    st.metric(
        "Predicted KL", f"{price['kl']:.3g}",
        f"{price['low']:.2g} to {price['high']:.2g}", **_PLAIN,
        help="Divergence from the model as it is, nats per token, from the run's sums"
        + (f" corrected by {price['plans']} measured plans" if price["plans"] else " alone")
        + f", with an interval that holds {price['coverage']:.0%} of measured values. It compares plans of every kind; "
        "only a measurement says what the model loses.",
    )  # fmt: skip


def _error(error: float | None) -> None:
    st.metric(
        "Predicted error", "unknown" if error is None else f"{error:.3g}", "of outputs", **_PLAIN,
        help="Squared error of the MoE layers' outputs over their square, before anything is routed anew, mean over "
        "layers, each weighed by how far it turns the residual stream; 0 = unchanged. It ranks plans of one size that "
        "drop; it does not say what the model loses.",
    )  # fmt: skip


def _measured(seen: Measurement | None) -> None:
    why = "Divergence from the model as it is on held-out text, nats per token"
    if seen is None:
        st.metric("Measured KL", "–", "not measured", **_PLAIN, help=f"{why}: apply the plan, and evaluate the result.")
        return
    st.metric(
        "Measured KL", f"{seen.kl:.3g}", f"{seen.low:.2g} to {seen.high:.2g}", **_PLAIN,
        help=f"{why}, with its 95 % interval; {seen.tokens:,} tokens.",
    )  # fmt: skip


def _seen(run: Run, plan: Plan, candidate: Candidate | None) -> Measurement | None:
    if candidate is not None and candidate.measurement is not None:
        return candidate.measurement
    try:
        return next((one.measurement for one in compress_curve.evaluated(run) if one.plan.digest == plan.digest), None)
    except StoreError:  # section Measured says so
        return None


def section(run: Run, plan: Plan) -> None:
    """What becomes of every expert, and for slim the neurons that stay."""
    of_plan(plan_exhibits.of_map, run, plan, key="plan-map")
    if any(isinstance(step, SlimStep) for step in plan.steps):
        of_plan(plan_exhibits.of_neurons, run, plan, key="plan-neurons")


def rests_on(plan: Plan) -> None:
    """On what the plan rests."""
    first, *others = frames.rests_on(plan)
    st.caption(state.plain(first, 600))
    if others:
        with st.expander("What it rests on, and what it does not know", icon=":material/info:"):
            st.markdown("\n".join(f"- {state.plain(line, 800)}" for line in others))


def presets(run: Run, asked: dict[str, Any]) -> None:
    """All presets that the run can give, at what was asked for; asked: as ``planner.make`` takes it."""
    rest = {name: value for name, value in asked.items() if name not in ("preset", "domains")}
    with st.spinner("Planning with every preset"):
        drawn = chart.exhibit(
            exhibits.presets, run, key="presets", preset=asked["preset"], domains=listed(asked.get("domains", ())),
            **rest,
        )  # fmt: skip
        frame = data.frame(compress_presets.comparison, run, **{k: v for k, v in asked.items() if k != "preset"})
    with st.expander("All figures: every preset", icon=":material/table:", expanded=not drawn):
        table.show(
            frame, key="presets-table", columns=_PRESETS, hide=("preset",), bordered=False,
            alt="Every preset: score, experts, bytes saved, predicted layer error, or why it is refused",
        )  # fmt: skip


def tables(run: Run, plan: Plan) -> None:
    """What the map shows, as tables: every layer, and the experts of the layer in focus."""
    found = data.of_plan(_units, run, plan)
    with st.expander("All figures: every layer", icon=":material/table:"):
        table.show(
            frames.reasons(found), key="plan-reasons", bordered=False, alt="What happens to each layer and why",
            columns={"what": Column("what happens", "text"), "experts": Column("experts", "text"),
                     "why": Column("why", "text", width="large")},
        )  # fmt: skip
        table.show(
            frames.layers(found), key="plan-layers", bordered=False, columns=_LAYERS,
            alt="Every layer: experts kept, dropped, merged, protected, scores at the edge",
        )  # fmt: skip
    label = focus.current().layer_in(run)
    with st.expander(f"All figures: every expert of layer {label}", icon=":material/table:"):
        table.show(
            found.filter(pl.col("label") == label), key="plan-experts", bordered=False, columns=_UNITS,
            hide=("layer", "step"), alt=f"Every expert of layer {label}: what becomes of it, score and reason",
            read="Another layer: in the bar on top, or by a click in the map.",
        )  # fmt: skip


def _units(run: Run, plan: Plan) -> pl.DataFrame:
    return frames.units(plan)


def _change(after: float, before: float, words: str) -> str:
    return "unchanged" if after == before else f"{(after - before) / before:+.1%} of {words}"


def _short(count: float) -> str:
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {letter}"
    return f"{count:.0f}"
