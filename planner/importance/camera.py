"""CAMERA: the energy that a neuron puts into the layer's output."""

from __future__ import annotations

import polars as pl

from moescope.errors import PlanError
from planner.importance.statistics import NEURON, Statistics


def camera(statistics: Statistics, *, alpha: float = 0.9) -> pl.DataFrame:
    """((1 - alpha) sum (g a)^2 + alpha max (g a)^2) |w|^2, w the neuron's column of the down projection (AAAI 2026).

    Args:
        statistics: sums of a run.
        alpha: part of the maximum, 0..1; 0.9 is what the published run used. With 0 the value is exactly the squared
            error of the layer's output without this neuron.

    Raises:
        PlanError: an alpha outside 0..1.
    """
    if not 0 <= alpha <= 1:
        raise PlanError(f"alpha {alpha} is outside 0..1")
    frame = statistics.vectors("neuron_activation", "gated_square_sum", "gated_absolute_max", norm="down_norm")
    mixed = (1 - alpha) * pl.col("gated_square_sum") + alpha * pl.col("gated_absolute_max") ** 2
    return frame.select(*NEURON, value=mixed * pl.col("down_norm") ** 2)
