"""The run file's schema, read from ``schema.sql``: tables, columns, and how rows of different shards merge.

``schema.sql`` is the only place where a table is described. Each column line reads ``name type, -- [rule] meaning``;
the rule says how shards and hosts add up (see the head of that file).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SCHEMA_VERSION = 4
"""Version of the tables in ``schema.sql``, which new runs have."""

OLDEST_VERSION = 2
"""Runs from this version on are read: tables and columns that came later read as empty. Others are refused."""

_TABLE = re.compile(r'^-- table (\w+): ([^\n]*)\ncreate table "?\w+"? \(\n(.*?)^\);', re.MULTILINE | re.DOTALL)
_COLUMN = re.compile(r"^\s*(\w+)\s+([a-z]+(?:\[\])?),?\s*-- \[([^\]]+)\]\s?(.*)$")
_VIEW = re.compile(r"^-- view (\w+): ([^\n]*)\ncreate view \w+ as\n(.*?);", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Column:
    """One column: its DuckDB type, its merge rule (key, sum, max, at COLUMN, row) and its meaning."""

    name: str
    type: str
    rule: str
    meaning: str

    @property
    def shard_type(self) -> str:
        """The type in shards: sums of vectors keep 64 bits until they are added up, and are rounded once."""
        return "double[]" if self.type == "float[]" and self.rule == "sum" else self.type


@dataclass(frozen=True)
class Table:
    """One table of the run file."""

    name: str
    meaning: str
    columns: tuple[Column, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the columns that identify a row; empty for a plain union of rows."""
        return tuple(column.name for column in self.columns if column.rule == "key")

    def definition(self, types: Mapping[str, str] | None = None) -> str:
        """The columns as ``name type, ...``; ``types`` replaces the type of single columns."""
        chosen = types or {}
        return ", ".join(f"{quoted(column.name)} {chosen.get(column.name, column.type)}" for column in self.columns)


def quoted(name: str) -> str:
    """A name as an SQL identifier (``check`` is a reserved word)."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str | Path) -> str:
    """A text as an SQL literal, for the statements that take no parameters (ATTACH, CREATE VIEW)."""
    return "'" + str(text).replace("'", "''") + "'"


@cache
def tables() -> dict[str, Table]:
    """All tables by name, in the order of ``schema.sql``."""
    found: dict[str, Table] = {}
    for name, meaning, body in _TABLE.findall(_source()):
        columns = []
        for line in body.splitlines():
            match = _COLUMN.match(line)
            if match is None:
                raise ValueError(f"schema.sql, table {name}: a line that is no column with a merge rule: {line!r}")
            columns.append(Column(*match.groups()))
        found[name] = Table(name, meaning.strip(), tuple(columns))
    return found


@cache
def views() -> dict[str, str]:
    """The query of each view by name; ``no_expert()`` in it stands for the value that means "none"."""
    return {name: query for name, _, query in _VIEW.findall(_source())}


def merge_query(table: Table, source: str) -> str:
    """SQL that merges the rows of ``source`` (a table, a view or a table function) by the table's rules."""
    if not table.keys:
        return f"select {', '.join(quoted(column.name) for column in table.columns)} from {source}"
    keys = ", ".join(quoted(key) for key in table.keys)
    lists = [column for column in table.columns if column.rule in ("sum", "max") and column.type.endswith("[]")]
    scalars = [_merged(column, table) for column in table.columns if column not in lists]
    query = f"select {', '.join(scalars)} from {source} group by {keys}"
    if not lists:
        return query
    joined = " ".join(f"left join ({_merged_lists(column, keys, source)}) using ({keys})" for column in lists)
    order = ", ".join(quoted(column.name) for column in table.columns)
    return f"select {order} from ({query}) {joined}"


def _source() -> str:
    return (Path(__file__).parent / "schema.sql").read_text(encoding="utf-8")


def _merged(column: Column, table: Table) -> str:
    name = quoted(column.name)
    if column.rule == "key":
        return name
    if column.rule == "sum":
        # DuckDB sums integers into 128 bits; the cast brings the declared type back and fails loudly on overflow.
        return f"sum({name})::{column.type} as {name}"
    if column.rule == "max":
        return f"max({name}) as {name}"
    if column.rule.startswith("at "):
        return f"first({name} order by {_largest_first(column.rule[3:], table)}) as {name}"
    raise ValueError(f"schema.sql, column {column.name}: unknown merge rule [{column.rule}]")


def _largest_first(target: str, table: Table) -> str:
    """The order in which the row with the largest ``target`` comes first; of equal ones, the earliest in the text.

    Ties are common (the first token of every sequence is the same), and arg_max would pick any of them.
    """
    beside = [column.name for column in table.columns if column.rule == f"at {target}"]
    beside.sort(key=lambda name: (not name.endswith("sequence"), not name.endswith("position"), name))
    return ", ".join([f"{quoted(target)} desc nulls last", *(f"{quoted(name)} nulls last" for name in beside)])


def _merged_lists(column: Column, keys: str, source: str) -> str:
    """Lists of equal keys, merged entry by entry; rows without the list count for nothing."""
    name = quoted(column.name)
    merged = f"{column.rule}(entry)::{column.type.removesuffix('[]')}"
    flat = f"select {keys}, unnest({name}) as entry, generate_subscripts({name}, 1) as place from {source}"
    summed = f"select {keys}, place, {merged} as entry from ({flat}) group by {keys}, place"
    return f"select {keys}, list(entry order by place) as {name} from ({summed}) group by {keys}"
