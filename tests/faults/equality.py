"""Whether two runs are the same run: every table, the trace, and the metrics beside it."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from polars.testing import assert_frame_equal

import store
from store.schema import tables

TOLERANCE = 1e-12
"""Relative difference of two sums of the same numbers in another order, in 64 bits."""

OWN = ("created_at", "seconds", "settings")
"""What a run says of when and how fast it was made."""


def differences(found: Path, wanted: Path, *, metrics: bool = True) -> list[str]:
    """One line per table of two finished runs that differs; the same rows in another order are the same."""
    with store.open_run(found) as first, store.open_run(wanted) as second:
        told = [line for name in tables() if (line := _compare(name, _rows(first, name), _rows(second, name)))]
        ours, theirs = first.selections(), second.selections()
        if not ((ours.ids == theirs.ids).all() and (ours.weights == theirs.weights).all()):
            told.append("the traces differ")
        if metrics:
            for name in ("metric_value", "metric_vector"):
                rows = [run.query(f"select * from {name}") for run in (first, second)]
                told += [line] if (line := _compare(name, *rows)) else []
    return told


def _rows(run: store.Run, name: str) -> pl.DataFrame:
    frame = run.table(name)
    if name == "check":  # each process tells what it saw: the verdicts have to be the same, not the figures
        place = ["name", "layer", "step"]
        measured = frame.filter(pl.col("status") != "skipped").select(*place, "status").unique()
        return pl.concat(
            [measured, frame.select(*place).unique().join(measured, on=place, how="anti", nulls_equal=True)],
            how="diagonal",
        )
    return frame.drop(OWN) if name == "run" else frame


def _compare(name: str, found: pl.DataFrame, wanted: pl.DataFrame) -> str:
    keys = [column for column, kind in wanted.schema.items() if not kind.is_float() and not kind.is_nested()]
    try:
        assert_frame_equal(found.sort(keys), wanted.sort(keys), rel_tol=TOLERANCE, abs_tol=0.0)
    except AssertionError as error:
        return f"table {name} differs: {' '.join(str(error).split())[:400]}"
    return ""
