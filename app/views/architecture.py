"""Architecture: what kinds of MoE models are looked at for; only what the run has."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from typing import Any

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, header, table
from app.components.answer import answer
from app.components.page import render
from app.components.sections import sections
from app.exhibits import architecture as exhibits
from app.exhibits import architecture_answers as answers
from app.exhibits import axes, flow
from app.frames import axes as frames_of_axes
from app.frames import axis, imbalance, kinds, steps
from app.frames.architecture import subjects
from store import Run

_TOKENS = {
    "text": table.Column("token", "text"),
    "token_class": table.Column("class", "text"),
    "occurrences": table.Column("occurrences", "count"),
    "computed": table.Column("networks", "number", "experts with a network per layer, mean over its occurrences"),
    **{kind: table.Column(words, "share", "share of its selections") for kind, words in kinds.WORDS.items()},
}
_SPREADS = {
    "load_cv": table.Column("CV of load", "number"),
    "noise_cv": table.Column("CV by chance", "number", "what a balanced router shows on so few tokens"),
    "probability_cv": table.Column("CV of P", "number", "over the experts' mean router probabilities"),
    "max_violation": table.Column("MaxVio", "number", "busiest expert over the mean, minus 1"),
    "loss": table.Column("loss", "exact", "load-balance loss, mean form; 1: satisfied"),
    "seen": table.Column("loss sees", "share", "part of the load's imbalance that the probabilities share"),
    "unseen_imbalance": table.Column("unseen", help="unbalanced, and the loss sees less than a quarter of it"),
}
_MOST_TOKENS = 12


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Architecture", run, what="What this kind of model is looked at for, as far as the run has it.")
    drawers: dict[str, Callable[[Run], None]] = {
        "f against P": _probability,
        "Shared": _shared,
        "Kinds": _kinds,
        "Steps": _steps,
        "Axes": _axes,
        "Memory": _memory,
        "Neighbours": _neighbours,
        "Router rows": _rows,
    }
    there = data.frame_list(subjects, run)
    if not there:
        st.info(
            "This run holds nothing of what this page looks at: it takes a trace, or the router's probabilities.",
            icon=":material/visibility_off:",
        )
        return
    sections({name: partial(drawers[name], run) for name in there})


def _probability(run: Run) -> None:
    answer(answers.probability, run)
    with chart.pair():
        chart.exhibit(exhibits.load_spread, run, key="load-spread")
        drawn = chart.exhibit(exhibits.load_probability, run, key="load-probability")
    if drawn:
        with st.expander("All layers as a table", icon=":material/table:"):
            table.show(
                data.frame(imbalance.spreads, run).drop("num_experts", "top_k"), key="spreads", columns=_SPREADS,
                alt="Spread of load and probability of every MoE layer", bordered=False,
                read="A row picks its layer; headings say on hovering what they measure.",
            )  # fmt: skip


def _shared(run: Run) -> None:
    domain = state.choose_domain(run.domains)
    answer(answers.shared, run, domain=domain)
    with chart.pair():
        if chart.exhibit(exhibits.shared_output, run, key="shared-output", domain=domain):
            chart.exhibit(exhibits.shared_ratio, run, key="shared-ratio")
    st.caption(
        "Who is needed? Mask the strongest experts, or switch the shared ones off, and measure the loss on the model:"
    )
    rules = "--rule mask_top=0.0625,0.125,0.25 --rule shared=off"
    st.code(f"moescope sweep MODEL --data PATH --against {shlex.quote(run.name)} {rules}", language="bash")


def _kinds(run: Run) -> None:
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        domain, phase = (
            state.choose_domain(run.domains),
            state.choose_phase(data.frame_list(frames_of_axes.phases, run)),
        )
        picked = focus.current().layer
        words = ["all layers", *([f"layer {picked}"] if picked else [])]
        of = state.choose("Classes of tokens in", words, key="classes", segmented=True)
    answer(answers.kinds, run, domain=domain, phase=phase)
    with chart.pair():
        chart.exhibit(axes.kinds, run, key="kinds", domain=domain, phase=phase)
        layer = picked if of != "all layers" else None
        drawn = chart.exhibit(axes.kind_classes, run, key=f"kind-classes-{layer}", layer=layer)
    every = data.frame(kinds.by_token, run).tokens
    if drawn and len(every):
        _token_tables(every)


def _token_tables(every: pl.DataFrame) -> None:
    """The tokens that cost least and most, of those that occur often enough."""
    used = [kind for kind in kinds.WORDS if every[kind].fill_null(0).sum()]
    shown = every.drop("token_id", *(kind for kind in kinds.WORDS if kind not in used))
    with chart.pair():
        for title, part in (("fewest", shown.head(_MOST_TOKENS)), ("most", shown.tail(_MOST_TOKENS).reverse())):
            table.show(
                part, key=f"tokens-{title}", columns=_TOKENS, alt=f"Tokens with the {title} computed experts",
                read=f"Tokens with the {title} experts that have a network, of those that occur {kinds.LEAST} times or "
                "more.", whole=every,
            )  # fmt: skip


def _steps(run: Run) -> None:
    known = [str(step) for step in steps.steps_of(run)]
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        step = int(state.choose("Step", known, key="step", segmented=True))
        of = state.choose(
            "Entropy of", list(steps.ENTROPIES), key="entropy", words=steps.ENTROPIES.__getitem__, segmented=True
        )  # fmt: skip
    answer(answers.steps, run)
    chart.exhibit(axes.step_load, run, key=f"step-load-{step}", step=step)
    with chart.pair():
        chart.exhibit(axes.step_repeat, run, key="step-repeat")
        chart.exhibit(axes.step_entropy, run, key=f"step-entropy-{of}", of=of)
    label = focus.current().layer or next(name for name in frames_of_axes.layer_labels(run) if "." in name)
    source = steps.source_of(run, label)
    if source is None:
        st.caption(f"Layer {label} is a first step: choose a later one, such as {label}.1, to see what follows on it.")
        return
    chart.exhibit(flow.transitions, run, key=f"steps-{source}-{label}", layer=label, source=source)


def _axes(run: Run) -> None:
    names = data.frame_list(axis.names, run)
    with st.container(width=220):
        name = state.choose("Axis", names, key="axis")
    answer(answers.axis, run, axis=name)
    label = focus.current().layer_in(run)
    with chart.pair():
        chosen: dict[str, Any] = {"axis": name}
        if chart.exhibit(axes.axis_distance, run, key=f"axis-{name}", **chosen):
            chart.exhibit(axes.axis_values, run, key=f"axis-values-{name}-{label}", layer=label, **chosen)
    chart.exhibit(axes.axis_shares, run, key=f"axis-shares-{name}-{label}", layer=label, **chosen)
    chart.exhibit(axes.axis_spread, run, key=f"axis-spread-{name}-{label}", layer=label, **chosen)
    if names == [axis.POSITION]:
        st.caption("Further axes, such as timestep or class, are labels of sequences: `session.label(timestep=...)`.")


def _memory(run: Run) -> None:
    answer(answers.memory, run)
    with chart.pair():
        chart.exhibit(exhibits.layer_entropy, run, key="layer-entropy")
        chart.exhibit(exhibits.layer_memory, run, key="layer-memory")


def _neighbours(run: Run) -> None:
    answer(answers.neighbours, run)
    with chart.pair():
        chart.exhibit(exhibits.neighbour_affinity, run, key="neighbour-affinity")
        chart.exhibit(exhibits.neighbour_similarity, run, key="neighbour-similarity")


def _rows(run: Run) -> None:
    answer(answers.rows, run)
    label = focus.current().layer_in(run)
    with chart.pair():
        chart.exhibit(exhibits.router_row_spread, run, key="router-row-spread")
        chart.exhibit(exhibits.router_rows, run, key=f"router-rows-{label}", layer=label)


if __name__ == "__main__":
    render(page)
