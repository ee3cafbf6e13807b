"""From a folder of shards to one run file."""

from __future__ import annotations

from pathlib import Path

import duckdb
import polars as pl

from moescope import memory
from moescope.errors import ShardError
from store import live
from store.damage import damage
from store.info import RunInfo
from store.schema import Table, literal, merge_query, quoted, tables, views
from store.trace import CHUNK_TOKENS, none_value
from store.vectors import holds_vectors, merged_layers
from store.whole import code_of, refusal, replacing

BLOCK_SIZE = 16384
"""Bytes per block: with DuckDB's default of 256 KiB, forty small tables alone take 10 MiB; with this, 1.3 MiB."""

ROW_GROUP_SIZE = 4096
"""Rows of a table that one thread packs: a trace has few and long rows, which DuckDB's default leaves to one thread."""

MEMORY = 2 << 30
"""Bytes for DuckDB while it sorts, where no memory limit says less; some of what is larger goes to files beside the
shards."""

SORTED_PART = 8
"""DuckDB's memory by the bytes of trace that are sorted at once: rows of long lists stay in memory while they move."""

_TRACE = "route_chunk"
_ENTRY_BYTES = 2  # of an id and its weight


def compact(folder: Path, target: Path, info: RunInfo) -> None:
    """Merge the shards of ``folder`` into ``target``, which appears only when it is whole.

    Tables that the collection did not fill are there too, empty. ``info`` gets its totals (sequences, tokens).

    Raises:
        ShardError: a shard is damaged, or the disk refuses; the shards stay.
    """
    try:
        with replacing(target) as temporary, duckdb.connect() as connection:
            within, threads = memory.database() or (MEMORY, None)
            within = min(within, MEMORY)
            connection.execute(f"set memory_limit = '{within}B'")
            if threads is not None:
                connection.execute(f"set threads = {threads}")
            connection.execute(f"set temp_directory = {literal(folder / '.sorting')}")
            sizes = f"block_size {BLOCK_SIZE}, row_group_size {ROW_GROUP_SIZE}"
            connection.execute(f"attach {literal(temporary)} as data ({sizes})")
            _fill(connection, folder, info, within // SORTED_PART)
            connection.execute("checkpoint data")
            connection.execute("detach data")
    except (duckdb.Error, OSError) as error:
        if code_of(error):
            raise ShardError(f"{refusal(target, error, ' and go on with --resume')}; the shards stay") from error
        raise damage(folder, error) from error


def _fill(connection: duckdb.DuckDBPyConnection, folder: Path, info: RunInfo, sorted_bytes: int) -> None:
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
    _create_trace(connection, tables()[_TRACE], live.source(folder, _TRACE, content), id_type, sorted_bytes)
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


def _create_trace(
    connection: duckdb.DuckDBPyConnection, table: Table, source: str, id_type: str, sorted_bytes: int
) -> None:
    # By "create table as", ordered by layer: DuckDB then packs the lists into 14 bytes per token-layer at top-8; the
    # same rows appended batch by batch take 28. What cannot be sorted at once is sorted some layers at a time; in one
    # transaction, so that row groups fill up across them and the file comes out the same.
    columns = ", ".join(
        f"{column.name}::{id_type + '[]' if column.name == 'experts' else column.type} as {column.name}"
        for column in table.columns
    )
    connection.execute("begin")
    begin = f"create table data.{_TRACE} as"
    for first, last in _layer_runs(connection, source, sorted_bytes) or [(0, 0)]:
        some = f"select {columns} from {source} where layer between {first} and {last}"
        connection.execute(f"{begin} {some} order by layer, step, sequence, start")
        begin = f"insert into data.{_TRACE}"
    connection.execute("commit")


def _layer_runs(connection: duckdb.DuckDBPyConnection, source: str, sorted_bytes: int) -> list[tuple[int, int]]:
    """First and last of successive layers whose part of the trace takes so many bytes, or one layer's that takes more.

    A chunk's bytes are an upper bound: those of a full one.
    """
    of_layer = f"select layer, sum(width::bigint) * {CHUNK_TOKENS * _ENTRY_BYTES} from {source} group by 1 order by 1"
    runs: list[tuple[int, int]] = []
    held = 0
    for layer, size in connection.sql(of_layer).fetchall():
        if runs and held + size <= sorted_bytes:
            runs[-1], held = (runs[-1][0], layer), held + size
        else:
            runs.append((layer, layer))
            held = size
    return runs


def _insert_run(connection: duckdb.DuckDBPyConnection, info: RunInfo) -> None:
    table = tables()["run"]
    row = pl.DataFrame([info.to_row()])  # noqa: F841  DuckDB reads it by its name
    columns = ", ".join(f"{column.name}::{column.type} as {column.name}" for column in table.columns)
    connection.execute(f"create table data.run ({table.definition()})")
    connection.execute(f"insert into data.run select {columns} from row")


def _qualified(query: str) -> str:
    """A view's query with its table named inside the file that is being written."""
    return query.replace(f"from {_TRACE}", f"from data.{_TRACE}")
