"""Routing: which experts fire, on what, how evenly, how decided the router was, and what flows through them."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import data, state
from app.components import chart, flow, header, table
from app.components.answer import answer
from app.components.page import render
from app.components.sections import sections
from app.exhibits import routing as exhibits
from app.exhibits import routing_answers as answers
from app.exhibits import specialization
from app.exhibits.exhibit import Absent
from app.figures.curves import CONFIDENCE_WORDS
from app.frames import axes, load
from app.frames.specialization import FORMS, KINDS
from app.state import plain
from store import Run

_SCALES = {"relative": "against the uniform share", "share": "share of selections"}
_QUANTITIES = {
    "entropy": "entropy",
    "top_probability": "largest probability",
    "selected_probability": "probability selected",
    "first_margin": "first margin",
    "boundary_margin": "boundary margin",
}
_BALANCE = {
    "tokens": table.Column("tokens", "count"),
    "normalised_entropy": table.Column("normalised entropy", "exact", "1: even"),
    "effective_experts": table.Column(
        "effective experts", "figure", "as many equally loaded experts have that entropy"
    ),
    "gini": table.Column("Gini", "number", "0: even"),
    "cv": table.Column("CV", "number", "coefficient of variation; 0: even"),
    "noise_cv": table.Column("CV by chance", "number", "what a balanced router shows on so few tokens"),
    "max_violation": table.Column("MaxVio", "number", "busiest expert over the mean, minus 1"),
    "dead": table.Column("dead", "count", "experts that were never used"),
    "nearly_dead": table.Column("nearly dead", "count", "less than 5 % of the balanced load"),
    "zero_probability": table.Column("chance to be unused", "figure", "of one expert of a balanced router"),
    "expected_dead": table.Column("dead by chance", "figure", "experts that a balanced router leaves unused"),
}
assert _QUANTITIES.keys() == CONFIDENCE_WORDS.keys()


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Routing", run, what="Which experts fire, on what, how evenly, and how decided is the router?")
    sections(
        {
            "Load": lambda: _load(run),
            "Domains": lambda: _domains(run),
            "Purpose": lambda: _purpose(run),
            "Confidence": lambda: _confidence(run),
            "Pairs": lambda: flow.pairs(run),
            "Next layer": lambda: flow.next_layer(run),
        }
    )


def _load(run: Run) -> None:
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        text: dict[str, Any] = {"domain": state.choose_domain(run.domains), "phase": _phase(run)}
        scale = state.choose("Scale", list(_SCALES), key="scale", words=_SCALES.__getitem__, segmented=True)
    answer(answers.load, run, **text)
    chart.exhibit(exhibits.load, run, key="load", scale=scale, **text)
    shared = data.frame(load.shared_load, run)
    if len(shared):
        st.caption(f"{len(shared):,} shared experts see every token and stand in no map of load.")
    chart.exhibit(exhibits.balance, run, key="balance", **text)
    with st.expander("All measures as a table", icon=":material/table:"):
        table.show(
            data.frame(load.balance, run, **text), key="balance-measures", alt="Balance of every MoE layer",
            read="A row picks its layer; headings say on hovering what they measure.", columns=_BALANCE, bordered=False,
        )  # fmt: skip


def _domains(run: Run) -> None:
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        domain, phase = state.choose_domain(run.domains), _phase(run)
    answer(answers.domains, run, domain=domain, phase=phase)
    if chart.exhibit(exhibits.domain_distance, run, key="domain-distance", phase=phase):
        shown = plain(domain or "most")
        chart.exhibit(exhibits.domain_difference, run, key=f"difference-{shown}", domain=domain, phase=phase)


def _purpose(run: Run) -> None:
    try:
        kinds = specialization.kinds_of(run, data.frame)
    except Absent as missing:
        chart.absent(missing)
        return
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        kind = state.choose("Experts for", kinds, key="for", words=KINDS.__getitem__, segmented=True)
        form = state.choose(
            "Form", list(FORMS), key="form", words=FORMS.__getitem__, segmented=True,
            help="Per expert: the paper on local routing. Largest share: OLMoE.",
        )  # fmt: skip
    answer(answers.purpose, run, kind=kind, form=form)
    with chart.pair():
        key = f"specialization-{kind}-{form}"
        chart.exhibit(specialization.specialization, run, key=key, kind=kind, form=form)
        chart.exhibit(specialization.specialization_srp, run, key=f"specialization-srp-{kind}", kind=kind)
    _missing_kinds(run, kinds)


def _missing_kinds(run: Run, here: list[str]) -> None:
    """What the other kinds need."""
    if "domain" not in here:
        st.caption("Specialization in domains takes text of several domains (folders or labels).")
    if "input" not in here:
        reason = plain(run.omissions.get("text") or run.omissions.get("trace") or "this run keeps no text", 300)
        st.caption(f"Specialization in tokens takes the token ids of the text: {reason}")
    elif "predicted" not in here and not run.omissions:
        st.caption("Predicted tokens: level `predictions`.")


def _confidence(run: Run) -> None:
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        text: dict[str, Any] = {"domain": state.choose_domain(run.domains), "phase": _phase(run)}
        quantity = state.choose(
            "Quantity", list(_QUANTITIES), key="quantity", words=_QUANTITIES.__getitem__, segmented=True
        )
    answer(answers.confidence, run, quantity=quantity, **text)
    chart.exhibit(exhibits.confidence, run, key=f"confidence-{quantity}", quantity=quantity, **text)


def _phase(run: Run) -> str | None:
    return state.choose_phase(data.frame_list(axes.phases, run))


if __name__ == "__main__":
    render(page)
