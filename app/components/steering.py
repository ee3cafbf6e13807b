"""The section Steering: a bias on the logits of one layer's router, and what it moves at once."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, table, what_if_controls, what_if_plan
from app.components.table import Column
from app.components.what_if_controls import Text
from app.exhibits import what_if as exhibits
from app.figures import what_if as figures
from app.frames import steering as frames
from app.frames import what_if
from app.frames.steering import Scored
from moescope.errors import PlanError
from planner.simulate.what_if import Refused
from store import Run

DOMAINS = 24
"""Domains that the chart shows."""

_COLUMNS: dict[str, Any] = {
    "expert": st.column_config.NumberColumn("expert", disabled=True, width="small"),
    "before_share": st.column_config.NumberColumn("load now", format="%.2f %%", disabled=True),
    "bias": st.column_config.NumberColumn("bias, logits", format="%.4f", step=0.0001, required=True),
    "after_share": st.column_config.NumberColumn("load then", format="%.2f %%", disabled=True),
    "change": st.column_config.NumberColumn("change, points", format="%+.2f", disabled=True),
}


def section(run: Run) -> None:
    """Draw the section."""
    asked = what_if_controls.text(run)
    label = focus.current().layer_in(run)
    try:
        found: Scored = data.large(frames.scored, run, label=label, **asked.choices)
    except Refused as refused:
        chart.absent(exhibits.absent(refused))
        return
    if found.layer.num_experts <= found.layer.top_k or not len(found.ids):
        st.info(f"Layer {state.plain(label)} uses all of its experts, or its router shows no scores: nothing to steer.")
        return
    _buttons(run, found)
    biases = _biases(run)
    row = biases.get(label, (0.0,) * found.layer.num_experts)
    _answer(run, found, row, biases, asked)
    experts = frames.experts(found, row)
    if any(row):
        with chart.pair():
            _loads(experts, label)
            _domains(frames.domains(found, row), label)
    else:
        _loads(experts, label)
    _editor(run, label, experts)
    if any(row):
        _flipped(run, found, row)
    steered = frames.as_key(biases, run)
    if steered:
        what_if_plan.section(
            run, "steering", rule="bias", biases=steered, limit_tokens=what_if.limit_of(run, asked.whole)
        )


def _biases(run: Run) -> dict[str, tuple[float, ...]]:
    """Label of a layer -> one number per expert, of this session; those that do not fit the run are left out."""
    counts = {label: focus.experts_of(run, label) for label in what_if.labels(run)}
    held = st.session_state.get(f"steered-{run.name}", {})
    return {label: row for label, row in held.items() if counts.get(label) == len(row)}


def _set(name: str, label: str, row: tuple[float, ...]) -> None:
    """Keep the biases of a layer; the editor then begins anew."""
    held = dict(st.session_state.get(f"steered-{name}", {}))
    if any(row):
        held[label] = row
    else:
        held.pop(label, None)
    st.session_state[f"steered-{name}"] = held
    st.session_state["steered-version"] = st.session_state.get("steered-version", 0) + 1


def _buttons(run: Run, found: Scored) -> None:
    """Quick actions; experts are pushed by the step that stands beside them."""
    label, expert = found.label, focus.current().expert_in(run)
    row = _biases(run).get(label, (0.0,) * found.layer.num_experts)
    chosen = focus.current().expert is not None
    name = f"expert {expert}" if chosen else "expert"
    with st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        with st.container(width=130):
            size = state.choose_size(
                "Step, logits", key=f"push-step-{label}", low=0.0001, high=1000.0, default=frames.step_of(found),
                help="Half of the typical distance between the last expert that a token takes and the next.",
            )  # fmt: skip
        moved = {
            f"Push {name} up": (row[expert] + size, ":material/arrow_upward:"),
            f"Push {name} down": (row[expert] - size, ":material/arrow_downward:"),
            f"Away from {name}": (frames.away(found), ":material/block:"),
        }
        for index, (words, (value, icon)) in enumerate(moved.items()):
            then = tuple(round(value, frames.ROUND) if at == expert else one for at, one in enumerate(row))
            st.button(
                words, icon=icon, key=f"push-{index}", disabled=not chosen, on_click=_set, args=(run.name, label, then),
                help=None if chosen else "Choose an expert in the bar, in a chart or in a table first.",
            )  # fmt: skip
        if st.button("Towards even load", icon=":material/balance:", key="push-even"):
            _even(run, label)
        st.button(
            "Clear", icon=":material/restart_alt:", key="push-clear", disabled=not any(row), on_click=_set,
            args=(run.name, label, (0.0,) * len(row)),
        )  # fmt: skip


def _even(run: Run, label: str) -> None:
    try:
        with st.spinner("Evening out the load on one half of the text"):
            found = data.made(frames.even, run, label=label)
    except PlanError as error:
        st.warning(f"No such biases: {state.plain(str(error), 400)}", icon=":material/block:")
        return
    _set(run.name, label, tuple(round(value, frames.ROUND) for value in found.bias.tolist()))
    words = (
        f"On the half of the text that they were not fitted on ({found.tokens:,} tokens), the load's coefficient of "
    )
    words += f"variation goes from {found.before:.3f} to {found.after:.3f}"
    if found.after < found.before:
        st.info(f"{words}; figures below are of both halves.", icon=":material/balance:")
    else:
        st.warning(
            f"{words}: these biases even out nothing there. Figures below are of both halves.",
            icon=":material/balance:",
        )


def _answer(
    run: Run, found: Scored, row: tuple[float, ...], biases: dict[str, tuple[float, ...]], asked: Text
) -> None:  # fmt: skip
    others = sorted(label for label, other in biases.items() if any(other) and label != found.label)
    beside = f" Steered too: layer{'s' if len(others) > 1 else ''} {', '.join(others)}." if others else ""
    if not any(row):
        st.markdown(
            f"**Nothing** is steered in layer {state.plain(found.label)}. Push an expert, or type a bias into the "
            f"table: it is added to the logits before the router chooses.{beside}"
        )
        return
    result = data.frame(
        what_if.found, run, method="bias", values=(1.0,), layers=(found.layer.layer,), **asked.choices,
        bias=frames.as_key({found.label: row}, run),
    )  # fmt: skip
    at = result.layers.index((found.layer.layer, found.layer.step))
    changed, tokens = float(result.changed_tokens[0, at]), int(result.tokens[at])
    before, after = float(result.load_cv_before[at]), float(result.load_cv[0, at])
    mass = float(result.kept_mass_before[at] - result.kept_mass[0, at])
    known = float(result.known[0, at])
    proof = "" if known > 0.9995 else f" The stored scores prove it for {known:.1%} of the tokens."
    st.markdown(
        f"Of {tokens:,} tokens **{round(changed * tokens):,} ({changed:.1%})** get other experts in layer "
        f"{state.plain(found.label)}. The load's coefficient of variation goes from {before:.3f} to **{after:.3f}**, "
        f"the busiest expert from {float(result.load_peak_before[at]):.2f} to {float(result.load_peak[0, at]):.2f} "
        f"times the mean, and {mass * 100:.2f} points of router probability are given up.{proof}{beside}"
    )
    what_if_controls.certainty(result)


def _loads(experts: pl.DataFrame, label: str) -> None:
    chart.show(
        figures.expert_loads(experts, layer=label, theme=state.theme()), experts, key="steered-loads",
        read="Share of the tokens that use each expert, as the router chooses and with the bias. A click picks the "
        "expert that the buttons push.",
        alt=f"Bars: load of the experts of layer {label} now and then",
    )  # fmt: skip


def _domains(domains: pl.DataFrame, label: str) -> None:
    shown = domains.sort("changed_tokens", descending=True).head(DOMAINS)
    chart.show(
        figures.domain_changes(shown, layer=label, theme=state.theme()), domains, key="steered-domains",
        read="A bias moves those domains most whose tokens lie near the border between experts."
        + (f" The {DOMAINS} that change most." if len(domains) > DOMAINS else ""),
        alt=f"Bars: tokens of each domain that get other experts in layer {label}",
    )  # fmt: skip


def _editor(run: Run, label: str, experts: pl.DataFrame) -> None:
    """The table; what is typed is taken over at once, and the table drawn anew with the loads that follow."""
    key = f"steered-{label}-{st.session_state.get('steered-version', 0)}"
    row = tuple(experts["bias"].to_list())

    def edited() -> None:
        changes = st.session_state[key]["edited_rows"]
        values = {int(at): change["bias"] for at, change in changes.items() if change.get("bias") is not None}
        _set(run.name, label, tuple(float(values.get(at, one)) for at, one in enumerate(row)))

    points = (pl.col(name) * 100 for name in ("before_share", "after_share", "change"))
    shown = experts.with_columns(points).select("expert", "before_share", "bias", "after_share", "change")
    with st.container(border=True, gap="xsmall"):
        st.data_editor(
            shown, key=key, hide_index=True, num_rows="fixed", column_config=_COLUMNS, on_change=edited,
            height=min(table.ROW * (len(shown) + 1) + 2, table.MOST_HEIGHT),
            alt=f"Experts of layer {label} with biases",
            disabled=["expert", "before_share", "after_share", "change"],
        )  # fmt: skip
        chart.caption("Type a bias: loads and texts follow at once.", experts, None, key="steered-experts")


def _flipped(run: Run, found: Scored, row: tuple[float, ...]) -> None:
    flips = frames.flips(run, found, row)
    if flips.is_empty():
        return
    proven = int(flips["proven"].sum())
    table.show(
        flips.select("before", "text", "after", "left", "taken", "proven", "domain", "sequence", "position", "label"),
        key="flips", alt="Tokens that get other experts, each with the text before and after it",
        read=f"{len(flips)} of the tokens that get other experts, spread evenly over the text; {proven} of them proven "
        "by the stored scores. A row picks the token; the page Tokens then shows it.",
        columns={
            "before": Column("text before", "text", width="medium"), "text": Column("token", "text", width="small"),
            "after": Column("text after", "text", width="medium"), "left": Column("leaves", "text", width="small"),
            "taken": Column("goes to", "text", width="small"), "sequence": Column("sequence", "text"),
            "position": Column("position", "text"),
        },
    )  # fmt: skip
