"""EAN: the sum of output norms over the tokens that the expert got."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import EXPERT, Statistics


def ean(statistics: Statistics) -> pl.DataFrame:
    """Sum of |f| over the expert's tokens; ``ean_sum`` in REAP's code, whose ``ean_mean`` is ``man`` here."""
    return statistics.experts("expert_output", "norm_sum").select(*EXPERT, value=pl.col("norm_sum"))
