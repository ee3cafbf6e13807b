"""How far one model's predictions are from another's: KL divergence, agreement, and shares compared pairwise.

Sums are kept per sequence, so that every figure has an interval: the sequence is the unit that was sampled.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import MetricError

from ._intervals import check_bootstrap, resample_weights
from .perplexity import Estimate


def kl_divergence(
    *,
    divergence_sum: ArrayLike,
    predictions: ArrayLike,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean KL(base || model) per predicted token, nats: 0 = the same distributions.

    Args:
        divergence_sum: (sequences,) sum over the predicted tokens of each sequence of sum_v p(v) ln(p(v) / q(v)), p the
            base's and q the model's distribution of the next token.
        predictions: (sequences,) how many tokens were predicted there; sequences without any do not count.
        num_resamples, confidence, seed: of the bootstrap over sequences.

    Raises:
        MetricError: nothing was predicted, or shapes and values that cannot be.
    """
    return mean_of_items(
        sums=divergence_sum, items=predictions, num_resamples=num_resamples, confidence=confidence, seed=seed
    )


def top1_agreement(
    *,
    agreed: ArrayLike,
    predictions: ArrayLike,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Share of predicted tokens for which both models hold the same token for the likeliest, 0..1.

    Args:
        agreed: (sequences,) for how many tokens they do.
        predictions: (sequences,) of how many.

    Raises:
        MetricError: as :func:`kl_divergence`.
    """
    return mean_of_items(sums=agreed, items=predictions, num_resamples=num_resamples, confidence=confidence, seed=seed)


def accuracy_difference(
    *,
    hits: ArrayLike,
    base_hits: ArrayLike,
    items: ArrayLike,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Accuracy of a model less that of another on the same items, paired: 0 = no change, -0.1 = 10 points lost.

    Args:
        hits: (sequences,) items that the model has right.
        base_hits: (sequences,) the same of the model that it is compared with.
        items: (sequences,) of both.

    Raises:
        MetricError: as :func:`kl_divergence`.
    """
    difference = np.asarray(hits, np.float64) - np.asarray(base_hits, np.float64)
    return mean_of_items(sums=difference, items=items, num_resamples=num_resamples, confidence=confidence, seed=seed)


def mean_of_items(
    *,
    sums: ArrayLike,
    items: ArrayLike,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean over all items of all sequences, with the percentile interval over sequences.

    Args:
        sums: (sequences,) sum of the items' values.
        items: (sequences,) how many there are; sequences without any are not drawn.

    Raises:
        MetricError: no item, or shapes and values that cannot be.
    """
    total, count = np.asarray(sums, np.float64), np.asarray(items, np.float64)
    if total.shape != count.shape or total.ndim != 1:
        raise MetricError(f"sums {total.shape} and counts {count.shape} take one value per sequence")
    if (count < 0).any() or not np.isfinite(total).all():
        raise MetricError("counts are 0 or more, and sums are finite: a model put out NaN or infinity")
    total, count = total[count > 0], count[count > 0]
    if not len(count):
        raise MetricError("nothing to take a mean of: every sequence has 0 items")
    value = float(total.sum() / count.sum())
    check_bootstrap(num_resamples=num_resamples, confidence=confidence, rule="percentile")
    if len(count) < 2:
        return Estimate(value, float("nan"), float("nan"))
    weights = resample_weights(num_sequences=len(count), num_resamples=num_resamples, seed=seed)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile((weights @ total) / (weights @ count), [tail, 1.0 - tail])
    return Estimate(value, float(low), float(high))
