"""One sequence in two runs: its text as two linked strips, tokens that flip underlined, and where to look first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, table
from app.components.table import Column
from app.components.token_strip import token_strip
from app.exhibits.comparison import Second, numbering
from app.figures.token_colours import most_frequent
from app.frames import comparison, comparison_text
from app.frames.comparison_text import Both, Side
from app.frames.token_measure import Measure
from app.frames.token_routes import Routes
from store import Run

PART = 512
"""Tokens that a strip shows at once."""

_MODES = {"expert": "first expert", "flip": "experts lost"}
_LOST = Measure("flip", "experts that the other run does not use", "%")


def compare_text(run: Run, there: Second, found: comparison.Tables) -> None:
    """The strips of the focused sequence, or of the one that flips most; tables whose rows move the focus."""
    sequences, layer = found["sequences"], focus.current().layer_in(run)
    chosen = _sequence(sequences)
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        mode = state.choose("Colour by", list(_MODES), key="strip", words=_MODES.__getitem__, segmented=True)
        start = _part(chosen["tokens"])
    both, rows = data.large(
        _read, run, sequence=chosen["sequence"], other_sequence=chosen["other_sequence"], link=there.link,
        **there.keys,
    )  # fmt: skip
    labels, asked = both.first.routes.labels, focus.current().layer
    layer = layer if layer in labels else labels[0]
    marks = both.marks(asked if asked in labels else None)
    _strips(run, there, both, layer=layer, mode=mode, start=start, marks=marks)
    where = f"in layer {layer}" if asked in labels else "in some layer (choose one in the bar above)"
    chart.caption(
        f"Sequence {chosen['sequence']}, {state.plain(chosen['domain'])}: {len(marks):,} of {chosen['tokens']:,} "
        f"tokens flip {where}. Point at a token in one text to see it in both; click to keep it.{numbering(there)}",
        rows, None, key="compare-text",
    )  # fmt: skip
    _tables(found)


def _strips(
    run: Run, there: Second, both: Both, *, layer: str, mode: str, start: int, marks: list[int]
) -> None:  # fmt: skip
    colours = both.colours(layer)
    first = np.concatenate([frame["expert"].to_numpy() for frame in colours])
    kept = focus.current().token
    inside = pl.col("position").is_between(start, start + PART - 1)
    shown = [position for position in marks if start <= position < start + PART]
    with chart.pair():
        for name, side, colour in zip((run.name, there.name), (both.first, both.second), colours, strict=True):
            key = "strip-first" if side is both.first else "strip-second"
            total = len(side.text)
            token_strip(
                side.text.filter(inside), _cut(side, start), colour.filter(inside), layer=layer, mode=mode,
                selected=kept if kept is not None and kept < total else None, on_select=_keep(key), key=key,
                title=name, linked="compare", marks=shown, marked="flips", measure=_LOST if mode == "flip" else None,
                experts=most_frequent(first), total=total,
            )  # fmt: skip


def _cut(side: Side, start: int) -> Routes:
    routes, end = side.routes, start + PART
    return replace(routes, start=start, ids=routes.ids[:, start:end], weights=routes.weights[:, start:end])


def _sequence(frame: pl.DataFrame) -> dict[str, Any]:
    """The focused sequence where both runs have it, else the one that flips most."""
    asked = focus.current().sequence
    mine = frame.filter(sequence=asked) if asked is not None else frame.clear()
    row: dict[str, Any] = (mine if len(mine) else frame).row(0, named=True)
    return row


def _part(length: int) -> int:
    """Where the shown part begins: that of the kept token; buttons lead on."""
    token = focus.current().token
    start = (token if token is not None and token < length else 0) // PART * PART
    if length > PART:
        st.button(
            "Before", icon=":material/chevron_left:", key="part-before", disabled=start == 0, on_click=focus.pick,
            kwargs={"token": max(start - PART, 0)},
        )  # fmt: skip
        st.caption(f"tokens {start:,} to {min(start + PART, length) - 1:,} of {length:,}", width="content")
        st.button(
            "After", icon=":material/chevron_right:", key="part-after", disabled=start + PART >= length,
            on_click=focus.pick, kwargs={"token": start + PART},
        )  # fmt: skip
    return start


def _tables(found: comparison.Tables) -> None:
    with chart.pair():
        table.show(
            found["flips"], key="compare-flips", alt="Tokens that flip in most layers",
            columns={
                "text": Column("token", "text"),
                "flipped": Column("layers", "count", "layers where its set of experts differs"),
                "overlap": Column("experts in common", "share"),
                "sequence": Column("sequence", "text"), "position": Column("position", "text"),
            },
            read="Single tokens that flip in most layers. A row shows its token above.", hide=("layers",),
        )  # fmt: skip
        table.show(
            found["sequences"], key="compare-sequences", alt="Sequences that flip most",
            columns={
                "sequence": Column("sequence", "text"),                 "overlap": Column("experts in common", "share"),
                "flip_share": Column("flips", "share", "share of its tokens and layers"),
            },
            read="Sequences by the share of their tokens and layers that flip. A row shows its text above.",
            hide=("other_sequence",),
        )  # fmt: skip


def _keep(key: str) -> Callable[[], None]:
    def keep() -> None:
        position = getattr(st.session_state.get(key), "selected", None)
        if isinstance(position, int):
            focus.pick(token=position)

    return keep


def _read(run: Run, **which: Any) -> tuple[Both, pl.DataFrame]:
    both = comparison_text.both(run, **which)
    return both, comparison_text.rows(both)
