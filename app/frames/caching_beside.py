"""Published policies, ways to put sequences together and orders of bit planes, as tables."""

from __future__ import annotations

from typing import Any

import polars as pl

import store
from app.frames.caching import narrowed, split
from planner.cache.beside import Beside, beside


def compared(run: store.Run, *, name: str, bits: int | None = None, **asked: Any) -> Beside:
    """All three comparisons; arguments as :func:`app.frames.caching.answer`.

    Raises:
        PlanError: as there.
    """
    machine, serving = split(name, asked)
    return beside(run, machine, plan=narrowed(run, bits), **serving)


def policies(found: Beside) -> pl.DataFrame:
    """One row per policy, the best first; those that know the future, which no engine does, at the end."""
    rows = [
        {
            "policy": one.title, "hit rate": one.hit_rate, "95 %": f"{one.low:.1%} to {one.high:.1%}",
            "steps that wait": one.stalled, "ms per token, loaded": one.ms, "knows the future": one.bound,
            "shipped by": one.engine, "source": one.source,
        }
        for one in found.policies
    ]  # fmt: skip
    return pl.DataFrame(rows)


def told_policies(found: Beside) -> pl.DataFrame:
    """The policies as they are printed: shares in per cent; sources are in docs/caching.md."""
    rows = [
        {
            "policy": one.title, "hits": f"{one.hit_rate:.1%} ({one.low:.1%} to {one.high:.1%})",
            "stalled": f"{one.stalled:.0%}", "ms per token": float(f"{one.ms:.3g}"),
            "knows the future": "yes" if one.bound else "no",
        }
        for one in found.policies
    ]  # fmt: skip
    return pl.DataFrame(rows)


def foreseen(found: Beside) -> pl.DataFrame:
    """One row per way to foresee experts one layer ahead; empty where nothing can be prefetched."""
    rows = [
        {
            "foreseen by": f"{one.title}{' (drawn)' if one.drawn else ''}", "recall": one.recall, "chance": one.chance,
            "precision": one.precision, "steps whole": one.exact, "of what LRU lacks": one.recall_of_missing,
            "hit rate": one.hit_rate, "MB per token": one.loads_per_token / 1e6,
            "of which wasted": one.wasted_per_token / 1e6, "ms per token": one.ms, "source": one.source,
        }
        for one in found.foreseen
    ]  # fmt: skip
    return pl.DataFrame(rows)


def told_foreseen(found: Beside) -> pl.DataFrame:
    """The same as it is printed: shares in per cent."""
    frame = foreseen(found)
    shares = ("recall", "chance", "precision", "steps whole", "of what LRU lacks", "hit rate")
    percent = [pl.Series(name, [f"{value:.1%}" for value in frame[name].to_list()]) for name in shares]
    return frame.with_columns(percent).drop("source", "chance")


def outlook(found: Beside) -> pl.DataFrame:
    """One row per policy and kind of text yet to come."""
    rows = [
        {
            "caches": one.policy, "text": one.text, "expected": f"{one.rate:.1%}",
            "95 %": f"{one.low:.1%} to {one.high:.1%}", "came": None if one.came is None else f"{one.came:.1%}",
        }
        for one in found.outlook
    ]  # fmt: skip
    schema = dict.fromkeys(("caches", "text", "expected", "95 %", "came"), pl.String)
    return pl.DataFrame(rows, schema=schema)


def batches(found: Beside) -> pl.DataFrame:
    """One row per way to put sequences together, order of arrival first."""
    rows = [
        {
            "sequences": one.title, "at once": one.size, "experts read per token and layer": one.unique,
            "hit rate": one.hit_rate, "MB per token": one.loads_per_token / 1e6, "ms per token": one.ms,
            "source": one.source,
        }
        for one in found.batches
    ]  # fmt: skip
    return pl.DataFrame(rows)


def planes(found: Beside) -> pl.DataFrame:
    """One row per order of loads within a step; empty where gate weights are missing."""
    rows = [
        {"bit planes": one.order, "ms per step": one.ms, "of which idle": one.idle, "no order beats": one.least}
        for one in found.planes
    ]
    schema = {"bit planes": pl.String, "ms per step": pl.Float64, "of which idle": pl.Float64,
              "no order beats": pl.Float64}  # fmt: skip
    return pl.DataFrame(rows, schema=schema)
