"""Load: how evenly the tokens spread over the experts of a layer.

Sources: Gini, entropy and coefficient of variation are standard; MaxVio is max load over mean load - 1 (Wang et al.,
arXiv 2408.15664); the load-balance loss is the Switch Transformer's (arXiv 2101.03961, equation 4). Local against
global balance: arXiv 2505.16056.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import MetricError

from ._arrays import BoolArray, FloatArray, IntArray, ratio
from ._trace import Trace


@dataclass(frozen=True)
class Balance:
    """How evenly one quantity spreads over E experts, per layer: all arrays (layers,), NaN for a layer without load.

    entropy: of the shares, nats, 0..ln E. normalised_entropy: entropy / ln E, 0..1 (1 for E = 1). effective_experts:
    exp(entropy), 1..E. gini: 0 = even, (E - 1)/E = all on one. cv: population standard deviation (ddof = 0) over mean,
    from 0. max_over_mean: from 1. max_violation: max_over_mean - 1 (MaxVio). min_over_mean: 0..1. kl_uniform:
    divergence from uniform, nats, ln E - entropy.
    """

    entropy: FloatArray
    normalised_entropy: FloatArray
    effective_experts: FloatArray
    gini: FloatArray
    cv: FloatArray
    max_over_mean: FloatArray
    max_violation: FloatArray
    min_over_mean: FloatArray
    kl_uniform: FloatArray


@dataclass(frozen=True)
class DeadExperts:
    """Experts that were (almost) never used, and how many of them chance explains.

    dead, nearly_dead: (layers, experts). zero_probability: (layers,) the chance that an expert of a perfectly balanced
    router is never used on so few tokens, (1 - k/E)^N. expected_dead: (layers,) E times that; when it is not far below
    1, "dead" means "too few tokens".
    """

    dead: BoolArray
    nearly_dead: BoolArray
    zero_probability: FloatArray
    expected_dead: FloatArray


@dataclass(frozen=True)
class LoadBalanceLoss:
    """The auxiliary loss in both conventions, per layer (layers,); computed per layer, never over layers pooled.

    sum_form: E * sum of f * P with f = tokens that use an expert / tokens, so that balance reads k. mean_form: the same
    with f divided by k, so that balance reads 1. Above means imbalance that the router's probabilities share.
    """

    sum_form: FloatArray
    mean_form: FloatArray


def share(*, load: ArrayLike) -> FloatArray:
    """Share of each expert in its layer's load: (layers, experts), rows sum to 1; NaN for a layer without load.

    load (layers, experts): selections, or gate mass.
    """
    values = _checked(load)
    return ratio(values, values.sum(axis=1, keepdims=True))


def balance(*, load: ArrayLike) -> Balance:
    """Every measure of evenness of ``load`` (layers, experts): selections (int) or gate mass (float).

    Raises:
        MetricError: not two axes, no experts, or a value that is negative, infinite or NaN.
    """
    shares = share(load=load)
    return _balance(shares)


def dead_experts(
    *, counts: ArrayLike, top_k: float, tokens: ArrayLike | None = None, threshold: float = 0.05
) -> DeadExperts:
    """Experts with no selection, and experts with less than ``threshold`` of the balanced load k N / E.

    counts (layers, experts): selections. tokens: N, a number or (layers,); by default counts.sum / top_k.

    Raises:
        MetricError: counts as in ``balance``, top_k outside 1..E, or a threshold outside 0..1.
    """
    values = _checked(counts)
    experts = values.shape[1]
    if not 0 < top_k <= experts:
        raise MetricError(f"top_k is {top_k} with {experts} experts; it lies above 0 and at most num_experts")
    if not 0.0 <= threshold <= 1.0:
        raise MetricError(f"threshold is {threshold}; it is a share of the balanced load, 0 to 1")
    seen = np.broadcast_to(
        values.sum(axis=1) / top_k if tokens is None else np.asarray(tokens, float), values.shape[:1]
    )
    zero = np.asarray((1.0 - top_k / experts) ** seen, dtype=np.float64)
    nearly = values < threshold * top_k * seen[:, None] / experts
    return DeadExperts(values == 0, nearly, zero, experts * zero)


def noise_cv(*, num_experts: int, top_k: float, tokens: ArrayLike) -> FloatArray:
    """The cv that a perfectly balanced router shows on N tokens by chance alone: sqrt((E/k - 1) / N)."""
    return np.asarray(np.sqrt((num_experts / top_k - 1.0) / np.asarray(tokens, dtype=np.float64)), dtype=np.float64)


def local_balance(*, selections: NDArray[Any], num_experts: int, window: int | None = None) -> Balance:
    """Evenness inside single sequences, or windows of them, averaged: (layers,) each.

    Global balance can hide local imbalance: each text uses few experts, and another text uses others. Short windows are
    uneven by chance: compare cv with ``noise_cv`` at the window's length, or with shuffled controls.

    selections: int (layers, sequences, tokens, k), -1 = none. window: tokens; consecutive windows that do not overlap,
    a shorter rest is left out; None = whole sequences.

    Raises:
        MetricError: selections out of shape or range, window below 1, or no sequence that long.
    """
    trace = Trace.of(selections, num_experts)
    if window is not None and not 1 <= window <= int(trace.lengths.max()):
        raise MetricError(f"window is {window}; it takes 1 to {int(trace.lengths.max())} tokens, the longest sequence")
    layers = [_local(trace, layer, window) for layer in range(trace.num_layers)]
    return Balance(*(np.array(values, dtype=np.float64) for values in zip(*layers, strict=True)))


def load_balance_loss(
    *, counts: ArrayLike, probability_sums: ArrayLike, tokens: ArrayLike, top_k: float
) -> LoadBalanceLoss:
    """The Switch load-balance loss from sums: E * sum over experts of f * P, per layer.

    counts, probability_sums (layers, experts): selections, and router probability summed over all tokens; tokens: a
    number or (layers,). Libraries that pool the layers before multiplying (transformers does) report another value.

    Raises:
        MetricError: arrays of different shapes, or values as in ``balance``.
    """
    used, probability = _checked(counts), _checked(probability_sums)
    if used.shape != probability.shape:
        raise MetricError(f"counts has shape {used.shape}, probability_sums {probability.shape}; they go together")
    seen = np.broadcast_to(np.asarray(tokens, dtype=np.float64), used.shape[:1])
    products = (used * probability).sum(axis=1) * used.shape[1]
    loss = ratio(products, seen**2)
    return LoadBalanceLoss(loss, loss / top_k)


def _checked(load: ArrayLike) -> FloatArray:
    """``load`` as float64 (layers, experts), or an error that says what is wrong."""
    values = np.asarray(load, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise MetricError(f"load has shape {values.shape}; it takes (layers, experts) with at least one expert")
    if not np.isfinite(values).all() or (values < 0).any():
        layer, expert = np.argwhere(~np.isfinite(values) | (values < 0))[0]
        raise MetricError(
            f"load of layer {layer}, expert {expert} is {values[layer, expert]}; loads are finite, from 0"
        )
    return values


def _balance(shares: FloatArray) -> Balance:
    """Evenness of shares (rows, experts); rows without load are NaN."""
    experts = shares.shape[-1]
    entropy = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1.0)), 0.0).sum(axis=-1)
    entropy = np.where(np.isnan(shares[..., 0]), np.nan, np.maximum(entropy, 0.0))
    ranks = 2.0 * np.arange(1, experts + 1) - experts - 1
    relative = shares * experts  # load over mean load
    largest = relative.max(axis=-1)
    return Balance(
        entropy=entropy,
        normalised_entropy=entropy / np.log(experts) if experts > 1 else np.where(np.isnan(entropy), np.nan, 1.0),
        effective_experts=np.exp(entropy),
        gini=(np.sort(shares, axis=-1) * ranks).sum(axis=-1) / experts,
        cv=relative.std(axis=-1),
        max_over_mean=largest,
        max_violation=largest - 1.0,
        min_over_mean=relative.min(axis=-1),
        kl_uniform=np.maximum(np.log(experts) - entropy, 0.0),
    )


def _local(trace: Trace, layer: int, window: int | None) -> list[float]:
    """The fields of ``Balance``, each averaged over the windows of one layer that hold a selection."""
    sequence = np.repeat(np.arange(len(trace.lengths)), trace.lengths)
    group, groups = sequence, len(trace.lengths)
    if window is not None:
        position = np.arange(len(sequence)) - trace.offsets[sequence]
        whole = trace.lengths // window
        first = np.cumsum(whole) - whole
        inside = position < (whole * window)[sequence]
        group = np.where(inside, first[sequence] + position // window, -1)
        groups = int(whole.sum())
    counts = _group_counts(trace.layer(layer), group, groups, trace.num_experts)
    used = counts[counts.any(axis=1)].astype(np.float64)
    if not len(used):
        return [np.nan] * len(Balance.__dataclass_fields__)
    measured = _balance(used / used.sum(axis=1, keepdims=True))
    return [float(np.mean(getattr(measured, name))) for name in Balance.__dataclass_fields__]


def _group_counts(ids: NDArray[Any], group: IntArray, groups: int, experts: int) -> IntArray:
    """Selections per group of tokens and expert, (groups, experts); group (tokens,), -1 = left out; ids (tokens, k)."""
    counted = (ids >= 0) & (group >= 0)[:, None]
    bins = (group[:, None] * experts + ids)[counted]
    return np.bincount(bins, minlength=groups * experts).reshape(groups, experts).astype(np.int64)
