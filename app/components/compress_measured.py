"""What plans of a run did, measured: the edited model beside the original on held-out text."""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import state
from app.components import chart, compress_check, table
from app.components.table import Column
from app.exhibits import compress as exhibits
from app.figures import compress_measured as figures
from app.frames import compress_measured as frames
from app.frames import evaluation
from compressor.plan import Plan
from moescope.errors import StoreError
from store import Run

_DOMAINS = {
    "tokens": Column("predicted tokens", "count"), "base": Column("perplexity before"), "model": Column("after"),
    "top1": Column("same next token", "share"), "routing": Column("same experts", "share"), "kl": Column("KL, nats"),
    "ratio": Column("perplexity ratio"),
}  # fmt: skip


def section(run: Run, plan: Plan | None) -> None:
    """Draw the section.

    plan: the one that is shown; whether it was measured is said first.
    """
    if plan is not None:
        compress_check.section(run, plan)
    try:
        documents = frames.documents(run)
        for each in documents.values():
            evaluation.domains(each)  # what is damaged is said before anything is drawn
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
    _damage(run, chosen)
    _detail(documents[chosen], chosen)


def _damage(run: Run, chosen: str) -> None:
    with chart.pair():
        for quantity in ("kl", "ratio"):
            chart.draw(
                exhibits.measured(run, theme=state.theme(), quantity=quantity, chosen=chosen),
                key=f"measured-{quantity}",
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
    for frame, key, alt in (
        (domains, "domains", "Damage by domain: KL, perplexities, agreement, with intervals"),
        (written, "written", "What both models write"),
        (probes, "probes", "Probes of both models"),
        (sizes, "sizes", "Size and speed of both models"),
    ):
        if len(frame):
            columns = _DOMAINS if key == "domains" else {}
            table.show(frame, key=f"measured-{key}-table", alt=alt, columns=columns, bordered=False)
