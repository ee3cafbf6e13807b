"""Experts of neighbouring layers: how alike their mean outputs are.

ReXMoE (whose code was not at hand) lets a layer use the experts of its neighbours. A run can say two things about that:
how well the next layer's router does on this layer's input (``lookahead``), and whether experts of both layers push the
residual stream the same way on average. Neither is a trial: an expert was never run in the other layer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import MetricError

from ._arrays import FloatArray, ratio
from .metric import Metric


def cosines(*, first: ArrayLike, second: ArrayLike) -> FloatArray:
    """Cosine of every vector of one set with every one of another, (experts, other experts); NaN for a zero vector.

    first (experts, d), second (other experts, d): such as mean outputs.

    Raises:
        MetricError: vectors of different lengths.
    """
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise MetricError(f"vectors of shapes {one.shape} and {other.shape}; both take (experts, channels)")
    return ratio(one @ other.T, np.outer(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)))


def neighbour_similarity(*, first: ArrayLike, second: ArrayLike) -> FloatArray:
    """For every expert of ``second``, the largest cosine with one of ``first``, (other experts,); NaN where unknown."""
    return _best(cosines(first=first, second=second))


def own_similarity(*, vectors: ArrayLike) -> FloatArray:
    """For every expert of a layer, the largest cosine with another one of it, (experts,); NaN where unknown."""
    table = cosines(first=vectors, second=vectors)
    np.fill_diagonal(table, np.nan)
    return _best(table)


def _best(table: FloatArray) -> FloatArray:
    """The largest known cosine of each column; NaN where none is."""
    known = np.isfinite(table)
    best = np.where(known, table, -np.inf).max(axis=0, initial=-np.inf)
    return np.where(known.any(axis=0), best, np.nan)


METRICS = (
    Metric(
        "neighbour_similarity",
        "Similarity to the layer before",
        "cosine",
        "-1..1",
        "experts push the stream as some expert of the layer before does",
        "ours",
        section="""
        For every expert, the cosine of its mean output with the nearest expert of the MoE layer before, averaged over
        the experts. Beside it `within`: the same with the other experts of its own layer; and `shuffled`: with the
        channels of the earlier layer exchanged, which leaves sizes and takes the meaning. It is about means over each
        expert's own tokens: alike means do not say that one expert can stand in for another, and a large common mean
        makes all alike.
        - Formula: mean over j of the maximum over i of cos(mean output of i in layer l-1, mean output of j in layer l)
        """,
    ),
)
