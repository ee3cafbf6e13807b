"""Routing: which experts fire, on what, how evenly, how decided the router was, and what flows through them."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, flow, header, specialization
from app.components.page import render
from app.exhibits import routing as exhibits
from app.figures import consistency as consistency_figures
from app.figures import curves, heatmap
from app.figures.style import safe
from app.frames import axes, confidence, consistency, domains, load
from app.frames.axes import most
from store import Run

_SCALES = {"relative": "against the uniform share", "share": "share of selections"}
_READ_CONFIDENCE = {
    "entropy": "Low entropy: the router prefers few experts clearly. The band holds the middle 80 % of the tokens.",
    "top_probability": "Near 1 a single expert decides; near 1/E the router hardly tells the experts apart.",
    "selected_probability": "Probability that falls on the selected experts: what is missing to 1 is what top-k "
    "throws away.",
    "first_margin": "How far the first choice leads. Small values mean that the order of the first two hardly matters.",
    "boundary_margin": "Small values mean that rounding or quantisation can flip which expert is taken last.",
}


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Routing", run, what="Which experts fire, on what, how evenly, and how decided is the router?")
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        domain = state.choose_domain(run.domains)
        phase = state.choose_phase(data.frame_list(axes.phases, run))
        scale = state.choose("Scale", list(_SCALES), key="scale", words=_SCALES.__getitem__, segmented=True)
    where = ", ".join(part for part in (domain, phase) if part) or "all text"
    _load(run, domain=domain, phase=phase, scale=scale)
    _balance(run, domain=domain, phase=phase, where=where)
    _specialization(run, domain=domain, phase=phase)
    specialization.section(run)
    _confidence(run, domain=domain, phase=phase, where=where)
    _repetition(run)
    flow.section(run, domain=domain, phase=phase)


def _load(run: Run, *, domain: str | None, phase: str | None, scale: str) -> None:
    chart.exhibit(exhibits.load, run, key="load", domain=domain, phase=phase, scale=scale)
    shared = data.frame(load.shared_load, run)
    if len(shared):
        st.caption(f"{len(shared):,} shared experts see every token and stand in no map of load.")


def _balance(run: Run, *, domain: str | None, phase: str | None, where: str) -> None:
    st.subheader("Balance of every layer", anchor=False)
    frame = data.frame(load.balance, run, domain=domain, phase=phase)
    chart.show(
        curves.balance_curves(frame, where=safe(where), theme=state.theme()),
        frame,
        key="balance",
        read="An even load has entropy 1 and the others 0. The dotted line is the coefficient of variation that a "
        "balanced router shows on so few tokens by chance; MaxVio 3 means that the busiest expert takes four times "
        "the mean.",
        rests_on=f"{most(frame['tokens']):,.0f} tokens per layer.",
        alt="Curves over the layers: normalised entropy, Gini, coefficient of variation, MaxVio",
    )
    with st.expander("All measures as a table", icon=":material/table:"):
        st.dataframe(
            frame.drop("layer", "step"), hide_index=True, alt="Balance of every MoE layer", column_config=_columns()
        )


def _specialization(run: Run, *, domain: str | None, phase: str | None) -> None:
    st.subheader("Do domains use different experts?", anchor=False)
    if len(run.domains) < 2:
        st.write("This run has one domain. Collect text of several (folders or labels) to see what tells them apart.")
        return
    moved = data.frame(domains.specialization, run, phase=phase)
    chart.show(
        curves.specialization_curves(moved, domains=run.domains, theme=state.theme()),
        moved,
        key="specialization",
        read="0 % means that the domain uses the experts like the mean of all domains; 30 % means that 30 % of its "
        "selections would have to go elsewhere. Every domain counts alike in the mean.",
        alt="Curves over the layers: distance of each domain's load from the mean of the domains",
    )
    shown = domain or run.domains[0]
    frame = data.frame(domains.domain_shares, run, phase=phase).filter(pl.col("domain") == shown)
    hint = "" if domain else " Choose another domain above."
    chart.show(
        heatmap.difference_map(frame, domain=shown, theme=state.theme()),
        frame,
        key=f"difference-{shown}",
        read="Blue experts take more of this domain's selections than of the mean of the domains, orange ones "
        f"less.{hint}",
        rests_on=f"{frame['tokens'].sum():,} selections.",
        alt=f"Map of layers and experts: load of {shown} minus the mean",
    )


def _confidence(run: Run, *, domain: str | None, phase: str | None, where: str) -> None:
    st.subheader("How decided is the router?", anchor=False)
    frame = data.frame(confidence.confidence, run, domain=domain, phase=phase)
    if header.omitted("How decided the router was", run, "logits"):
        return
    if frame.is_empty():
        st.info("The router's logits were not seen in this run.", icon=":material/visibility_off:")
        return
    words = {
        "entropy": "entropy",
        "top_probability": "largest probability",
        "selected_probability": "probability selected",
        "first_margin": "first margin",
        "boundary_margin": "boundary margin",
    }
    quantity = state.choose("Quantity", list(words), key="quantity", words=words.__getitem__, segmented=True)
    chart.show(
        curves.confidence_band(frame, quantity=quantity, where=safe(where), theme=state.theme()),
        frame,
        key=f"confidence-{quantity}",
        read=_READ_CONFIDENCE[quantity],
        rests_on=f"{most(frame['tokens']):,.0f} tokens per layer; percentiles from histograms.",
        alt=f"Band over the layers: {words[quantity]} of the router",
    )


def _repetition(run: Run) -> None:
    frame = data.frame(consistency.repetition, run)
    st.subheader("Do neighbouring tokens share experts?", anchor=False)
    if header.omitted("Repetition of experts", run, "trace", "order"):
        return
    if frame.is_empty():
        header.not_yet("Repetition of experts", run)
        return
    chart.show(
        consistency_figures.repetition_curves(frame, theme=state.theme()),
        frame,
        key="repetition",
        read="How often the next token has the same first choice, and which part of its experts it shares. Shuffled "
        "tokens say what popularity alone gives; only what lies above is order in the text.",
        alt="Curves over the layers: repetition of experts between neighbouring tokens",
    )


def _columns() -> dict[str, Any]:
    number = st.column_config.NumberColumn
    return {
        "label": st.column_config.TextColumn("layer"),
        "num_experts": number("experts"),
        "top_k": number("top-k"),
        "tokens": number("tokens", format="localized"),
        "normalised_entropy": number("normalised entropy", format="%.4f"),
        "effective_experts": number("effective experts", format="%.1f"),
        "gini": number("Gini", format="%.3f"),
        "cv": number("CV", format="%.3f"),
        "noise_cv": number("CV by chance", format="%.3f"),
        "max_violation": number("MaxVio", format="%.2f"),
        "dead": number("dead"),
        "nearly_dead": number("nearly dead"),
        "zero_probability": number("chance to be unused", format="%.1e"),
        "expected_dead": number("dead by chance", format="%.2g"),
    }


if __name__ == "__main__":
    render(page)
