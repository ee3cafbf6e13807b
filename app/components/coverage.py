"""The sections of the Overview on importance: is the text enough to rank experts, and do the scores agree?"""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, table
from app.components.table import Column
from app.exhibits import coverage as exhibits
from app.exhibits.exhibit import Absent
from app.frames import coverage as frames
from store import Run


def rankings(run: Run) -> None:
    """Is the text enough? Convergence of rankings, and tokens to collect."""
    try:
        needed = exhibits.measured(run, data.frame)
    except Absent as missing:
        chart.absent(missing)
        return
    scores = needed["score"].unique(maintain_order=True).to_list()
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        default = exhibits.preferred(scores)
        score = state.choose("Experts ranked by", scores, key="score", default=default, words=_words)
        goal = state.choose("Two texts should agree on", list(frames.GOALS), key="goal", words=frames.GOALS.__getitem__)
    row = needed.filter((pl.col("score") == score) & (pl.col("goal") == goal)).row(0, named=True)
    st.markdown(f"**{sentence(row)}**")
    chart.exhibit(exhibits.convergence, run, key=f"convergence-{score}-{goal}", score=score, goal=goal)
    _table(needed)


def scores(run: Run) -> None:
    """Do the importance scores agree with each other?"""
    chart.exhibit(exhibits.score_agreement, run, key="score-agreement")


def sentence(row: dict[str, object]) -> str:
    """One sentence: what two texts as long as this one would agree on, and how much more is needed."""
    what = f"{_words(str(row['score']))}, {frames.GOALS[str(row['goal'])]}"
    if row["verdict"] == "no better than chance":
        return f"Ranked by {what}: halves of this text agree no more than random rankings do. Do not cut by it yet."
    expected = (
        f"two texts as long as this one are expected to agree {row['whole']:.2f}; {row['target']:.2f} is asked for"
    )
    if row["verdict"] == "enough":
        return f"Ranked by {what}: enough. By its halves, {expected}."
    return f"Ranked by {what}: {row['verdict']} tokens. By its halves, {expected}."


def _words(score: str) -> str:
    return frames.SCORES.get(score, score)


def _table(needed: pl.DataFrame) -> None:
    shown = needed.with_columns(pl.col("score").replace(frames.SCORES)).select(
        "score", "goal", "verdict", "needed", "whole", "target", "half", "low", "high", "chance_high"
    )
    table.show(
        shown,
        key="coverage-needed",
        alt="Table: per score and goal, agreement of halves, expected agreement and tokens needed",
        read="A score that needs little text is not a better one: it is a surer one. Cuts are counted as the part of "
        "the lowest experts that both texts would take.",
        columns={
            "half": Column("halves agree", "number", width=96),
            "low": Column("from", "number", "95 % of random choices of halves", width=56),
            "high": Column("to", "number", "95 % of random choices of halves", width=56),
            "chance_high": Column("by chance", "number", "97.5 % of random rankings stay below", width=80),
            "whole": Column(
                "whole text",
                "number",
                "expected of two texts as long as this one: Spearman-Brown, from the halves",
                width=84,
            ),
            "target": Column("asked for", "number", width=78),
            "needed": Column("tokens needed", "compact", width=110),
        },
    )
