"""Where a run stands among the 20 published models by local routing consistency (arXiv 2505.16056)."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import polars as pl

import store
from profiler.metrics.local_consistency import slots_at_ratio
from profiler.metrics.published import published_hit_rates, published_srp

SEGMENT = 16
"""Tokens of the segments that are compared."""

RATIO = 2.0
"""Size of the shared cache that is compared, in what one token uses: about where hit rates have their knee."""

Place = tuple[float, int, int]
"""(value, its place, the highest first, among how many published values)."""


def srp_place(run: store.Run) -> Place | None:
    """SRP of the whole model; None where the run's metrics are missing."""
    return _among(
        run.metrics("srp").filter(pl.col("expert").is_null() & (pl.col("at") == SEGMENT)), SEGMENT,
        [one.value for one in published_srp() if one.segment_length == SEGMENT],
    )  # fmt: skip


def sch_place(run: store.Run) -> Place | None:
    """SCH of one cache that all layers share, by the published convention; None where it is missing."""
    rows = run.metrics("hit_rate_sch")
    asked = [text for text in rows["parameters"].unique().to_list() if _is_asked(text)]
    top_k = [layer.top_k for layer in run.layers]
    slots = slots_at_ratio(ratio=RATIO, top_k=1, num_layers=sum(top_k))
    others = [
        one.value for one in published_hit_rates()
        if one.policy == "sch" and one.segment_length == SEGMENT and one.ratio == RATIO
    ]  # fmt: skip
    return _among(rows.filter(pl.col("parameters").is_in(asked)), slots, others)


def _is_asked(text: str | None) -> bool:
    given = json.loads(text or "{}")
    return bool(given.get("shared")) and given.get("segment_length") == SEGMENT


def _among(rows: pl.DataFrame, at: float, others: Sequence[float]) -> Place | None:
    """Large shared caches are known at every third size or so: between two of them the value is taken on a line."""
    mine = rows.filter((pl.col("control") == "observed") & pl.col("layer").is_null() & pl.col("domain").is_null())
    known = mine.sort("at")["at"].to_numpy()
    if not len(known) or not known[0] <= at <= known[-1]:
        return None
    value = float(np.interp(at, known, mine.sort("at")["value"].to_numpy()))
    return value, 1 + sum(other > value for other in others), len(others)
