"""Perplexity from sums per sequence, the effect of a change on it, and the decay of attention sinks.

Sums of the loss and counts of predicted tokens are kept per sequence, so that every figure has an interval: the
sequence is the unit that was sampled. Two models on the same sequences are compared pairwise, which is far sharper
than comparing two intervals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import MetricError

from ._arrays import FloatArray, ratio
from ._intervals import check_bootstrap, resample_weights


@dataclass(frozen=True)
class Estimate:
    """A value with its percentile interval over sequences; the ends are NaN with fewer than two sequences."""

    value: float
    low: float
    high: float


def perplexity(
    *,
    loss_sum: ArrayLike,
    predictions: ArrayLike,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """exp(sum of the loss / number of predictions), all sequences pooled.

    Args:
        loss_sum: (sequences,) sum of -ln p(next token) over the predicted tokens of each sequence, nats.
        predictions: (sequences,) how many tokens were predicted there; sequences without any do not count.
        num_resamples, confidence, seed: of the bootstrap over sequences.

    Raises:
        MetricError: nothing was predicted, or shapes and values that cannot be.
    """
    loss, counts = _checked(loss_sum, predictions)
    return _exponential(loss, counts, num_resamples, confidence, seed)


def perplexity_ratio(
    *,
    loss_sum: ArrayLike,
    base_loss_sum: ArrayLike,
    predictions: ArrayLike,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Perplexity of one model over that of another on the same sequences, paired: 1 = no change, 2 = twice as high.

    Args:
        loss_sum: (sequences,) as in :func:`perplexity`.
        base_loss_sum: (sequences,) the same of the model that it is compared with.
        predictions: (sequences,) of both.

    Raises:
        MetricError: as :func:`perplexity`.
    """
    loss, counts = _checked(loss_sum, predictions)
    base, _ = _checked(base_loss_sum, predictions)
    return _exponential(loss - base, counts, num_resamples, confidence, seed)


def sink_decay(*, sink_sum: ArrayLike, base_sink_sum: ArrayLike) -> float:
    """D_sink of one layer: 1 - mean over heads of (sum of p' / sum of p), p being the attention on position 0.

    Args:
        sink_sum: (heads,) sum over queries of the attention probability of position 0, after a change of the model.
        base_sink_sum: (heads,) the same before it, over the same queries.

    Returns:
        1 = the sink is gone, 0 = it is as it was, below 0 = it has grown. NaN where no head looks at position 0.
        The paper leaves open whether queries are averaged before or after dividing. Here sums are divided: the mean of
        ratios would be ruled by the queries that hardly look at the sink. Heads without any attention on it are left
        out.

    Raises:
        MetricError: different numbers of heads.
    """
    after, before = np.asarray(sink_sum, np.float64), np.asarray(base_sink_sum, np.float64)
    if after.shape != before.shape or after.ndim != 1:
        raise MetricError(f"sink_sum {after.shape} and base_sink_sum {before.shape} take one value per head")
    kept = ratio(after, before)
    return float(1.0 - np.nanmean(kept)) if np.isfinite(kept).any() else float("nan")


def _exponential(loss: FloatArray, counts: FloatArray, num_resamples: int, confidence: float, seed: int) -> Estimate:
    """exp of a ratio of sums with its interval; the exponential keeps the order, so quantiles pass through it."""
    value = float(np.exp(loss.sum() / counts.sum()))
    check_bootstrap(num_resamples=num_resamples, confidence=confidence, rule="percentile")
    if len(counts) < 2:
        return Estimate(value, float("nan"), float("nan"))
    weights = resample_weights(num_sequences=len(counts), num_resamples=num_resamples, seed=seed)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.exp((weights @ loss) / (weights @ counts)), [tail, 1.0 - tail])
    return Estimate(value, float(low), float(high))


def _checked(loss_sum: ArrayLike, predictions: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both as float64, without the sequences in which nothing was predicted."""
    loss, counts = np.asarray(loss_sum, np.float64), np.asarray(predictions, np.float64)
    if loss.shape != counts.shape or loss.ndim != 1:
        raise MetricError(f"loss_sum {loss.shape} and predictions {counts.shape} take one value per sequence")
    if (counts < 0).any() or not np.isfinite(loss).all():
        raise MetricError("predictions are counts, and losses are finite: a model put out NaN or infinity")
    kept = counts > 0
    if not kept.any():
        raise MetricError("nothing was predicted: a sequence needs at least two tokens")
    return loss[kept], counts[kept]
