"""Read-ME: how strongly a neuron fires on average."""

from __future__ import annotations

import polars as pl

from planner.importance.expressions import mean
from planner.importance.statistics import NEURON, Statistics


def read_me(statistics: Statistics) -> pl.DataFrame:
    """Mean of |a| over the expert's tokens; per domain it gives Read-ME's masks (arXiv 2410.19123)."""
    return statistics.vectors("neuron_activation", "absolute_sum").select(*NEURON, value=mean("absolute_sum"))
