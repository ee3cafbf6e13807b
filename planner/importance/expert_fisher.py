"""Expert Fisher: the empirical Fisher information of an expert's mask."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import EXPERT, Statistics


def expert_fisher(statistics: Statistics) -> pl.DataFrame:
    """Sum over tokens of (sum over neurons of a h)^2."""
    gradient = statistics.experts("expert_gradient", "product_square_sum")
    return gradient.select(*EXPERT, value=pl.col("product_square_sum"))
