"""The tokens of one expert: which ids it takes, and where they stand in the text."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import data, state
from app.components import chart, header
from app.frames import expert_tokens as frames
from store import Run

_KINDS = {"input": "the token itself", "predicted": "the predicted next token", "next": "the next token"}
_ORDERS = {"lift": "most its own", "count": "most often"}
_PLACES = {"weight": "largest gate weight", "random": "at random"}
_number = st.column_config.NumberColumn


def tokens(run: Run, where: dict[str, Any]) -> None:
    """Token ids that the expert takes most, or more than others."""
    st.subheader("Its tokens", anchor=False)
    if header.omitted("The tokens of an expert", run, "trace", "order", "text"):
        return
    if not run.has_tokens:
        st.info(
            "This run keeps no text. Collect without `--no-text` to see which tokens the expert takes.",
            icon=":material/visibility_off:",
        )
        return
    known = [name for name in _KINDS if name != "predicted" or run.has_predictions]
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        kind = state.choose("By", known, key="tokens", words=_KINDS.__getitem__, segmented=True)
        order = state.choose("First", list(_ORDERS), key="order", words=_ORDERS.__getitem__, segmented=True)
    frame = data.detail(frames.top_tokens, run, **where, tokens=kind, by=order)
    if frame.is_empty():
        st.write("No token id occurs often enough with this expert.")
        return
    with st.container(border=True, gap="xsmall"):
        st.dataframe(
            frame,
            hide_index=True,
            height=320,
            alt="Token ids that use the expert, with their share and lift",
            column_config={
                "token_id": _number("id"),
                "selections": _number("to this expert", format="localized"),
                "occurrences": _number(format="localized"),
                "share": st.column_config.ProgressColumn(format="percent", min_value=0.0, max_value=1.0),
                "low": _number(format="percent"),
                "high": _number(format="percent"),
                "lift": _number(format="%.2f", help="share over the expert's share of all tokens; 1 = like any token"),
            },
        )
        few = f"Ids with at least {frames.MIN_OCCURRENCES} occurrences, by the low end of their share. "
        missing = "" if "predicted" in known else " Predicted tokens: level `predictions`."
        chart.caption(
            (few if order == "lift" else "") + "share: of the id's occurrences, those that use this expert; low to "
            "high: 95 %, as if tokens were independent. Spaces are shown as ␣, line ends as ⏎, parts of a character "
            f"as bytes.{missing}",
            frame,
            None,
            key=f"expert-tokens-{kind}-{order}-{where['label']}-{where['expert']}",
        )


def contexts(run: Run, where: dict[str, Any]) -> None:
    """Some of its tokens with the text around them."""
    if not run.has_tokens or not run.has_trace:
        return
    st.subheader("In the text", anchor=False)
    places = ["random"] if "weights" in run.omissions else list(_PLACES)
    by = state.choose("Tokens with", places, key="context", words=_PLACES.__getitem__, segmented=True)
    frame = data.detail(frames.contexts, run, **where, by=by)
    if frame.is_empty():
        st.write("No token of kept text uses this expert.")
        return
    text = st.column_config.TextColumn
    with st.container(border=True, gap="xsmall"):
        st.dataframe(
            frame.select("before", "text", "after", "domain", "sequence", "position", "weight"),
            hide_index=True,
            alt="Tokens of the expert, each with the text before and after it",
            column_config={
                "before": text("text before", alignment="right", width="large"),
                "text": text("token", alignment="center"),
                "after": text("text after", width="large"),
                "weight": _number("gate weight", format="%.3f"),
            },
        )
        drawn = "one of each sequence" if by == "weight" else "drawn at random among all that use the expert"
        chart.caption(
            f"{len(frame)} tokens, {drawn}.",
            frame,
            None,
            key=f"expert-contexts-{by}-{where['label']}-{where['expert']}",
        )
