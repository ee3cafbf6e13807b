"""Expert Taylor: what the loss gains when an expert falls silent, to first order."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import EXPERT, Statistics


def expert_taylor(statistics: Statistics) -> pl.DataFrame:
    """|sum over tokens and neurons of a h|, which is |sum over tokens of f' dL/df|: the expert as one mask."""
    return statistics.experts("expert_gradient", "product_sum").select(*EXPERT, value=pl.col("product_sum").abs())
