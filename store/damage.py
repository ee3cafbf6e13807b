"""Which shard of a run is damaged, and what its owner can do."""

from __future__ import annotations

from pathlib import Path

import duckdb

from moescope.errors import ShardError
from store import live
from store.schema import literal


def damage(folder: Path, error: Exception) -> ShardError:
    """The error for shards that could not be read: reads every file to the end to name the damaged one."""
    reason = str(error).splitlines()[0]
    if not folder.is_dir():
        return ShardError(f"{folder} was finished, renamed or deleted while it was read: open the run again")
    found = _damaged(folder)
    if not found:
        return ShardError(f"{folder}: the shards cannot be merged ({reason})")
    path = found[0]
    part = path if path.parent.name == live.CHECKS else path.parent
    more = f" ({len(found) - 1} more files too)" if len(found) > 1 else ""
    return ShardError(
        f"{path} is damaged{more}, so the shards cannot be merged: remove {part} and go on with --resume, which records"
        f" its texts again; the other shards are whole ({reason})"
    )


def _damaged(folder: Path) -> list[Path]:
    with duckdb.connect() as connection:
        files = [file for found in live.contents(folder).values() for file in found]
        return [file for file in files if not _is_readable(connection, file)]


def _is_readable(connection: duckdb.DuckDBPyConnection, file: Path) -> bool:
    try:
        connection.execute(f"create or replace temp table read as select * from read_parquet({literal(file)})")
    except duckdb.Error:
        return False
    return True
