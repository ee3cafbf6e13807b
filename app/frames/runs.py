"""A store as one frame: a row per run."""

from __future__ import annotations

import polars as pl

import store
from moescope.errors import MoescopeError
from store import Catalog

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
    rows = []
    for entry in catalog.entries():
        row: dict[str, object] = {"run": entry.name, "megabytes": round(entry.size_bytes / 1e6, 2)}
        try:
            with store.open_run(entry.path) as run:
                progress = run.progress
                row |= {
                    "state": (progress.state if progress else "starting") if run.live else "finished",
                    "capture": run.badge.status,
                    "model": run.info.model,
                    "levels": run.info.levels,
                    "sequences": run.info.sequences,
                    "tokens": run.info.tokens,
                    "created_at": run.info.created_at,
                }
        except MoescopeError as error:
            row |= {"state": "unreadable", "capture": str(error)}
        rows.append(row)
    return pl.DataFrame(rows, schema=SCHEMA)
