"""Width score: how strongly a neuron fires, times what it can do with it."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import NEURON, Statistics


def width(statistics: Statistics) -> pl.DataFrame:
    """Sum of |a| times |w|, w the neuron's column of the down projection (SparseUnifiedModel, arXiv 2512.02351)."""
    frame = statistics.vectors("neuron_activation", "absolute_sum", norm="down_norm")
    return frame.select(*NEURON, value=pl.col("absolute_sum") * pl.col("down_norm"))
