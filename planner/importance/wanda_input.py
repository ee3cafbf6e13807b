"""Wanda's norm of what enters the first projection, per channel and expert."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import CHANNEL, Statistics


def wanda_input(statistics: Statistics) -> pl.DataFrame:
    """sqrt(sum x^2) over the expert's own tokens: Wanda scores a weight of gate and up by |W_ij| times this."""
    inputs = statistics.vectors("expert_vector", "input_square_sum", axis="channel")
    return inputs.select(*CHANNEL, value=pl.col("input_square_sum").sqrt())
