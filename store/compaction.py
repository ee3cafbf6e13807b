"""From a folder of shards to one run file."""

from __future__ import annotations

from pathlib import Path

import duckdb
import polars as pl

from moescope.errors import ShardError
from store import live
from store.damage import damage
from store.info import RunInfo
from store.schema import Table, literal, merge_query, quoted, tables, views
from store.trace import none_value
from store.vectors import holds_vectors, merged_layers
from store.whole import code_of, refusal, replacing

BLOCK_SIZE = 16384
"""Bytes per block: with DuckDB's default of 256 KiB, forty small tables alone take 10 MiB; with this, 1.3 MiB."""

ROW_GROUP_SIZE = 4096
"""Rows of a table that one thread packs: a trace has few and long rows, which DuckDB's default leaves to one thread."""

MEMORY_LIMIT = "2GB"
"""For sorting the trace; what is larger goes to files in the folder of the shards."""

_TRACE = "route_chunk"


def compact(folder: Path, target: Path, info: RunInfo) -> None:
    """Merge the shards of ``folder`` into ``target``, which appears only when it is whole.

    Tables that the collection did not fill are there too, empty. ``info`` gets its totals (sequences, tokens).

    Raises:
        ShardError: a shard is damaged, or the disk refuses; the shards stay.
    """
    try:
        with replacing(target) as temporary, duckdb.connect() as connection:
            connection.execute(f"set memory_limit = '{MEMORY_LIMIT}'")
            connection.execute(f"set temp_directory = {literal(folder / '.sorting')}")
            sizes = f"block_size {BLOCK_SIZE}, row_group_size {ROW_GROUP_SIZE}"
            connection.execute(f"attach {literal(temporary)} as data ({sizes})")
            _fill(connection, folder, info)
            connection.execute("checkpoint data")
            connection.execute("detach data")
    except (duckdb.Error, OSError) as error:
        if code_of(error):
            raise ShardError(f"{refusal(target, error, ' and go on with --resume')}; the shards stay") from error
        raise damage(folder, error) from error


def _fill(connection: duckdb.DuckDBPyConnection, folder: Path, info: RunInfo) -> None:
    content = live.contents(folder)
    for name, table in tables().items():
        if name in ("run", _TRACE):
            continue
        if holds_vectors(table):
            _fill_vectors(connection, table, content.get(name, []))
            continue
        query = merge_query(table, live.source(folder, name, content))
        order = f" order by {', '.join(quoted(key) for key in table.keys)}" if table.keys else ""
        connection.execute(f"create table data.{quoted(name)} ({table.definition()})")
        connection.execute(f"insert into data.{quoted(name)} {query}{order}")
    num_experts = connection.sql("select coalesce(max(num_experts), 0) from data.layer").fetchall()[0][0]
    id_type = "utinyint" if none_value(num_experts) == 255 else "usmallint"
    _create_trace(connection, tables()[_TRACE], folder, id_type)
    # To read one sequence without unpacking its neighbours: a scan decodes 2048 chunks of a layer to find one.
    for name in (_TRACE, "sequence_token"):
        connection.execute(f"create index {name}_by_sequence on data.{name} (sequence)")
    for name, query in views().items():
        body = query.replace("no_expert()", str(none_value(num_experts)))
        connection.execute(f"create view data.{name} as {_qualified(body)}")
    sequences, tokens = connection.sql("select count(*), sum(tokens)::bigint from data.sequence").fetchall()[0]
    if sequences:  # imported counts have none, and say themselves how many tokens they stand for
        info.sequences, info.tokens = sequences, tokens
    _insert_run(connection, info)


def _fill_vectors(connection: duckdb.DuckDBPyConnection, table: Table, files: list[Path]) -> None:
    connection.execute(f"create table data.{quoted(table.name)} ({table.definition()})")
    for part in merged_layers(table, files):  # noqa: B007  DuckDB reads it by its name
        connection.execute(f"insert into data.{quoted(table.name)} select * from part")


def _create_trace(connection: duckdb.DuckDBPyConnection, table: Table, folder: Path, id_type: str) -> None:
    # In one "create table as", ordered by layer: DuckDB then packs the lists into 14 bytes per token-layer at top-8;
    # the same rows appended batch by batch take 28.
    columns = ", ".join(
        f"{column.name}::{id_type + '[]' if column.name == 'experts' else column.type} as {column.name}"
        for column in table.columns
    )
    query = f"select {columns} from {live.source(folder, _TRACE)} order by layer, step, sequence, start"
    connection.execute(f"create table data.{_TRACE} as {query}")


def _insert_run(connection: duckdb.DuckDBPyConnection, info: RunInfo) -> None:
    table = tables()["run"]
    row = pl.DataFrame([info.to_row()])  # noqa: F841  DuckDB reads it by its name
    columns = ", ".join(f"{column.name}::{column.type} as {column.name}" for column in table.columns)
    connection.execute(f"create table data.run ({table.definition()})")
    connection.execute(f"insert into data.run select {columns} from row")


def _qualified(query: str) -> str:
    """A view's query with its table named inside the file that is being written."""
    return query.replace(f"from {_TRACE}", f"from data.{_TRACE}")
