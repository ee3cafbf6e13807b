"""What plans of a run did, measured: the edited model beside the original on held-out text."""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import state
from app.components import chart, compress_check
from app.figures import compress_measured as figures
from app.frames import compress_measured as frames
from app.frames import evaluation
from compressor.plan import Plan
from moescope.errors import StoreError
from store import Run

_number = st.column_config.NumberColumn


def section(run: Run, plan: Plan | None) -> None:
    """Draw the section.

    plan: the one that is shown; whether it was measured is said first.
    """
    st.subheader("What it cost, measured", anchor=False)
    if plan is not None:
        compress_check.section(run, plan)
    try:
        documents = frames.documents(run)
        damages = {words: evaluation.domains(document) for words, document in documents.items()}
    except StoreError as error:
        st.error(f"The evaluations beside this run cannot be read: {state.plain(str(error), 300)}")
        return
    own = [words for words, document in documents.items() if plan is not None and document["plan"] == plan.digest]
    if plan is not None and not own:
        st.info(
            "This plan has not been measured yet. Apply it, then `moescope evaluate` puts its damage here; estimates "
            "rank plans of one size, only a measurement says what the model lost.",
            icon=":material/straighten:",
        )
    if not documents:
        return
    names = list(documents)
    chosen = state.choose("Measured plan", names, key="measured", default=own[0] if own else names[0])
    first = names[: figures.MOST] if chosen in names[: figures.MOST] else [*names[: figures.MOST - 1], chosen]
    _damage({name: damages[name] for name in first}, chosen)
    _detail(documents[chosen], chosen)


def _damage(damages: dict[str, pl.DataFrame], chosen: str) -> None:
    tokens = damages[chosen]["tokens"][0]
    together = pl.concat([frame.with_columns(plan=pl.lit(name)) for name, frame in damages.items()])
    rests_on = f"{tokens:,} predicted tokens for the chosen plan; 95 % intervals of pairs of sequences."
    with chart.pair():
        for quantity, read in (
            ("kl", "How far the edited model's next-token probabilities lie from the original's; 0 = the same. Domains "
             "far to the right lost most."),
            ("ratio", "Above 1 the edited model is more surprised by the text than the original was."),
        ):  # fmt: skip
            chart.show(
                figures.damage(damages, quantity=quantity, theme=state.theme()),
                together,
                key=f"measured-{quantity}",
                read=read,
                rests_on=rests_on,
                alt=f"Measured {quantity} by domain, for every measured plan",
            )


def _detail(document: evaluation.Document, chosen: str) -> None:
    try:
        (verdict, notes), probes = evaluation.sentences(document), evaluation.probes(document)
        written, sizes = evaluation.generation(document), evaluation.sizes(document)
        domains = evaluation.domains(document)
    except StoreError as error:
        st.error(state.plain(str(error), 300))
        return
    st.markdown(f"**{state.plain(verdict, 600)}**")
    if len(probes):
        chart.show(
            figures.probe_differences(probes, theme=state.theme()),
            probes,
            key="measured-probes",
            read="Left of the dotted line the edited model answers fewer items right than the original; red where the "
            "interval says so clearly.",
            rests_on=f"{int(probes['items'].sum()):,} items, 95 % intervals of pairs; {state.plain(chosen)}.",
            alt="Probes: change in the share of right answers, with intervals",
        )
    with st.expander("All figures: domains, generation, probes, size", icon=":material/table:"):
        _tables(domains, written, probes, sizes)
    for line in notes:
        st.caption(state.plain(line, 400))


def _tables(domains: pl.DataFrame, written: pl.DataFrame, probes: pl.DataFrame, sizes: pl.DataFrame) -> None:
    st.dataframe(
        domains,
        hide_index=True,
        alt="Damage by domain: KL, perplexities, agreement, with intervals",
        column_config={
            "tokens": _number("predicted tokens", format="localized"),
            **{name: _number(format="%.4g") for name in domains.columns if name.startswith(("kl", "ratio"))},
            "base": _number("perplexity before", format="%.4g"),
            "model": _number("after", format="%.4g"),
            "top1": _number("same next token", format="percent"),
            "routing": _number("same experts", format="percent"),
        },
    )
    ends = {name: _number(format="%.4g") for name in ("base", "model", "ratio", "difference")}
    for frame, alt in (
        (written, "What both models write"),
        (probes, "Probes of both models"),
        (sizes, "Size and speed of both models"),
    ):
        if len(frame):
            st.dataframe(frame, hide_index=True, alt=alt, column_config=ends)
