"""MSAN: the mean squared output norm over the tokens that the expert got."""

from __future__ import annotations

import polars as pl

from planner.importance.expressions import mean
from planner.importance.statistics import EXPERT, Statistics


def msan(statistics: Statistics) -> pl.DataFrame:
    """Mean of |f|^2 over the expert's tokens, by the name that arXiv 2606.15716 gives it; from its abstract only."""
    output = statistics.experts("expert_output", "tokens", "norm_square_sum")
    return output.select(*EXPERT, value=mean("norm_square_sum"))
