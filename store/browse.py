"""Looking through the tables of a run: what there is, and any part of a table, filtered and page by page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from moescope.errors import StoreError
from store import derived
from store.run import Run
from store.schema import quoted, tables

_VIEW_COLUMNS = {
    "layer": ("integer", "decoder layer"),
    "step": ("integer", "0 unless the layer calls its experts several times"),
    "sequence": ("uinteger", "number of the sequence"),
    "position": ("uinteger", "token of the sequence, from 0"),
    "rank": ("utinyint", "0 = largest gate weight"),
    "expert": ("usmallint", "selected expert"),
    "weight": ("float", "gate weight"),
}
_METRIC_MEANINGS = {
    "metric": "name in docs/metrics.md",
    "version": "version of its formula",
    "parameters": "JSON with sorted keys",
    "control": "observed | shuffled_in_sequence | shuffled | uniform | lower_bound",
    "domain": "null: all domains pooled",
    "layer": "null: the whole model",
    "expert": "null: the whole layer; of metric_vector the row of the matrix",
    "to_layer": "layer whose experts are the columns; null: the same layer",
    "at": "abscissa: segment length, cache size, lag; null where there is none",
    "value": "in the unit that docs/metrics.md gives",
    "values": "one entry per expert, or as the metric says",
    "low": "lower end of the 95 % interval over sequences",
    "high": "upper end",
    "tokens": "what the value rests on",
    "sequences": "what the value rests on",
}

_CONDITIONS = {"equals": "= ?", "at least": ">= ?", "at most": "<= ?"}
Kind = Literal["equals", "at least", "at most", "matches", "is missing"]


@dataclass(frozen=True)
class Filter:
    """A condition on one column.

    Attributes:
        column: its name.
        kind: ``equals``, ``at least``, ``at most``, ``matches`` (a regular expression found in it as text), or
            ``is missing``.
        value: what is compared with; text is read as the column's type.
    """

    column: str
    kind: Kind
    value: Any = None


def describe() -> pl.DataFrame:
    """All that SQL can ask of a run: one row per column with table, about (the table), column, type, meaning."""
    rows = [
        (table.name, table.meaning, column.name, column.type, column.meaning)
        for table in tables().values()
        for column in table.columns
    ]
    about = "view: the trace, one row per selection"
    rows += [("route", about, name, kind, meaning) for name, (kind, meaning) in _VIEW_COLUMNS.items()]
    about = "results of metrics, computed from the run"
    rows += [
        (table, about, name, kind, _METRIC_MEANINGS.get(name, ""))
        for table, columns in derived.TABLES.items()
        for name, kind in columns.items()
    ]
    return pl.DataFrame(rows, schema=["table", "about", "column", "type", "meaning"], orient="row")


def browse(
    run: Run,
    table: str,
    *,
    where: Sequence[Filter] = (),
    order: str | None = None,
    descending: bool = False,
    start: int = 0,
    rows: int = 100,
    seconds: float = 10.0,
) -> tuple[pl.DataFrame, int]:
    """Some rows of a table or view, and how many meet the conditions.

    Raises:
        StoreError: no such table or column, a value that is not of the column's type, a bad regular expression, or it
            took longer than ``seconds``.
    """
    known = describe().filter(pl.col("table") == table)
    if known.is_empty():
        there = describe()["table"].unique(maintain_order=True)
        raise StoreError(f"no table {table!r} in a run; there are {', '.join(there)}")
    types = dict(known.select("column", "type").iter_rows())
    conditions, values = [], []
    for one in where:
        condition, bound = _condition(one, types)
        conditions.append(condition)
        values += bound
    chosen = f" from {quoted(table)}" + (f" where {' and '.join(conditions)}" if conditions else "")
    ordered = ""
    if order is not None:
        _require(order, types)
        ordered = f" order by {quoted(order)}{' desc' if descending else ''} nulls last"
    count = run.query(f"select count(*) as rows{chosen}", values, seconds=seconds)["rows"][0]
    page = f"select *{chosen}{ordered} limit ? offset ?"
    frame = run.query(page, [*values, max(rows, 0), max(start, 0)], seconds=seconds)
    return frame, int(count)


def _condition(one: Filter, types: dict[str, str]) -> tuple[str, list[Any]]:
    kind = _require(one.column, types)
    name = quoted(one.column)
    if one.kind == "is missing":
        return f"{name} is null", []
    if one.kind == "matches":
        return f"regexp_matches({name}::varchar, ?)", [str(one.value)]
    if one.kind not in _CONDITIONS:
        raise StoreError(f"no condition {one.kind!r}; there are {', '.join([*_CONDITIONS, 'matches', 'is missing'])}")
    if kind.endswith("[]"):
        raise StoreError(f"column {one.column!r} holds lists: it can be matched as text, not compared")
    return f"{name} {_CONDITIONS[one.kind].replace('?', f'?::{kind}')}", [str(one.value)]


def _require(column: str, types: dict[str, str]) -> str:
    if column not in types:
        raise StoreError(f"no column {column!r} in the table; it has {', '.join(types)}")
    return types[column]
