"""A store as one frame: a row per run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import polars as pl

import store
from moescope.errors import MoescopeError
from store import Catalog, Entry

AT_ONCE = 8
"""Runs of a remote store that are looked at together."""

SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "run": pl.String,
    "state": pl.String,
    "capture": pl.String,
    "model": pl.String,
    "levels": pl.String,
    "sequences": pl.Int64,
    "tokens": pl.Int64,
    "created_at": pl.Datetime("us"),
    "megabytes": pl.Float64,
}


def run_list(catalog: Catalog) -> pl.DataFrame:
    """One row per run; state is finished | a live run's state | unreadable, capture is the verdict of the checks."""
    entries = catalog.entries()
    at_once = AT_ONCE if catalog.is_remote else 1
    with ThreadPoolExecutor(at_once) as pool:  # most of the time is spent waiting for a store's answers
        rows = list(pool.map(_row, entries))
    return pl.DataFrame(rows, schema=SCHEMA)


def _row(entry: Entry) -> dict[str, object]:
    """What there is to say of one run, from the few blocks that hold it."""
    row: dict[str, object] = {"run": entry.name, "megabytes": round(entry.size_bytes / 1e6, 2)}
    try:
        with store.open_run(entry.path, fetch=False, summary=True) as run:
            progress = run.progress
            row |= {
                "state": (progress.state if progress else "starting") if run.live else "finished",
                "capture": run.badge.status,
                "model": run.info.model,
                "levels": run.info.levels,
                "sequences": run.info.sequences,
                "tokens": run.info.tokens or (progress.tokens if progress else 0),
                "created_at": run.info.created_at.replace(microsecond=0),
            }
    except MoescopeError as error:
        row |= {"state": "unreadable", "capture": str(error)}
    return row
