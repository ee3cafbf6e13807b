"""Locked, read-only connections: in memory, with run files attached and everything else shut."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import polars as pl

from moescope import memory
from moescope.errors import StoreError
from store.schema import Table, literal, quoted

if TYPE_CHECKING:
    from store.remote.ranged import OneRun

Parameters = Sequence[Any] | Mapping[str, Any] | None

READING = 1 << 30
"""Bytes for DuckDB that reads, where a memory limit leaves more: pages of the file, kept for the next reader."""

_settings: dict[str, str] = {}
_NO_EXTENSIONS = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
_READING = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN}


def connect(databases: Mapping[str, Path], lying: OneRun | None = None) -> duckdb.DuckDBPyConnection:
    """A connection in memory with files attached read-only under the given names.

    A file that is replaced later goes on being read as it was: attach again to see the new one (a connection opened on
    the path itself would keep showing the old file to the whole process).

    Args:
        lying: the one file of ``databases`` where it lies in a remote store: read through it, in pieces.

    Raises:
        StoreError: a file is no DuckDB file, or another program holds it open for writing.
    """
    connection = duckdb.connect(":memory:", config={**_NO_EXTENSIONS, **_spilling(), **_settings, **_limited()})
    if lying is not None:
        connection.register_filesystem(lying)
    for alias, path in databases.items():
        try:
            connection.execute(f"attach {literal(lying.PATH if lying else path)} as {alias} (read_only)")
        except duckdb.Error as error:
            connection.close()
            raise StoreError(f"{path} cannot be read as a run: {said(error)}") from error
    if databases:
        # Before anything of the files is asked: a table in one may be a view that reads other files or the network.
        connection.execute("set enable_external_access = false")
    return connection


def confine(**settings: str) -> None:
    """DuckDB settings, such as a memory limit, for all connections that this process opens from now on."""
    _settings.update(settings)


def _spilling() -> dict[str, str]:
    """Where what does not fit into memory goes: not into the folder that somebody happens to be in."""
    return {"temp_directory": str(Path(tempfile.gettempdir(), f"moescope-{os.getpid()}"))}


def _limited() -> dict[str, str]:
    """What keeps DuckDB within a memory limit, where there is one (:mod:`moescope.memory`)."""
    found = memory.database()
    if found is None:
        return {}
    return {"memory_limit": f"{min(found[0], READING)}B", "threads": str(found[1])}


def table_query(connection: duckdb.DuckDBPyConnection, database: str, table: Table) -> str:
    """SQL for one table of an attached run; what an older schema did not have yet reads as empty."""
    name = f"{database}.{quoted(table.name)}"
    try:  # asking the file for no row is a tenth of what its catalog in duckdb_columns() takes
        present = {column[0] for column in connection.execute(f"from {name} limit 0").description or ()}
    except duckdb.CatalogException:
        present = set()
    columns = ", ".join(
        quoted(column.name) if column.name in present else f"null::{column.type} as {quoted(column.name)}"
        for column in table.columns
    )
    return f"select {columns} " + (f"from {name}" if present else "where false")


def lock(connection: duckdb.DuckDBPyConnection, directories: Sequence[Path] = ()) -> None:
    """Shut files, network, extensions and settings; only ``directories`` (shards of live runs) stay readable."""
    if directories:
        allowed = ", ".join(literal(directory) for directory in directories)
        connection.execute(f"set allowed_directories = [{allowed}]")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")


def said(error: duckdb.Error) -> str:
    """DuckDB's words in one line; where an error of Python came through it, such as a store's, that error's."""
    lines = str(error).strip().splitlines()
    return lines[-1].partition(": ")[2] or lines[-1] if lines[0].startswith("Traceback") else lines[0]


def kind_of(statement: duckdb.Statement) -> duckdb.StatementType | None:
    """The kind of a statement; None for kinds that DuckDB's Python package has no name for (UPDATE EXTENSIONS)."""
    try:
        return statement.type
    except ValueError:
        return None


def query(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: Parameters = None, *, seconds: float | None = None
) -> pl.DataFrame:
    """Run one reading statement on a cursor of its own (a shared connection returns wrong rows across threads).

    Args:
        seconds: interrupt it after so long; None = never.

    Raises:
        StoreError: not exactly one SELECT (or EXPLAIN, DESCRIBE), SQL that DuckDB refuses (the message is DuckDB's), or
            it took too long.
    """
    cursor = connection.cursor()
    timer = threading.Timer(seconds, cursor.interrupt) if seconds is not None else None
    try:
        if timer is not None:
            timer.start()
        statements = cursor.extract_statements(sql)
        if len(statements) != 1 or kind_of(statements[0]) not in _READING:
            raise StoreError("only one SELECT statement at a time: a run is never written through SQL")
        frame: pl.DataFrame = cursor.sql(sql, params=parameters).pl()
        return frame
    except duckdb.InterruptException:
        raise StoreError(f"the query was stopped after {seconds:g} s") from None
    except duckdb.Error as error:
        raise StoreError(f"the query failed: {said(error)}") from error
    finally:
        if timer is not None:
            timer.cancel()
        cursor.close()
