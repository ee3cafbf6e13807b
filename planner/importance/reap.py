"""REAP: the mean of gate weight times output norm over the tokens that the expert got."""

from __future__ import annotations

import polars as pl

from planner.importance.expressions import mean
from planner.importance.statistics import EXPERT, Statistics


def reap(statistics: Statistics) -> pl.DataFrame:
    """Sum of g |f| over the expert's tokens, over their number (arXiv 2510.13999)."""
    output = statistics.experts("expert_output", "tokens", "gated_norm_sum")
    return output.select(*EXPERT, value=mean("gated_norm_sum"))
