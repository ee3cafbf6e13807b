"""The section Advice: which statistic of this run suggests what, and what it speaks against."""

from __future__ import annotations

import streamlit as st

from app import data
from app.components import table
from app.components.table import Column
from app.frames import what_if_advice as frames
from store import Run


def section(run: Run) -> None:
    """Draw the section."""
    frame = data.frame(frames.advice, run)
    if frame.is_empty():
        st.info(
            "This run holds no statistic that speaks for or against other routing.", icon=":material/visibility_off:"
        )
        return
    holds = frame.filter("holds")
    if holds.is_empty():
        st.markdown(f"**Nothing** stands out: none of {len(frame)} statistics of this run calls for other routing.")
    else:
        st.markdown(f"**{len(holds)} of {len(frame)}** statistics of this run speak for something:")
        st.markdown("\n".join(f"- {_words(row)}" for row in frames.plain_rows(holds)))
        if words := frames.disputed(holds):
            st.markdown(f"They disagree on **{', '.join(words)}**: only a live run decides.")
    table.show(
        frame.select("holds", "statistic", "text", "threshold", "suggest", "avoid"), key="advice", row=72, height=900,
        alt="Statistics of the run and what follows from them",
        read="What follows holds where the statistic lies on the named side of its threshold; thresholds are rules of "
        "thumb. Quality needs a live run.",
        columns={
            "holds": Column("holds", width=60), "statistic": Column("statistic", "text", width=250),
            "text": Column("observed", "text", width=110), "threshold": Column("turns at", "text", width=110),
            "suggest": Column("worth trying", "text", width=240), "avoid": Column("not worth it", "text", width=200),
        },
    )  # fmt: skip


def _words(row: dict[str, str]) -> str:
    """One statistic and what follows, in Markdown."""
    parts = [f"**{row['statistic']}**: {row['text']} ({row['threshold']})"]
    parts += [f"worth trying: {row['suggest']}"] if row["suggest"] else []
    parts += [f"not worth it: {row['avoid']}"] if row["avoid"] else []
    return "; ".join(parts) + "."
