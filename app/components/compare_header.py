"""On top of Compare: what differs between the two runs, which kind of comparison that makes, and what it means."""

from __future__ import annotations

import polars as pl
import streamlit as st

import store
from app import data, state
from app.components import table
from app.components.table import Column
from app.exhibits.comparison import Second
from app.frames import comparison_kind, comparison_made
from store import Run

_SHORT = ("model", "plan applied", "weights as computed", "weights as stored", "engine", "shape", "text (SHA-256)")
"""What is named in the line of differences; the table holds all."""


def compare_header(run: Run, other: Run, there: Second) -> None:
    """The kind in words, its meaning, the differences in one line, and all of the provenance to be opened."""
    kind, frame = data.frame(_found, run, link=there.link, **there.keys)
    with st.container(border=True, gap="xsmall"):
        st.markdown(f"**{state.plain(kind.words[0].upper() + kind.words[1:], 200)}**")
        st.caption(state.plain(kind.meaning, 500))
        st.caption(_differences(frame))
        with st.expander("All of the provenance", icon=":material/compare_arrows:"):
            columns = {
                "what": Column("part", "text"), "first": Column(run.name, "text"), "second": Column(other.name, "text"),
                "verdict": Column("verdict", "text"),
            }  # fmt: skip
            table.show(
                frame, key="compare-provenance", columns=columns, alt="Provenance of both runs, side by side",
                read="What a run does not say is left empty.", bordered=False,
            )  # fmt: skip
    _doubts(other)


def _differences(frame: pl.DataFrame) -> str:
    differ = frame.filter(verdict="differs")
    named = [
        f"{row['what']} {state.code(row['first'], 60)} → {state.code(row['second'], 60)}"
        for row in differ.iter_rows(named=True)
        if row["what"] in _SHORT
    ]
    rest = [name for name in differ["what"] if name not in _SHORT]
    unknown = frame.filter(verdict="not known")["what"].to_list()
    words = [" · ".join(named) or "nothing that says what was run"]
    if rest:
        words.append("also " + ", ".join(rest))
    if unknown:
        words.append("not recorded in one of them: " + ", ".join(unknown))
    return "What differs: " + "; ".join(words) + "."


def _found(
    run: Run, *, other: str, version: object, link: comparison_made.Link | None
) -> tuple[comparison_kind.Kind, pl.DataFrame]:
    with store.open_run(other) as second:
        return comparison_kind.kind(run, second, link=link), comparison_kind.provenance(run, second, link=link)


def _doubts(other: Run) -> None:
    """The verdict on the second run's capture where it is no good one; that of the first stands in the title."""
    if other.badge.status in ("invalid", "warning"):
        words = f"The capture of {state.code(other.name)} is doubtful: {state.plain(other.badge.reason, 300)}"
        st.warning(words)
