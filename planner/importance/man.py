"""MAN: the mean output norm over the tokens that the expert got."""

from __future__ import annotations

import polars as pl

from planner.importance.expressions import mean
from planner.importance.statistics import EXPERT, Statistics


def man(statistics: Statistics) -> pl.DataFrame:
    """Mean of |f| over the expert's tokens, by the name that arXiv 2606.15716 gives it; from its abstract only."""
    return statistics.experts("expert_output", "tokens", "norm_sum").select(*EXPERT, value=mean("norm_sum"))
