"""Studies of caching that were kept beside a run."""

from __future__ import annotations

from typing import Any

import polars as pl

import store
from app.frames.caching import short
from moescope.errors import PlanError, StoreError
from planner.cache.study import Study

_KEPT = {
    "answer": pl.String, "machine": pl.String, "memory": pl.Int64, "slots": pl.Int64, "way": pl.String,
    "ms": pl.Float64, "low": pl.Float64, "high": pl.Float64, "bound": pl.Float64, "tokens": pl.Int64,
    "asked": pl.String, "file": pl.String,
}  # fmt: skip


def kept(run: store.Run) -> pl.DataFrame:
    """One row per study beside a run, the newest first: answer; machine; bytes of its memory; slots: experts that it
    holds; the fastest way with its ms per token (low and high: 95 % interval over requests); bound: ms that nothing can
    beat; tokens that it was judged on; asked: settings that were given; file. What is no study is left out.
    """
    rows: list[dict[str, Any]] = []
    for path in store.list_plans(run.path, "caching"):
        try:
            rows.append({**_row(Study.of(store.read_plan_document(path))), "file": path.name})
        except (PlanError, StoreError, IndexError, KeyError, TypeError, ValueError):
            continue
    return pl.DataFrame(rows, schema=_KEPT)


def _row(found: Study) -> dict[str, Any]:
    best = found.best
    return {
        "answer": found.verdict.sentence, "machine": found.machine[1], "memory": int(found.memory["total"]),
        "slots": found.slots, "way": short(best), "ms": best.ms, "low": best.low, "high": best.high,
        "bound": found.bound_ms, "tokens": found.tokens, "asked": _words(found),
    }  # fmt: skip


def _words(found: Study) -> str:
    named = {name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
             for name, value in found.asked.items()}  # fmt: skip
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in named.items())
