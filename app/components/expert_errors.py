"""What narrower weights do to one expert: its errors by width, and the scores of importance as a table."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, header
from app.figures import expert_errors as figures
from app.frames import expert_errors as frames
from store import Run

_number = st.column_config.NumberColumn


def section(run: Run, where: dict[str, Any]) -> None:
    """Draw the section; one sentence where the run has no level errors."""
    st.subheader("What fewer bits do to it", anchor=False)
    if run.table("expert_error").is_empty():
        if not run.live:
            header.needs_level("What narrower weights do to each expert", "errors", run)
        return
    frame = data.frame(frames.errors, run, **where)
    key = f"expert-errors-{where['label']}-{where['expert']}"
    tokens = int(frame["tokens"][0]) if len(frame) else 0
    chart.show(
        figures.errors_by_width(frame, title="Change of its output by width", theme=state.theme()),
        frame,
        key=key,
        read="Below the dashed line it bears narrow weights better than the median expert of its layer. A projection "
        "whose line lies high is the one to keep wide.",
        rests_on=f"{tokens:,} sampled tokens that used the expert; groups, scales and zero points as plans have them.",
        alt="Lines: relative change of the expert's output at 1, ternary, 2, 3, 4 and 8 bits",
    )
    if not frame.is_empty():
        with st.expander("All figures: errors by width", icon=":material/table:"):
            st.dataframe(
                frame,
                hide_index=True,
                alt="Relative change of the output by width, for all projections and each alone",
                column_config={
                    name: _number(words, format="%.4g")
                    for name, words in (
                        ("whole", "all projections"), ("gate", "gate alone"), ("up", "up alone"),
                        ("down", "down alone"), ("median", "median of the layer"),
                    )
                },
            )  # fmt: skip


def scores(frame: pl.DataFrame) -> None:
    """The scores of importance of one expert as a table.

    frame: ``app.frames.expert.importance_of``.
    """
    if frame.is_empty():
        return
    with st.expander("All figures: every score of importance", icon=":material/table:"):
        st.dataframe(
            frame.select("title", "value", "unit", "rank", "of"),
            hide_index=True,
            alt="Every score of the expert with its rank in the layer",
            column_config={
                "title": "score",
                "value": _number(format="%.4g"),
                "rank": _number("rank in the layer", help="1 = the layer can spare it least"),
                "of": _number("of experts"),
            },
        )
