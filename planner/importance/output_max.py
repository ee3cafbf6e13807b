"""Output maximum: the largest outlier that the expert puts out; super experts are guarded by it."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import EXPERT, Statistics


def output_max(statistics: Statistics) -> pl.DataFrame:
    """Largest |f| over the expert's tokens and channels, before the gate weight (arXiv 2507.23279).

    It guards rather than ranks: which values make a super expert says :mod:`profiler.metrics.super_experts`.
    """
    return statistics.experts("expert_output", "output_max").select(*EXPERT, value=pl.col("output_max"))
