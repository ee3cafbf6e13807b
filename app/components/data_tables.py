"""The section Tables: any table of a run, filtered, ordered, and page by page."""

from __future__ import annotations

import polars as pl
import streamlit as st

import store
from app import data, state
from app.components import table
from app.components.data_sql import column_of
from app.frames.plain import flat
from app.text import sentence
from moescope.errors import StoreError
from store import Filter, Run

PAGE = 100
"""Rows of a page."""

_ANY = "any"
_KINDS = ("equals", "at least", "at most", "matches", "is missing")
_FILTERS = 2


def section(run: Run) -> None:
    """Draw the section."""
    known = data.reference(store.describe).filter(pl.col("table") != "route")  # SQL asks the trace better
    names = known["table"].unique(maintain_order=True).to_list()
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        name = state.choose("Table", names, key="table", default="expert_load")
        part = known.filter(pl.col("table") == name)
        columns = part["column"].to_list()
        order = state.choose("Order by", [_ANY, *columns], key="order", words=lambda text: _words(text, "as stored"))
        down = state.choose_flag("largest first", key="descending", default=False)
    *places, last = st.columns([5] * _FILTERS + [2], gap="medium")
    where = []
    for number, place in enumerate(places, start=1):
        with place:
            found = _filter(columns, number)
            where += [found] if found is not None else []
    try:
        _, count = store.browse(run, name, where=where, rows=0)
        pages = max(1, -(-count // PAGE))
        with last:
            page = state.choose_number(f"Page of {pages:,}", key="sheet", low=1, high=pages, default=1)
        frame, _ = store.browse(
            run, name, where=where, order=None if order == _ANY else order, descending=down, start=(page - 1) * PAGE,
            rows=PAGE,
        )  # fmt: skip
    except StoreError as error:
        st.error(state.plain(str(error), 400), icon=":material/error:")
        return
    if not count:
        st.info("No rows." if not where else "No rows meet these conditions.", icon=":material/table_rows:")
        return
    first = (page - 1) * PAGE
    about = state.plain(sentence(part["about"][0]), 400)
    shown = flat(frame, limit=200)
    table.show(
        shown, key=f"rows-of-{name}", alt=f"Rows of table {name}", whole=frame, height=620,
        columns={one: column_of(one, kind) for one, kind in shown.schema.items()},
        read=f"{about} Rows {first + 1:,} to {first + len(frame):,} of {count:,}; downloads hold these rows. The "
        "section SQL and `moescope show RUN TABLE` have all.",
    )  # fmt: skip


def _filter(columns: list[str], number: int) -> Filter | None:
    """One condition, or none."""
    first, second, third = st.columns((3, 3, 3), gap="xsmall", vertical_alignment="bottom")
    with first:
        column = state.choose(
            "Where" if number == 1 else "and", [_ANY, *columns], key=f"where-{number}",
            words=lambda text: _words(text, "any row"),
        )  # fmt: skip
    if column == _ANY:
        return None
    with second:
        kind = state.choose("Condition", _KINDS, key=f"is-{number}", hidden=True)
    if kind == "is missing":
        return Filter(column, "is missing")
    with third:
        value = st.text_input(
            "Value", key=f"value-{number}", bind="query-params", max_chars=200, label_visibility="collapsed",
            placeholder="regular expression" if kind == "matches" else "value",
        )  # fmt: skip
    return Filter(column, kind, value) if value else None  # type: ignore[arg-type]


def _words(text: str, any_: str) -> str:
    return any_ if text == _ANY else text
