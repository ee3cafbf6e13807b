"""Confidence: how decided the router was, from sums and histograms over tokens, or token by token.

Sources: entropy, probabilities and margins are plain functions of the router's logits; the z-loss is ST-MoE's (arXiv
2202.08906, equation 5). Means come from sums; percentiles from histograms, so that no token has to be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import MetricError

from ._arrays import FloatArray, ratio


@dataclass(frozen=True)
class RouterConfidence:
    """Means over tokens, or the values of single tokens; all arrays of one shape, NaN where no token counts.

    entropy: of the router probability over all experts, nats, 0..ln E. normalised_entropy: / ln E, 0..1.
    top_probability: largest router probability, 1/E..1. selected_probability: router probability on the selection,
    0..1. first_margin: largest minus second largest logit, from 0. boundary_margin: k-th minus (k+1)-th logit, from 0;
    small means that rounding may flip the selection. z_loss: (logsumexp of the logits) squared. weight_entropy: of the
    gate weights over the selection, nats, 0..ln k.
    """

    entropy: FloatArray
    normalised_entropy: FloatArray
    top_probability: FloatArray
    selected_probability: FloatArray
    first_margin: FloatArray
    boundary_margin: FloatArray
    z_loss: FloatArray
    weight_entropy: FloatArray


def router_confidence(
    *,
    tokens: ArrayLike,
    num_experts: int,
    entropy_sum: ArrayLike,
    top_probability_sum: ArrayLike,
    selected_probability_sum: ArrayLike,
    first_margin_sum: ArrayLike,
    boundary_margin_sum: ArrayLike,
    log_partition_square_sum: ArrayLike,
    weight_entropy_sum: ArrayLike,
) -> RouterConfidence:
    """Means from sums over tokens; every array of one shape, usually (layers,).

    tokens: how many the sums run over, that is those whose logits were finite. Sums over domains or shards may be added
    before.

    Raises:
        MetricError: a negative number of tokens, or fewer than 2 experts.
    """
    seen = np.asarray(tokens, dtype=np.float64)
    if (seen < 0).any():
        raise MetricError(f"tokens holds {seen.min():g}; a sum runs over 0 or more tokens")
    _check_experts(num_experts)

    entropy = ratio(entropy_sum, seen)
    return RouterConfidence(
        entropy=entropy,
        normalised_entropy=entropy / np.log(num_experts),
        top_probability=ratio(top_probability_sum, seen),
        selected_probability=ratio(selected_probability_sum, seen),
        first_margin=ratio(first_margin_sum, seen),
        boundary_margin=ratio(boundary_margin_sum, seen),
        z_loss=ratio(log_partition_square_sum, seen),
        weight_entropy=ratio(weight_entropy_sum, seen),
    )


def percentiles(
    *, lower: ArrayLike, upper: ArrayLike, tokens: ArrayLike, percents: ArrayLike = (10.0, 50.0, 90.0)
) -> FloatArray:
    """Percentiles of a histogram, linearly interpolated inside the bin; NaN for a histogram without tokens.

    lower, upper (bins,): ascending edges; tokens (..., bins): tokens per bin. Returns (..., percents). The error is at
    most the width of the bin; in the last bin, which also holds what lies above its edge, the result is a lower bound.

    Raises:
        MetricError: edges that do not ascend, shapes that do not fit, a negative count, or a percent outside 0..100.
    """
    low, high = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
    counts, wanted = np.asarray(tokens, dtype=np.float64), np.atleast_1d(np.asarray(percents, dtype=np.float64))
    if low.ndim != 1 or low.shape != high.shape or counts.shape[-1:] != low.shape:
        raise MetricError(f"lower {low.shape}, upper {high.shape} and tokens {counts.shape} do not share their bins")
    if not (low < high).all() or (low[1:] < high[:-1]).any():
        raise MetricError("the bins of a histogram ascend and do not overlap; sort them by their lower edge")
    if not (counts >= 0).all():
        raise MetricError("tokens holds a count that is negative or NaN; a bin holds 0 or more tokens")
    if ((wanted < 0) | (wanted > 100)).any():
        raise MetricError(f"percents holds {wanted.tolist()}; a percent lies between 0 and 100")
    result = np.full((*counts.shape[:-1], len(wanted)), np.nan)
    for index in np.ndindex(counts.shape[:-1]):
        filled = np.flatnonzero(counts[index])
        if len(filled):
            result[index] = _quantiles(low[filled], high[filled], counts[index][filled], wanted / 100.0)
    return result


def token_confidence(
    *,
    logits: NDArray[Any],
    selections: NDArray[Any],
    weights: NDArray[Any] | None = None,
    scores: NDArray[Any] | None = None,
    probability: Literal["softmax", "sigmoid"] = "softmax",
) -> RouterConfidence:
    """The same quantities token by token, arrays (tokens,): what the sums add up, and what a test compares them with.

    logits (tokens, E); selections int (tokens, k), -1 = none; weights (tokens, k): gate weights, for weight_entropy.
    scores (tokens, E): what the selection went by, where that is not the logits (sigmoid plus bias): for the margins.
    probability: "softmax", or "sigmoid" divided by its sum over the experts.

    Raises:
        MetricError: shapes that do not fit, or fewer than 2 experts.
    """
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim != 2 or selections.ndim != 2 or len(values) != len(selections):
        raise MetricError(f"logits {values.shape} and selections {selections.shape} take (tokens, E) and (tokens, k)")
    _check_experts(values.shape[1])
    from scipy.special import expit, logsumexp

    partition = logsumexp(values, axis=1)
    p = np.exp(values - partition[:, None])
    if probability == "sigmoid":
        p = expit(values) / expit(values).sum(axis=1, keepdims=True)
    chosen = selections >= 0
    selected = np.where(chosen, np.take_along_axis(p, np.where(chosen, selections, 0), axis=1), 0.0).sum(axis=1)
    ordered = np.sort(values if scores is None else np.asarray(scores, dtype=np.float64), axis=1)[:, ::-1]
    used = chosen.sum(axis=1)
    boundary = np.full(len(values), np.nan)
    inside = (used > 0) & (used < values.shape[1])
    rows = np.flatnonzero(inside)
    boundary[rows] = ordered[rows, used[rows] - 1] - ordered[rows, used[rows]]
    return RouterConfidence(
        entropy=_entropy(p),
        normalised_entropy=_entropy(p) / np.log(values.shape[1]),
        top_probability=p.max(axis=1),
        selected_probability=selected,
        first_margin=ordered[:, 0] - ordered[:, 1],
        boundary_margin=boundary,
        z_loss=partition**2,
        weight_entropy=np.full(len(values), np.nan) if weights is None else _weight_entropy(weights, chosen),
    )


def _check_experts(num_experts: int) -> None:
    if num_experts < 2:
        raise MetricError(f"num_experts is {num_experts}; with fewer than 2 a router decides nothing")


def _quantiles(low: FloatArray, high: FloatArray, counts: FloatArray, quantiles: FloatArray) -> FloatArray:
    """Quantiles of one histogram whose bins all hold tokens."""
    after = np.cumsum(counts)
    target = quantiles * after[-1]
    at = np.minimum(np.searchsorted(after, target, side="left"), len(after) - 1)
    inside = (target - (after[at] - counts[at])) / counts[at]
    values: FloatArray = low[at] + inside * (high[at] - low[at])
    return values


def _entropy(p: FloatArray) -> FloatArray:
    """Entropy of each row, nats; 0 ln 0 = 0."""
    logs = np.log(np.where(p > 0, p, 1.0))
    entropy: FloatArray = -(p * logs).sum(axis=-1)
    return entropy


def _weight_entropy(weights: NDArray[Any], chosen: NDArray[np.bool_]) -> FloatArray:
    """Entropy of the gate weights, normalised over the selection; NaN for a token whose weights sum to 0."""
    kept = np.where(chosen, np.asarray(weights, dtype=np.float64), 0.0)
    total = kept.sum(axis=1, keepdims=True)
    entropy = _entropy(ratio(kept, total, empty=0.0))
    entropy[total[:, 0] <= 0] = np.nan
    return entropy
