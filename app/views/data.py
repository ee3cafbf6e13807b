"""Data: SQL over the run, its tables, the methods that it serves, and files to take away."""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, state
from app.components import data_files, data_sql, data_tables, header, table
from app.components.page import render
from app.components.sections import sections
from app.frames.methods import methods
from store import Run

_SHOWN = ("all", "this run has it", "not for this run", "not here")
_LEVELS = ("all", "model", "system", "hardware", "analysis")


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Data", run, what="What is in the run, in any form: ask it, look through it, take it away.")
    sections({
        "SQL": lambda: data_sql.section(run),
        "Tables": lambda: data_tables.section(run),
        "Methods": lambda: _methods(run),
        "Files": lambda: data_files.section(run),
    })  # fmt: skip


def _methods(run: Run) -> None:
    frame = data.frame(methods, run)
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        level = state.choose("Level", _LEVELS, key="taxonomy", segmented=True)
        shown = state.choose("Show", _SHOWN, key="methods", segmented=True)
    here = pl.col("here") != "not here"
    kept = frame.filter(
        {
            "this run has it": pl.col("available"),
            "not for this run": here & ~pl.col("available"),
            "not here": ~here,
        }.get(shown, pl.lit(True)),
        pl.lit(True) if level == "all" else pl.col("level") == level,
    )
    built, has = frame.filter(here), frame.filter("available")
    if kept.is_empty():
        st.info("No method of this kind.", icon=":material/filter_alt_off:")
        return
    named = pl.when(pl.col("method") == "").then(pl.lit("–")).otherwise("method").alias("method")
    order = ["level", "group", "method", "available", "here", "where", "needs", "reason", "paper"]
    table.show(
        kept.with_columns(named).select(order),
        key="methods",
        alt="Methods by taxonomy, what each is here, and whether this run has what it needs",
        columns={
            "level": table.Column("level", "text", width=66),
            "group": table.Column("class", "text", width=150),
            "method": table.Column("method", "text", width=230),
            "available": table.Column("this run", "text", "whether this run has what it needs", width=66),
            "here": table.Column("here it is", "text", width=86),
            "where": table.Column("where", "text", width=190),
            "needs": table.Column("needs", "text", "levels of the collection, or what else a run must have", width=160),
            "reason": table.Column("remark", "text"),
            "paper": table.Column("paper", "text"),
        },
        hide=() if level == "all" else ("level",),
        read="Classes of the survey arXiv 2412.14219, in its order; empty ones are shown as such. "
        f"{len(built):,} methods are built, and this run has what {len(has):,} of them need. The level analysis is "
        "ours: profiles, scores and evaluations have no class there.",
        height=680,
    )


if __name__ == "__main__":
    render(page)
