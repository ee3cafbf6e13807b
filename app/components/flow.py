"""Two sections of the page Routing: experts that meet in a token, and experts that follow in the next layer."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, table
from app.components.answer import answer
from app.exhibits import flow as exhibits
from app.exhibits import routing_answers as answers
from app.exhibits.absent import needs_level
from app.exhibits.exhibit import Absent
from app.frames import axes
from app.frames import flow as frames
from profiler.metrics.transitions import EXTRA
from store import Run

_PAIRS = {
    "other": table.Column("other expert", "text"),
    "joint_tokens": table.Column("joint tokens", "count", "tokens that use both"),
    "expected": table.Column("by popularity", "count", "joint tokens that popularity alone would give"),
    **{name: table.Column(words, "number") for name, words in frames.MEASURES.items()},
}
_EARLY = {
    "distance": table.Column("layers ahead", "count"),
    "input": table.Column("router's input", "text"),
    "value": table.Column("recall", "share"),
    "exact": table.Column("whole choices", "share", "tokens whose whole choice was fetched"),
    "chance": table.Column("recall by chance", "share"),
    "first_choice": table.Column("first choices", "share"),
    "cosine": table.Column("cosine of the inputs", "number"),
}
_SHOWN_PAIRS = 50


def pairs(run: Run) -> None:
    """Draw the section on experts that meet."""
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        domain = state.choose_domain(run.domains)
        measure = state.choose("Pairs by", list(frames.MEASURES), key="pairs", words=frames.MEASURES.__getitem__)
    label = focus.current().layer_in(run) if run.layers else None
    answer(answers.pairs, run, layer=label, domain=domain)
    with chart.pair():
        key = f"pairs-{measure}-{label}"
        drawn = chart.exhibit(
            exhibits.expert_pairs, run, key=key, layer=label, measure=measure, domain=domain
        )  # fmt: skip
        if drawn or len(data.frame(frames.excess, run)):
            chart.exhibit(exhibits.pair_excess, run, key="pair-excess")
    if drawn and label is not None:
        best = frames.strongest(data.frame(frames.pairs, run, label=label, domain=domain)).head(_SHOWN_PAIRS)
        with st.expander(f"Pairs of layer {label} that attract each other most", icon=":material/join_inner:"):
            table.show(
                best, key=f"strongest-{label}", alt="Pairs of experts by attraction", columns=_PAIRS, bordered=False,
                read=f"Pairs that popularity alone would give {frames.LEAST_EXPECTED} tokens or more; ratios of others "
                "are noise.",
            )  # fmt: skip


def next_layer(run: Run) -> None:
    """Draw the section on experts that follow, and on what can be foreseen."""
    early = not data.frame(frames.lookaheads, run).is_empty()
    try:
        label, near = exhibits.ends_of(run, focus.current().layer, None)
    except Absent as missing:
        chart.absent(missing)
        return
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        domain = state.choose_domain(run.domains)
        phase = state.choose_phase(data.frame_list(axes.phases, run)) if early else None
        source = state.choose("From layer", frames.sources(run, label), key="from", default=near)
        words = {str(extra): "k experts" if not extra else f"k + {extra} experts" for extra in range(EXTRA + 1)}
        extra = int(state.choose("Fetched", list(words), key="fetched", words=words.__getitem__))
    answer(answers.foresight, run, domain=domain, phase=phase)
    with chart.pair():
        key = f"transitions-{source}-{label}"
        chart.exhibit(exhibits.transitions, run, key=key, layer=label, source=source, domain=domain)
        chart.exhibit(exhibits.transition_information, run, key="transition-information")
        text: dict[str, Any] = {"domain": domain, "phase": phase}
        if chart.exhibit(exhibits.foreseen, run, key=f"foreseen-{extra}", extra=extra, **text):
            chart.exhibit(exhibits.foreseen_widths, run, key=f"widths-{label}", layer=label, **text)
    _early(run, data.frame(frames.lookaheads, run, **text))


def _early(run: Run, frame: pl.DataFrame) -> None:
    if frame.is_empty():
        try:
            missing = needs_level("What routers foresee when they are run early", "lookahead", run)
        except Absent as why:
            missing = why
        chart.absent(missing)
        return
    with st.expander("Early routers as a table", icon=":material/table:"):
        table.show(
            frame.filter(pl.col("extra") == 0).drop("extra", "fetched"), key="early-routers", columns=_EARLY,
            alt="Recall, whole choices, first choices and cosine of routers that were run early", bordered=False,
            read="k experts fetched; first positions are left out. Sums of all sequences: there is no interval.",
        )  # fmt: skip
