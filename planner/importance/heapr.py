"""HEAPr: what the loss gains when a neuron falls silent, to second order."""

from __future__ import annotations

from typing import Literal

import polars as pl

from moescope.errors import PlanError
from planner.importance.expressions import mean
from planner.importance.statistics import NEURON, Statistics


def heapr(statistics: Statistics, *, weighting: Literal["mean", "total"] = "mean") -> pl.DataFrame:
    """mean(a^2) times mean(h^2), h the gradient of the loss by a, both over the expert's tokens (ICLR 2026).

    The paper's w' M w with M = mean(u u'), u the gradient by the expert's output, equals mean(h^2): u' w is what the
    backward already computes at the down projection's input. So one forward and backward do, and no matrix is kept.

    Args:
        statistics: sums of a run.
        weighting: ``mean`` as published, where how often an expert is used does not count; ``total`` multiplies by its
            number of tokens.

    Raises:
        PlanError: another weighting.
    """
    if weighting not in ("mean", "total"):
        raise PlanError(f"weighting {weighting!r} is not known: use mean or total")
    sums = statistics.vectors("neuron_gradient", "activation_square_sum", "gradient_square_sum")
    value = mean("activation_square_sum") * mean("gradient_square_sum")
    return sums.select(*NEURON, value=value * pl.col("tokens") if weighting == "total" else value)
