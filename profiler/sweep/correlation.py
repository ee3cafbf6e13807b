"""Rank correlation of two figures of tokens, with an interval over sequences; no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from moescope.errors import MetricError
from profiler.metrics._intervals import resample_weights
from profiler.metrics.perplexity import Estimate

FloatArray = NDArray[np.float64]


def ranks(values: ArrayLike) -> FloatArray:
    """(tokens,) ranks from 1, ties sharing their mean."""
    found: FloatArray = rankdata(np.asarray(values, np.float64))
    return found


def correlation(
    x: ArrayLike, y: ArrayLike, *, sequence: ArrayLike, num_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Pearson's correlation with its 95 % percentile interval over sequences; of ranks, it is Spearman's.

    Args:
        x, y: (tokens,) the two figures. Ranks are those of the whole sample in every resample.
        sequence: (tokens,) of which sequence each token is.

    Returns:
        NaN where a figure does not vary; NaN ends with fewer than two sequences.

    Raises:
        MetricError: not as many of each.
    """
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    _, group = np.unique(np.asarray(sequence), return_inverse=True)
    if not first.shape == second.shape == group.shape:
        raise MetricError(f"x {first.shape}, y {second.shape} and sequence {group.shape} take one value per token")
    if not len(first):
        return Estimate(float("nan"), float("nan"), float("nan"))
    # Around the mean of the sample, so that sums of squares lose no digits.
    first, second = first - first.mean(), second - second.mean()
    products = (np.ones_like(first), first, second, first * first, second * second, first * second)
    sums = np.stack([np.bincount(group, weights=one) for one in products], axis=1)
    value = float(_of_sums(sums.sum(0)[None])[0])
    if len(sums) < 2 or np.isnan(value):
        return Estimate(value, float("nan"), float("nan"))
    weights = resample_weights(num_sequences=len(sums), num_resamples=num_resamples, seed=seed)
    drawn = _of_sums(weights @ sums)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _of_sums(sums: FloatArray) -> FloatArray:
    """(rows,) of sums (rows, 6): count, x, y, xx, yy, xy."""
    count, x, y, xx, yy, xy = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (count * xx - x * x) * (count * yy - y * y)
        found: FloatArray = np.where(spread > 1e-9, (count * xy - x * y) / np.sqrt(np.maximum(spread, 0)), np.nan)
    return found
