"""A run's file or folder as a locked connection, in which every table of the schema is a view."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from moescope.errors import StoreError
from store import connection, derived, live
from store.damage import damage
from store.info import require_version
from store.schema import merge_query, quoted, tables, views
from store.trace import none_value

if TYPE_CHECKING:
    from store.remote.ranged import OneRun


SUMMARY = ("run", "layer", "check")
"""Tables of a run that is opened to be listed."""


def open_file(
    path: Path, hidden: Sequence[str], lying: OneRun | None = None, *, summary: bool = False
) -> tuple[duckdb.DuckDBPyConnection, tuple[str, ...]]:
    """A finished run with its metrics; and one sentence per file beside it that is damaged and counts as not there.

    Args:
        hidden: tables that are to read as empty.
        lying: the run where it lies in a remote store, without its metrics.
        summary: only the tables of :data:`SUMMARY`, and no metrics: making a view of each takes most of the time.

    Raises:
        StoreError: the file is no run, damaged, or of another version.
    """
    beside = derived.path_of(path)
    unreadable: tuple[str, ...] = ()
    derived_too = lying is None and not summary and beside.exists()
    databases = {"data": path} | ({"derived": beside} if derived_too else {})
    try:
        opened = connection.connect(databases, lying)
    except StoreError:
        if lying is not None:
            raise
        opened, unreadable = connection.connect({"data": path}), (_spoilt(beside),)
    attached = "derived" in databases and not unreadable
    try:
        version = opened.sql("select schema_version from data.run").fetchall()
    except duckdb.Error as error:
        raise StoreError(f"{path} is a DuckDB file but not a run of moescope") from error
    require_version(version[0][0] if version else 0, path.name)
    try:
        experts = opened.sql("select coalesce(max(num_experts), 0) from data.layer").fetchall()[0][0]
        for table in tables().values():
            if not summary or table.name in SUMMARY:
                rows = connection.table_query(opened, "data", table)
                opened.execute(f"create view {quoted(table.name)} as {_unless(table.name in hidden, rows)}")
        if not summary:
            _create_views(opened, experts)
            derived.create_views(opened, attached=attached)
    except duckdb.Error as error:
        raise StoreError(f"{path} is damaged: put a copy in its place ({connection.said(error)})") from error
    connection.lock(opened)
    if lying is not None:
        lying.sealed = True
    return opened, unreadable


def _spoilt(beside: Path) -> str:
    name = beside.name.removesuffix(derived.SUFFIX)
    return f"{beside.name} cannot be read, so the metrics are missing: moescope runs compute {name} makes them again"


def open_folder(path: Path, hidden: Sequence[str]) -> duckdb.DuckDBPyConnection:
    """A run that is being collected: its shards, added up.

    Raises:
        StoreError: as :func:`open_file`.
    """
    require_version(live.read_info(path).schema_version, path.name)
    opened = connection.connect({})
    try:
        content = live.contents(path)
        for name, table in tables().items():
            rows = merge_query(table, live.source(path, name, content))
            opened.execute(f"create view {quoted(name)} as {_unless(name in hidden, rows)}")
        experts = opened.sql("select coalesce(max(num_experts), 0) from layer").fetchall()[0][0]
    except duckdb.Error as error:
        raise damage(path, error) from error
    _create_views(opened, experts)
    derived.create_views(opened, attached=False)
    connection.lock(opened, [path])
    return opened


def _unless(hidden: bool, rows: str) -> str:
    """The rows, or none of them where the table is hidden."""
    return f"select * from ({rows}) where false" if hidden else rows


def _create_views(opened: duckdb.DuckDBPyConnection, num_experts: int) -> None:
    for name, body in views().items():
        opened.execute(f"create view {name} as {body.replace('no_expert()', str(none_value(num_experts)))}")
