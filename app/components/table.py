"""A table: one style for all. Columns say what kind of figure they hold; a row that names an expert picks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl
import streamlit as st

from app import focus
from app.components import chart

Kind = Literal["text", "count", "number", "compact", "share", "signed", "figure", "exact", "bar", "seconds", "bytes"]

_FORMATS: dict[str, str] = {
    "count": "localized",
    "compact": "compact",
    "share": "percent",
    "signed": "%+.3f",
    "figure": "%.4g",
    "exact": "%.4f",
    "number": "%.3f",
    "bytes": "bytes",
}
ROW, MOST_HEIGHT = 35, 396
"""Pixels of a row, and the greatest height of a table: header and ten rows, cut in the eleventh so that it is seen to
go on."""


@dataclass(frozen=True)
class Column:
    """How one column is shown.

    Attributes:
        label: its words, with the unit; empty = the column's name with spaces.
        kind: count (1,234), compact (1.2K), share (12.3 %), signed, number (3 decimals), exact (4 decimals), figure
            (4 significant digits), bar (a share as a bar), bytes, seconds, or text.
        help: what it is, shown on hovering.
        width: a word, or pixels.
    """

    label: str = ""
    kind: Kind = "figure"
    help: str | None = None
    width: Literal["small", "medium", "large"] | int | None = None


COMMON: dict[str, Column] = {
    "label": Column("layer", "text"),
    "layer": Column("layer", "text"),
    "expert": Column("expert", "text"),
    "domain": Column("domain", "text"),
    "tokens": Column("tokens", "count"),
    "sequences": Column("sequences", "count"),
    "token_id": Column("id", "text"),
    "low": Column("from", "figure", "lower end of the 95 % interval"),
    "high": Column("to", "figure", "upper end of the 95 % interval"),
    "share": Column("share", "share"),
    "num_experts": Column("experts", "count"),
    "top_k": Column("top-k", "count"),
}
"""Columns that mean the same in every table."""


def show(
    frame: pl.DataFrame,
    *,
    key: str,
    alt: str,
    read: str = "",
    columns: Mapping[str, Column] | None = None,
    hide: tuple[str, ...] = (),
    bordered: bool = True,
    figure: go.Figure | None = None,
    height: int = MOST_HEIGHT,
    row: int = ROW,
    whole: pl.DataFrame | None = None,
) -> None:
    """Draw a table with the sentence that says how to read it, and its downloads.

    A table with a column ``label`` (or ``layer``), ``expert``, ``sequence`` or ``position`` lets a row be chosen; that
    moves the focus.

    Args:
        frame: what it shows; the downloads hold all of its columns.
        key: unique on the page; names the downloaded files.
        alt: what the table shows, for those who do not see it.
        read: Markdown under it.
        columns: how columns are shown, by name; beyond :data:`COMMON` and what their type suggests.
        hide: columns that are in the downloads only.
        bordered: whether it stands in a card of its own.
        figure: a chart of the same frame, for the downloads.
        height: pixels that it takes at most.
        row: pixels of a row; long texts wrap where there is room for two lines and more.
        whole: what the downloads hold, where the table shows it in other words.
    """
    shown = frame.drop(hide, strict=False)
    if {"layer", "label"} <= set(shown.columns):
        shown = shown.drop("layer", "step", strict=False)
    config = {name: _config(shown, name, {**COMMON, **(columns or {})}) for name in shown.columns}
    with st.container(border=bordered, gap="xsmall"):
        rows: dict[str, Any] = {}
        if picked := _picks(frame):
            rows = {"on_select": _on_select(f"table-{key}", frame, picked), "selection_mode": "single-row"}
        st.dataframe(
            shown, key=f"table-{key}", hide_index=True, alt=alt, column_config=config, lazy=False, placeholder="–",
            height=min(ROW + row * len(shown) + 2, height), row_height=row, **rows,
        )  # fmt: skip
        everything = frame if whole is None else whole
        if read:
            chart.caption(read, everything, figure, key=key)
        elif len(frame):
            chart.downloads(everything, figure, key=key)


def _config(frame: pl.DataFrame, name: str, known: Mapping[str, Column]) -> Any:
    column = known.get(name) or _by_type(frame.schema[name])
    common: dict[str, Any] = {"label": column.label or name.replace("_", " "), "help": column.help}
    common["width"] = column.width
    if frame.schema[name] == pl.Boolean:
        return st.column_config.CheckboxColumn(**common)
    if column.kind == "text":
        common["width"] = column.width or ("small" if name in ("label", "layer", "expert") else None)
        return st.column_config.TextColumn(**common)
    if column.kind == "bar":
        return st.column_config.ProgressColumn(**common, format="percent", min_value=0.0, max_value=1.0)
    if column.kind == "seconds":
        return st.column_config.NumberColumn(**common, format="%.3g s")
    return st.column_config.NumberColumn(**common, format=_FORMATS[column.kind])


def _by_type(dtype: pl.DataType) -> Column:
    return Column("", "count" if dtype.is_integer() else "figure" if dtype.is_float() else "text")


def _picks(frame: pl.DataFrame) -> dict[str, str]:
    """Which part of the focus each column gives."""
    sources = {
        "layer": next((name for name in ("label", "layer") if name in frame.columns), None),
        "expert": "expert" if "expert" in frame.columns else None,
        "sequence": "sequence" if "sequence" in frame.columns else None,
        "token": "position" if {"sequence", "position"} <= set(frame.columns) else None,
    }
    found = {part: name for part, name in sources.items() if name is not None}
    return {} if list(found) == ["layer"] and len(frame) < 2 else found


def _on_select(key: str, frame: pl.DataFrame, picked: dict[str, str]) -> Callable[[], None]:
    def moved() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows and rows[0] < len(frame):
            row = frame.row(rows[0], named=True)
            focus.pick(**{part: row[name] for part, name in picked.items()})

    return moved
