"""Taylor: what the loss gains when a neuron falls silent, to first order."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import NEURON, Statistics


def taylor(statistics: Statistics) -> pl.DataFrame:
    """|sum a h| over the expert's tokens, h the gradient of the loss by a (Molchanov et al., arXiv 1611.06440)."""
    return statistics.vectors("neuron_gradient", "product_sum").select(*NEURON, value=pl.col("product_sum").abs())
