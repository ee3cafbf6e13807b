"""Wanda's norm of what enters the second projection, per neuron."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import NEURON, Statistics


def wanda_down(statistics: Statistics) -> pl.DataFrame:
    """sqrt(sum a^2): Wanda scores a weight of the down projection by |W_ij| times this (arXiv 2306.11695)."""
    return statistics.vectors("neuron_activation", "square_sum").select(*NEURON, value=pl.col("square_sum").sqrt())
