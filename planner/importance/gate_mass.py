"""Gate mass: the gate weights that the expert was used with."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import EXPERT, Statistics


def gate_mass(statistics: Statistics) -> pl.DataFrame:
    """Sum of the gate weights of each expert."""
    return statistics.experts("expert_load", "gate_sum").select(*EXPERT, value=pl.col("gate_sum"))
