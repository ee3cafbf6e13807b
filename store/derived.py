"""Metric results beside a run: ``NAME.derived.duckdb``. May be deleted and computed again without the model."""

from __future__ import annotations

from pathlib import Path

import duckdb
import polars as pl

from moescope.errors import StoreError
from store.compaction import BLOCK_SIZE
from store.schema import literal, quoted
from store.whole import refusal, replacing

SUFFIX = ".derived.duckdb"

COLUMNS = {
    "metric": "varchar",  # name in the registry of metrics
    "version": "integer",  # version of its formula
    "parameters": "varchar",  # JSON with sorted keys
    "control": "varchar",  # observed | shuffled_in_sequence | shuffled | uniform | lower_bound
    "domain": "varchar",  # null: all domains pooled
    "layer": "integer",  # null: the whole model
    "step": "integer",
    "expert": "integer",  # null: the whole layer
    "at": "double",  # the abscissa: segment length, cache size, lag; null where there is none
    "value": "double",
    "low": "double",  # interval over sequences; null where there is none
    "high": "double",
    "tokens": "bigint",  # what the value rests on
    "sequences": "bigint",
}
"""Columns of table ``metric_value`` and their types."""

VECTOR_COLUMNS = {
    "metric": "varchar",
    "version": "integer",
    "parameters": "varchar",
    "control": "varchar",
    "domain": "varchar",
    "layer": "integer",
    "step": "integer",
    "expert": "integer",  # the row of the matrix
    "to_layer": "integer",  # the layer whose experts are the columns; null: the same layer
    "to_step": "integer",
    "values": "double[]",  # one entry per expert, or as the metric says
    "tokens": "bigint",
    "sequences": "bigint",
}
"""Columns of table ``metric_vector``: results that are a list per expert, such as a row of a matrix of experts."""

TABLES = {"metric_value": COLUMNS, "metric_vector": VECTOR_COLUMNS}


def path_of(run: Path) -> Path:
    """Where the metric results of a run file lie."""
    return run.with_name(run.name.removesuffix(".duckdb") + SUFFIX)


def write_metrics(run: str | Path, frame: pl.DataFrame, vectors: pl.DataFrame | None = None) -> Path:
    """Add metric results to a finished run; rows of the same metrics with the same parameters are replaced.

    Args:
        frame: rows of table ``metric_value``; what a row leaves out is null.
        vectors: rows of table ``metric_vector``.

    Raises:
        StoreError: there is no such run file, a frame has a column that its table has not, or the folder is read-only.
        RunError: the disk is full.
    """
    run = Path(run)
    if not run.is_file():
        raise StoreError(f"no run at {run}: metrics are written beside a finished run")
    added = {"metric_value": frame} | ({} if vectors is None else {"metric_vector": vectors})
    for name, rows in added.items():
        unknown = [column for column in rows.columns if column not in TABLES[name]]
        if unknown:
            raise StoreError(f"{name} has no column {unknown[0]!r}; it has {', '.join(TABLES[name])}")
    target = path_of(run)
    former = is_readable(target)
    try:
        with replacing(target) as temporary, duckdb.connect() as connection:
            connection.execute(f"attach {literal(temporary)} as fresh (block_size {BLOCK_SIZE})")
            if former:
                connection.execute(f"attach {literal(target)} as former (read_only)")
            for name in TABLES:
                _write(connection, name, added.get(name), former=former)
            connection.execute("checkpoint fresh")
            connection.execute("detach fresh")
    except (duckdb.Error, OSError) as error:
        raise refusal(target, error, ", then moescope runs compute") from error
    return target


def is_readable(path: Path) -> bool:
    """Whether results can be read; what is damaged counts as not there, since it can be computed again."""
    if not path.exists():
        return False
    try:
        with duckdb.connect() as connection:
            connection.execute(f"attach {literal(path)} as tried (read_only)")
            for name in TABLES:
                connection.execute(f"create temp table {name} as {query(connection, 'tried', name)}")
    except duckdb.Error:
        return False
    return True


def create_views(connection: duckdb.DuckDBPyConnection, *, attached: bool) -> None:
    """Name the results ``metric_value`` and ``metric_vector``; empty where there are none yet."""
    for name in TABLES:
        connection.execute(f"create view {name} as {query(connection, 'derived' if attached else '', name)}")


def query(connection: duckdb.DuckDBPyConnection, database: str, name: str) -> str:
    """SQL for one table of results in an attached file; an empty relation where there is none."""
    found = (
        database
        and connection.execute(
            "select 1 from duckdb_tables() where database_name = ? and table_name = ?", [database, name]
        ).fetchall()
    )
    if found:
        return f"select * from {database}.{name}"
    columns = ", ".join(f"null::{kind} as {quoted(column)}" for column, kind in TABLES[name].items())
    return f"select {columns} where false"


def _write(connection: duckdb.DuckDBPyConnection, name: str, rows: pl.DataFrame | None, *, former: bool) -> None:
    """Fill one table of the fresh file: former rows that are not replaced, then the new ones."""
    columns = TABLES[name]
    definition = ", ".join(f"{quoted(column)} {kind}" for column, kind in columns.items())
    connection.execute(f"create table fresh.{name} ({definition})")
    if former:
        kept = query(connection, "former", name)
        replaced = (
            " where not exists (select 1 from rows where rows.metric = old.metric"
            " and rows.parameters is not distinct from old.parameters)"
        )
        condition = replaced if rows is not None and len(rows) else ""
        connection.execute(f"insert into fresh.{name} by name select * from ({kept}) as old{condition}")
    if rows is not None and len(rows):
        added = ", ".join(
            f"{quoted(column) if column in rows.columns else 'null'}::{kind} as {quoted(column)}"
            for column, kind in columns.items()
        )
        connection.execute(f"insert into fresh.{name} select {added} from rows")
