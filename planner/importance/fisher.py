"""Fisher: the empirical Fisher information of a neuron's mask."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import NEURON, Statistics


def fisher(statistics: Statistics) -> pl.DataFrame:
    """Sum of (a h)^2 over the expert's tokens; it keeps the coupling that HEAPr's product of means leaves out."""
    gradient = statistics.vectors("neuron_gradient", "product_square_sum")
    return gradient.select(*NEURON, value=pl.col("product_square_sum"))
