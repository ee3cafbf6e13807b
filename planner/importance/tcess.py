"""TCESS of PreMoe: the logits of the experts that the router put first, over all tokens."""

from __future__ import annotations

import polars as pl

from moescope.errors import PlanError
from planner.importance.statistics import EXPERT, Statistics

EIGHTHS = 8
"""The run keeps the confidence in so many equal steps."""


def tcess(statistics: Statistics, *, rank: int | None = None, confidence: float | None = None) -> pl.DataFrame:
    """Sum of z over the tokens that chose the expert, per token of the text (PreMoe, arXiv 2505.17639).

    Args:
        statistics: sums of a run.
        rank: only tokens that had the expert among their first so many choices, 1 (as PreMoe's demo) .. k; None = k.
        confidence: only tokens for which the softmax over the k chosen logits gives the expert at least so much: a
            multiple of 1/8 from 0 to 7/8. It goes with rank None.

    Raises:
        PlanError: a rank or confidence that the run does not keep, or both at once.
    """
    if rank is not None and confidence is not None:
        raise PlanError("tcess takes a rank or a confidence, not both: the run keeps no sums of both together")
    if confidence is not None:
        if not 0 <= confidence < 1 or confidence * EIGHTHS != int(confidence * EIGHTHS):
            raise PlanError(f"confidence {confidence} is not kept: use a multiple of 1/8 from 0 to 0.875")
        places = statistics.ranks("confidence_logit_sum").filter(pl.col("place") >= confidence * EIGHTHS)
        total = pl.col("confidence_logit_sum").sum()
    else:
        places = statistics.ranks("logit_sum")
        kept = max(layer.top_k for layer in statistics.run.layers)
        if rank is not None and not 1 <= rank <= kept:
            raise PlanError(f"rank {rank} is outside 1..{kept}, the experts per token of run {statistics.run.name!r}")
        places = places.filter(pl.col("place") < (rank or kept))
        total = pl.col("logit_sum").sum()
    summed = places.group_by(EXPERT).agg(total=total).join(statistics.tokens(), on=["layer", "step"])
    return summed.select(*EXPERT, value=pl.col("total") / pl.col("tokens")).sort(EXPERT)
