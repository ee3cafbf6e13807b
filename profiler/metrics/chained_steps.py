"""Chained steps: a layer that calls its experts several times, each time with the state that the last call left.

Chain-of-Experts (arXiv 2506.18945) has a router per call. Whether a further call brings in other experts, or runs the
same ones again, shows in how often a token's experts of one call are chosen again in the next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import MetricError

from ._arrays import FloatArray, ratio
from .metric import Metric


def step_repeat(*, counts: ArrayLike, later: ArrayLike) -> FloatArray:
    """Share of a step's choices that the step before made too, for the same token, 0..1.

    counts (..., experts, experts): tokens that use expert i in the earlier step and j in the later one
    (``transitions.transition_counts``); later (..., experts): choices of the later step. NaN without choices.

    Raises:
        MetricError: the steps have different numbers of experts, so that none of them is the same.
    """
    table = np.asarray(counts, dtype=np.float64)
    if table.shape[-1] != table.shape[-2]:
        raise MetricError(f"steps of {table.shape[-2]} and {table.shape[-1]} experts have none in common")
    return ratio(np.trace(table, axis1=-2, axis2=-1), np.asarray(later, dtype=np.float64).sum(axis=-1))


def repeat_by_popularity(*, earlier: ArrayLike, later: ArrayLike, tokens: ArrayLike) -> FloatArray:
    """What :func:`step_repeat` would be if both steps chose independently of each other, each as popular as it is.

    earlier, later (..., experts): choices of each step; tokens (...).
    """
    first, second = np.asarray(earlier, dtype=np.float64), np.asarray(later, dtype=np.float64)
    return ratio(ratio((first * second).sum(axis=-1), tokens), second.sum(axis=-1))


METRICS = (
    Metric(
        "step_repeat",
        "Step repeat",
        "share",
        "0..1",
        "a further call runs the experts of the one before again",
        "arXiv 2506.18945",
        section="""
        Of the experts that a token chooses in one call of a layer, the share that it chose in the call before. Popular
        experts alone repeat too: control `popularity` says how often, had both calls chosen independently.
        - Formula: sum over experts of tokens that use the expert in both steps / choices of the later step
        """,
    ),
)
