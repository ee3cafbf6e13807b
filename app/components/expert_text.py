"""The tokens of one expert: which ids it takes, and where they stand in the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from app import data, focus, state
from app.components import chart, table
from app.components.go import go
from app.components.table import Column
from app.exhibits.absent import require
from app.exhibits.exhibit import Absent
from app.frames import expert_tokens as frames
from store import Run

_KINDS = {"input": "the token itself", "predicted": "the predicted next token", "next": "the next token"}
_ORDERS = {"lift": "most its own", "count": "most often"}
_PLACES = {"weight": "largest gate weight", "random": "at random"}
_TOKENS_PAGE = str(Path(__file__).parents[1] / "views" / "tokens.py")


def section(run: Run, where: dict[str, Any]) -> None:
    """Token ids that the expert takes, and some of its tokens in their text."""
    try:
        require("The tokens of an expert", run, "trace", "order", "text")
        if not run.has_tokens:
            raise Absent("This run keeps no text. Collect without --no-text to see which tokens the expert takes.")
    except Absent as missing:
        chart.absent(missing)
        return
    tokens(run, where)
    contexts(run, where)


def tokens(run: Run, where: dict[str, Any]) -> None:
    """Token ids that the expert takes most, or more than others."""
    known = [name for name in _KINDS if name != "predicted" or run.has_predictions]
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        kind = state.choose("By", known, key="tokens", words=_KINDS.__getitem__, segmented=True)
        order = state.choose("First", list(_ORDERS), key="order", words=_ORDERS.__getitem__, segmented=True)
    frame = data.detail(frames.top_tokens, run, **where, tokens=kind, by=order)
    if frame.is_empty():
        st.write("No token id occurs often enough with this expert.")
        return
    few = f"Ids with at least {frames.MIN_OCCURRENCES} occurrences, by the low end of their share. "
    missing = "" if "predicted" in known else " Predicted tokens: level `predictions`."
    table.show(
        frame,
        key=f"expert-tokens-{kind}-{order}-{where['label']}-{where['expert']}",
        alt="Token ids that use the expert, with their share and lift",
        read=(few if order == "lift" else "") + "share: of the id's occurrences, those that use this expert; from and "
        "to: 95 %, as if tokens were independent. Spaces are shown as ␣, line ends as ⏎, parts of a character as "
        f"bytes.{missing}",
        columns={
            "text": Column("token", "text"),
            "selections": Column("to this expert", "count"),
            "share": Column("share", "bar"),
            "low": Column("from", "share"),
            "high": Column("to", "share"),
            "lift": Column("lift", "number", "share over the expert's share of all tokens; 1 = like any token"),
        },
    )


def contexts(run: Run, where: dict[str, Any]) -> None:
    """Some of its tokens with the text around them."""
    if not run.has_trace:
        return
    places = ["random"] if "weights" in run.omissions else list(_PLACES)
    by = state.choose("In the text: tokens with", places, key="context", words=_PLACES.__getitem__, segmented=True)
    frame = data.detail(frames.contexts, run, **where, by=by)
    if frame.is_empty():
        st.write("No token of kept text uses this expert.")
        return
    drawn = "one of each sequence" if by == "weight" else "drawn at random among all that use the expert"
    table.show(
        frame.select("before", "text", "after", "domain", "sequence", "position", "weight"),
        key=f"expert-contexts-{by}-{where['label']}-{where['expert']}",
        alt="Tokens of the expert, each with the text before and after it",
        read=f"{len(frame)} tokens, {drawn}. A row picks the token; the page Tokens then shows it.",
        columns={
            "before": Column("text before", "text", width="large"),
            "text": Column("token", "text", width="small"),
            "after": Column("text after", "text", width="large"),
            "weight": Column("gate weight", "number"),
            "sequence": Column("sequence", "text"),
            "position": Column("position", "text"),
        },
    )
    chosen = focus.current()
    if chosen.sequence is not None:
        position = f", token {chosen.token}" if chosen.token is not None else ""
        st.page_link(
            _TOKENS_PAGE, label=f"Read sequence {chosen.sequence}{position} on the page Tokens",
            icon=":material/text_fields:",
        )  # fmt: skip


def to_tokens(words: str, sequence: int, position: int | None) -> None:
    """A link to a token in its text."""
    go(words, _TOKENS_PAGE, icon=":material/text_fields:", sequence=sequence, token=position)
