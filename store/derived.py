"""Metric results beside a run: ``NAME.derived.duckdb``. May be deleted and computed again without the model."""

from __future__ import annotations

import os
from pathlib import Path

import duckdb
import polars as pl

from moescope.errors import StoreError
from store.compaction import BLOCK_SIZE
from store.schema import literal, quoted

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


def path_of(run: Path) -> Path:
    """Where the metric results of a run file lie."""
    return run.with_name(run.name.removesuffix(".duckdb") + SUFFIX)


def write_metrics(run: str | Path, frame: pl.DataFrame) -> Path:
    """Add metric results to a finished run; rows of the same metrics with the same parameters are replaced.

    Raises:
        StoreError: there is no such run file, or the frame has a column that ``metric_value`` has not.
    """
    run = Path(run)
    if not run.is_file():
        raise StoreError(f"no run at {run}: metrics are written beside a finished run")
    unknown = [column for column in frame.columns if column not in COLUMNS]
    if unknown:
        raise StoreError(f"metric_value has no column {unknown[0]!r}; it has {', '.join(COLUMNS)}")
    target = path_of(run)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    added = ", ".join(
        f"{quoted(name) if name in frame.columns else 'null'}::{kind} as {quoted(name)}"
        for name, kind in COLUMNS.items()
    )
    with duckdb.connect() as connection:
        connection.execute(f"attach {literal(temporary)} as fresh (block_size {BLOCK_SIZE})")
        connection.execute(f"create table fresh.metric_value ({_definition()})")
        if target.exists():
            connection.execute(f"attach {literal(target)} as former (read_only)")
            connection.execute(
                "insert into fresh.metric_value by name select * from former.metric_value as old where not exists"
                " (select 1 from frame where frame.metric = old.metric"
                " and frame.parameters is not distinct from old.parameters)"
            )
        connection.execute(f"insert into fresh.metric_value select {added} from frame")
        connection.execute("checkpoint fresh")
        connection.execute("detach fresh")
    os.replace(temporary, target)
    return target


def create_view(connection: duckdb.DuckDBPyConnection, *, attached: bool) -> None:
    """Name the results ``metric_value``; an empty relation of the same columns where there are none yet."""
    if attached:
        connection.execute("create view metric_value as select * from derived.metric_value")
    else:
        columns = ", ".join(f"null::{kind} as {quoted(name)}" for name, kind in COLUMNS.items())
        connection.execute(f"create view metric_value as select {columns} where false")


def _definition() -> str:
    return ", ".join(f"{quoted(name)} {kind}" for name, kind in COLUMNS.items())
