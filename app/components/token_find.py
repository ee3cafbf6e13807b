"""Finding sequences to read: all of a domain, those with some text, those that use an expert, those that flip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import table
from app.components.pager import pager
from app.components.table import Column
from app.frames import token_find, token_flips, tokens
from moescope.errors import MoescopeError
from store import Run

PAGE = 50
"""Rows of a page of the list."""

HEIGHT = 254
"""Pixels of the list, so that the text stays in sight below it."""

BEFORE = 24
"""Letters before a hit in the list."""

WAYS = {
    "off": "nothing", "all": "all sequences", "text": "text", "expert": "tokens of the expert", "flips": "flips",
}  # fmt: skip

_COLUMNS = {
    "hits": Column("tokens of the expert", "count"),
    "share": Column("share of its tokens", "share"),
    "weight": Column("largest gate weight", "number"),
    "position": Column("at token", "text", "where its row leads: the first, or the one with the largest gate weight"),
    "before": Column("text before", "text", width="medium"),
    "match": Column("found", "text", width="small"),
    "after": Column("text after", "text", width="medium"),
    "other_sequence": Column("there", "text", "the same text in the other run"),
    "prompt_tokens": Column("of the prompt", "count"),
}


@dataclass(frozen=True)
class Finding:
    """What is looked for, and what was found.

    Attributes:
        way: one of :data:`WAYS`.
        wanted: the text that is looked for.
        regex: whether it is a regular expression.
        found: the sequences with a hit, in the order of the list; None = no list.
        position: the token to begin with in the first of them.
    """

    way: str = "off"
    wanted: str = ""
    regex: bool = False
    found: pl.DataFrame | None = field(default=None, compare=False)


def ways(run: Run, others: list[str]) -> list[str]:
    """What this run can be searched by."""
    known = {"text": run.has_tokens, "flips": bool(others)}
    return [way for way in WAYS if known.get(way, True)]


def find(run: Run, *, way: str, domain: str | None, other: Callable[[], Run | None]) -> Finding:
    """Ask what is looked for, and draw the list of what is found; a row moves the focus there."""
    if way == "off":
        return Finding()
    if way == "all":
        frame = data.frame(tokens.sequences, run, domain=domain)
        return Finding(way, found=_list(frame, f"{len(frame):,} sequences", hide=("source",)))
    if way == "text":
        return _text(run, domain)
    if way == "expert":
        return _expert(run, domain)
    return _flips(run, domain, other())


def _text(run: Run, domain: str | None) -> Finding:
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        wanted = st.text_input(
            "Text", key="text", bind="query-params", max_chars=500,
            placeholder="words, in upper or lower case, across tokens and line ends",
        )  # fmt: skip
        regex = state.choose_flag("Regular expression", key="regex", default=False)
    if not (wanted or "").strip():
        return Finding("text")
    try:
        found = data.made(token_find.by_text, run, wanted=wanted, regex=regex, domain=domain)
    except MoescopeError as error:
        st.warning(state.plain(str(error), 400))
        return Finding("text")
    frame = found.frame
    words = f"{int(frame['hits'].sum()):,} hits in {len(frame):,} of {found.searched:,} sequences"
    if not found.complete:
        words += f"; the time was over before the other {found.sequences - found.searched:,} were searched"
    columns = {"hits": Column("hits", "count")}
    return Finding("text", wanted, regex, _list(frame, words, columns=columns, order=_SNIPPETS))


_SNIPPETS = ("sequence", "domain", "tokens", "hits", "before", "match", "after", "position")


def _expert(run: Run, domain: str | None) -> Finding:
    label, expert = focus.current().layer_in(run), focus.current().expert_in(run)
    with st.spinner("Looking through the trace of the layer"):
        frame = data.made(token_find.by_expert, run, label=label, expert=expert, domain=domain)
    words = (
        f"Expert {expert} of layer {label} takes {int(frame['hits'].sum()):,} tokens in {len(frame):,} sequences; the "
        "focus bar above chooses both"
    )
    return Finding("expert", found=_list(frame, words))


def _flips(run: Run, domain: str | None, other: Run | None) -> Finding:
    if other is None:
        return Finding()
    label = focus.current().layer_in(run)
    try:
        with st.spinner("Comparing the two runs, token by token"):
            found = data.frames_of_two(token_flips.sequences, run, other, label=label)
    except MoescopeError as error:
        st.info(f"These cannot be compared: {state.plain(str(error), 400)}", icon=":material/compare_arrows:")
        return Finding()
    frame = found["sequences"]
    frame = frame if domain is None else frame.filter(pl.col("domain") == domain)
    paired = "their tokens" if found["about"]["by"][0] == "token ids" else "number and length"
    words = (
        f"{int(frame['hits'].sum()):,} of {int(frame['tokens'].sum()):,} tokens use another set of experts of layer "
        f"{label} in {state.plain(other.name)}; {len(frame):,} sequences, paired by {paired}"
    )
    return Finding("flips", found=_list(frame, words, columns={"hits": Column("tokens flipped", "count")}))


def _list(
    frame: pl.DataFrame,
    words: str,
    *,
    columns: dict[str, Column] | None = None,
    order: tuple[str, ...] = (),
    hide: tuple[str, ...] = (),
) -> pl.DataFrame:
    """One page of the list."""
    pages = max(-(-len(frame) // PAGE), 1)
    with st.container(border=True, gap="xsmall"):
        at = pager(pages, key="list")
        shown = frame[(at - 1) * PAGE : at * PAGE]
        if len(shown):
            shown = shown.select(order or shown.columns).with_columns(
                pl.col(pl.String).str.replace_all("\n", "⏎").str.replace_all("\t", "⇥")
            )
            if "before" in shown.columns:  # what stands next to the hit is what is seen
                shown = shown.with_columns(pl.col("before").str.tail(BEFORE))
            table.show(
                shown, key="found", alt=f"Sequences: {words}", read=f"{words}. A row shows its sequence below.",
                columns={**_COLUMNS, **(columns or {})}, hide=hide, bordered=False,
                height=HEIGHT,
            )  # fmt: skip
        else:
            st.caption(f"{words}.")
    return frame
