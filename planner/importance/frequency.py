"""Frequency: how many tokens chose the expert."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import EXPERT, Statistics


def frequency(statistics: Statistics) -> pl.DataFrame:
    """Selections of each expert; the vote by which SMoE-Dropout keeps experts (arXiv 2303.01610)."""
    load = statistics.experts("expert_load", "tokens")
    return load.select(*EXPERT, value=pl.col("tokens").cast(pl.Float64))
