"""Lookahead: how much of a layer's choice its own router foresees when it is run early, on an earlier layer's input.

From the sums of table ``lookahead``. Source: Fate (arXiv 2502.12224), which feeds a layer's gate input to the next
layer's router; its "accuracy" is not defined in what we could read, so these are recalls at stated widths. The form
that takes the earlier residual stream through the later layer's own norm is ours.

The sums are not kept by sequence, so there is no interval over sequences: domains can be held beside each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import FloatArray, ratio


def lookahead_recall(*, hits: ArrayLike, selections: ArrayLike) -> FloatArray:
    """Share of the chosen experts that were among the k, k + 1, ... k + 8 predicted ones, 0..1.

    hits (..., widths), selections (...): sums of table ``lookahead``. NaN without selections. Chance, popularity and
    transitions: :mod:`profiler.metrics.transitions`.
    """
    return ratio(hits, _beside(selections))


def lookahead_exact(*, exact: ArrayLike, tokens: ArrayLike) -> FloatArray:
    """Share of the tokens whose whole choice was among them, 0..1; shapes as :func:`lookahead_recall`."""
    return ratio(exact, _beside(tokens))


def lookahead_first_choice(*, first_hits: ArrayLike, tokens: ArrayLike) -> FloatArray:
    """Share of the tokens whose first choice was predicted as first, 0..1."""
    return ratio(first_hits, tokens)


def lookahead_cosine(*, cosine_sum: ArrayLike, tokens: ArrayLike) -> FloatArray:
    """Mean cosine of what the later router was given and its real input, -1..1."""
    return ratio(cosine_sum, tokens)


def _beside(values: ArrayLike) -> FloatArray:
    return np.asarray(values, dtype=np.float64)[..., None]
