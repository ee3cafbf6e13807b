"""Axes: how much the routing of a layer depends on where a token or its sequence lies on an axis.

DiT-MoE (arXiv 2407.11633) looks at timestep, patch and class this way. An axis may be anything that sequences are
labelled with, or the position of a token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import MetricError

from ._arrays import FloatArray, IntArray, ratio
from .metric import Metric


def axis_counts(*, ids: NDArray[Any], place: IntArray, num_values: int, num_experts: int) -> IntArray:
    """Selections by value of an axis and expert, (values, experts); they add up.

    ids (tokens, k), -1 = none; place (tokens,): index of each token's value, -1 = left out.

    Raises:
        MetricError: a place or an id beyond the last.
    """
    if place.max(initial=-1) >= num_values or ids.max(initial=-1) >= num_experts:
        raise MetricError(f"a token lies beyond value {num_values - 1} or uses an expert beyond {num_experts - 1}")
    counted = (ids >= 0) & (place >= 0)[:, None]
    bins = (place[:, None] * num_experts + ids)[counted]
    return np.bincount(bins, minlength=num_values * num_experts).reshape(num_values, num_experts).astype(np.int64)


def axis_distance(*, counts: ArrayLike) -> FloatArray:
    """How far the load of each value lies from the load of all values together, (..., values), 0..1.

    The part of a value's selections that would have to go to other experts: half the sum of absolute differences. NaN
    for a value without selections. counts (..., values, experts): :func:`axis_counts`.
    """
    values = np.asarray(counts, dtype=np.float64)
    pooled = values.sum(axis=-2, keepdims=True)
    pooled = ratio(pooled, pooled.sum(axis=-1, keepdims=True))
    distance: FloatArray = np.abs(ratio(values, values.sum(axis=-1, keepdims=True)) - pooled).sum(axis=-1) / 2.0
    return distance


METRICS = (
    Metric(
        "axis_distance",
        "Distance along an axis",
        "share",
        "0..1",
        "the router treats the value unlike the others",
        "arXiv 2407.11633",
        section="""
        How much routing depends on a free axis: what sequences were labelled with (timestep, class, ...), or position.
        Control `exchanged` gives the labels to other sequences (or tokens of a text other positions): what few tokens,
        and sequences that route alike, give of nothing. The paper shows maps; the figure is ours, and the same as the
        distance of domains, but for the average, in which values count by their tokens.
        - Formula: half the sum over experts of |share of the value's selections - share of all selections|; of an axis:
          the mean over its values, weighted by their selections
        """,
    ),
)
