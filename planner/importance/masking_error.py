"""Masking error: what leaving one expert out alone adds to the layer's output."""

from __future__ import annotations

import polars as pl

from planner.importance.statistics import EXPERT, Statistics


def masking_error(statistics: Statistics) -> pl.DataFrame:
    """Sum of (g |f|)^2: the squared error of the layer's output without this expert, before anything is routed anew.

    It is the diagonal of the Gram matrix from which :func:`~planner.importance.set_error.set_error` takes any set.
    """
    output = statistics.experts("expert_output", "gated_norm_square_sum")
    return output.select(*EXPERT, value=pl.col("gated_norm_square_sum"))
