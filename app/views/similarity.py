"""Similarity: which experts of a layer are alike, by which measure, and do the measures agree?"""

from __future__ import annotations

from functools import partial

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, header, table
from app.components.page import render
from app.components.sections import sections
from app.components.table import Column
from app.exhibits import similarity as exhibits
from app.exhibits.exhibit import Absent
from app.frames import similarity as frames
from store import Run

# Columns of further kinds that fit beside the chosen one.
MOST_KINDS = 5


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Similarity", run, what="Which experts of a layer are alike, by which measure, and do these agree?")
    try:
        names = exhibits.kinds_here(run, data.frame)
    except Absent as missing:
        chart.absent(missing)
        return
    label = focus.current().layer_in(run)
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        kind = _choose_kind("Similarity of", names, key="kind", preferred=exhibits.PREFERRED)
        other = _choose_kind("Beside it", names, key="beside", preferred=exhibits.BESIDE)
    drawers = {
        "Maps": partial(_maps, run, label=label, kinds=(kind, other)),
        "Pairs": partial(_pairs, run, label=label, kind=kind, other=other),
        "Layers": partial(_layers, run, kind=kind),
        "Agreement": partial(_agreement, run, label=label, kinds=(kind, other)),
        "Kinds": partial(_kinds, run),
    }
    sections(drawers)


def _choose_kind(label: str, names: list[str], *, key: str, preferred: tuple[str, ...]) -> str:
    default = next((name for name in preferred if name in names), names[-1])
    return state.choose(label, names, key=key, default=default, words=exhibits.title)


def _maps(run: Run, *, label: str, kinds: tuple[str, str]) -> None:
    """Two kinds beside each other, in the order that the first one makes."""
    scale = state.choose(
        "Written", list(frames.SCALES), key="scale", words=frames.SCALES.__getitem__, segmented=True,
        help="Look-into-MoEs writes a cosine as an angle, SERE and HC-SMoE as (s + 1) / 2. Ranks stay as they are.",
    )  # fmt: skip
    with chart.pair():
        for kind in dict.fromkeys(kinds):
            chart.exhibit(
                exhibits.pairs, run, key=f"similarity-{kind}-{label}", layer=label, kind=kind, order=kinds[0],
                scale=scale,
            )  # fmt: skip


def _pairs(run: Run, *, label: str, kind: str, other: str) -> None:
    """The pairs that are most alike by one kind, with the other kinds beside it."""
    frame = data.frame(frames.nearest_pairs, run, label=label, kind=kind)
    if frame.is_empty():
        st.write(f"This run says nothing of {exhibits.title(kind)} in layer {state.plain(label)}.")
        return
    st.subheader(f"Most alike by {exhibits.title(kind)}, layer {label}", anchor=False)
    beside = [other] if other in frame.columns and other != kind else []
    kinds = [*beside, *(name for name in frame.columns[3:] if name not in (kind, other))]
    shown = frame.select(pl.lit(label).alias("label"), "expert", "other", kind, "joint_tokens", *kinds)
    columns = {name: Column(exhibits.title(name), "number") for name in (kind, *kinds)}
    table.show(
        shown,
        key=f"similar-pairs-{kind}-{label}",
        alt="The pairs of experts that are most alike, by every kind of similarity",
        read="A pair that is alike by all kinds is a candidate for merging; one that is alike by weights only is not "
        "used alike. Weighted outputs say little where the joint tokens are few. All kinds are in the download. A row "
        "picks the first of its experts; the page Expert lists all neighbours of one.",
        hide=("label", *kinds[MOST_KINDS:]),
        columns={
            **columns,
            "expert": Column("expert", "text", width=62),
            "other": Column("and", "text", width=62),
            "joint_tokens": Column("joint tokens", "count", "tokens that used both experts"),
        },
    )


def _layers(run: Run, *, kind: str) -> None:
    if not chart.exhibit(exhibits.over_layers, run, key=f"redundancy-{kind}", kind=kind):
        return
    frame = data.frame(frames.redundancy, run, kind=kind)
    table.show(
        frame.select("label", "largest", "expert", "other", "p50", "above_50", "above_70", "above_90", "pairs"),
        key=f"redundancy-table-{kind}",
        alt="Every layer: its most alike pair and how many pairs are alike",
        read="A row picks the layer and the first expert of its most alike pair.",
        columns={
            "largest": Column("most alike pair", "number"),
            "other": Column("and", "text"),
            "p50": Column("median pair", "number"),
            "above_50": Column("above 0.5", "count"),
            "above_70": Column("above 0.7", "count"),
            "above_90": Column("above 0.9", "count"),
            "pairs": Column("pairs", "count"),
        },
    )


def _agreement(run: Run, *, label: str, kinds: tuple[str, str]) -> None:
    if chart.exhibit(exhibits.agreement, run, key=f"agreement-{label}", layer=label):
        chart.exhibit(
            exhibits.agreement_over_layers, run, key=f"agreement-{kinds[0]}-{kinds[1]}", kind=kinds[0], beside=kinds[1]
        )


def _kinds(run: Run) -> None:
    """What each kind is, and what those that are missing need."""
    known = data.frame(frames.kinds, run)
    level = pl.when(~pl.col("here")).then(pl.col("missing").fill_null("level " + pl.col("level")))
    table.show(
        known.select("title", "here", level.alias("needs")),
        key="kinds",
        alt="Every kind of similarity, and whether this run has it",
        read="docs/metrics.md says what each kind compares. Missing levels: collect again with `--level`.",
        columns={
            "title": Column("kind", "text"),
            "here": Column("this run has it"),
            "needs": Column("needs", "text", width="large"),
        },
    )


if __name__ == "__main__":
    render(page)
