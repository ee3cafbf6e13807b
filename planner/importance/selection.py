"""From scores to sets: the smallest set of experts that holds a given share."""

from __future__ import annotations

import polars as pl

from moescope.errors import PlanError


def smallest_set(scores: pl.DataFrame, *, share: float) -> pl.DataFrame:
    """The experts of each layer that together hold a share of the layer's score, as few as can be (ESFT).

    Args:
        scores: what :func:`planner.importance.score` gives for a score per expert, none of it negative.
        share: p, above 0 and at most 1.

    Returns:
        The frame with a column ``chosen``. Of equal values the lower expert comes first.

    Raises:
        PlanError: a share outside (0, 1], or scores that are not per expert or negative.
    """
    if not 0 < share <= 1:
        raise PlanError(f"share {share} is outside (0, 1]: give the part of each layer's score that has to be reached")
    if {"neuron", "channel"} & set(scores.columns) or (scores["value"] < 0).any():
        raise PlanError("smallest_set takes a score per expert without negative values, such as esft_gate or frequency")
    ordered = scores.sort(["layer", "step", "value", "expert"], descending=[False, False, True, False])
    value = pl.col("value")
    before = (value.cum_sum() - value).over("layer", "step")
    total = value.sum().over("layer", "step")
    # Rounding must not ask for one more expert where the sum is reached exactly.
    enough = share * total * (1 - 1e-12)
    return ordered.with_columns(chosen=(before < enough) & (value > 0)).sort("layer", "step", "expert")
