"""How alike two rankings of the experts are, and whether they would cut the same ones.

Spearman's rho and Kendall's tau-b are standard. The overlap of two cuts has ties shared out: where experts tie at the
cut, each belongs to it in part, as if the tie were broken by lot; so experts that nobody used do not seem to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import MetricError

from ._arrays import FloatArray, ratio

SHARES = (0.25, 0.5)
"""Shares of a layer's experts that plans commonly cut."""


@dataclass(frozen=True)
class ScoreAgreement:
    """All pairs of S scores over the experts of one layer.

    spearman, kendall (S, S), -1..1; overlap (shares, S, S), 0..1. NaN where a score is the same for all experts.
    """

    spearman: FloatArray
    kendall: FloatArray
    overlap: FloatArray


@dataclass(frozen=True)
class Band:
    """What random rankings give: mean, and the ends that hold ``confidence`` of them."""

    mean: float
    low: float
    high: float


def spearman(*, first: ArrayLike, second: ArrayLike) -> FloatArray:
    """Spearman's rank correlation along the last axis, -1..1; ties share their mean rank, NaN where all are tied.

    first, second (..., experts), broadcast against each other.

    Raises:
        MetricError: different numbers of experts.
    """
    one, other = _checked(first, second)
    return _correlated(_standard_ranks(one), _standard_ranks(other))


def kendall(*, first: ArrayLike, second: ArrayLike) -> FloatArray:
    """Kendall's tau-b along the last axis, -1..1: concordant less discordant pairs, corrected for ties.

    first, second (..., experts), broadcast. NaN where all experts of one side are tied. O(experts squared).

    Raises:
        MetricError: as ``spearman``.
    """
    from ._kendall import kendall_rows

    one, other = np.broadcast_arrays(*_checked(first, second))
    experts = one.shape[-1]
    rows = np.ascontiguousarray(one).reshape(-1, experts), np.ascontiguousarray(other).reshape(-1, experts)
    return np.asarray(kendall_rows(*rows)).reshape(one.shape[:-1])


def overlap(*, first: ArrayLike, second: ArrayLike, share: float) -> FloatArray:
    """Part of the lowest int(share x experts) experts (at least one) both rankings cut, 0..1; by chance ``share``.

    first, second (..., experts), broadcast. Experts that tie at the cut belong to it in part.

    Raises:
        MetricError: as ``spearman``, or a share outside 0..1.
    """
    one, other = _checked(first, second)
    return _overlap(_in_cut(one, share), _in_cut(other, share))


def score_agreement(*, scores: ArrayLike, shares: Sequence[float] = SHARES) -> ScoreAgreement:
    """Agreement of all pairs of scores; scores (S, experts), larger = keep.

    Raises:
        MetricError: no two axes, or a value that is NaN.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or np.isnan(values).any():
        raise MetricError(f"scores have shape {values.shape} or hold NaN; they are (scores, experts) numbers")
    cuts, ranks = [_in_cut(values, share) for share in shares], _standard_ranks(values)
    return ScoreAgreement(
        spearman=_correlated(ranks[:, None], ranks[None]),
        kendall=_kendall_of_all(values),
        overlap=np.stack([_overlap(cut[:, None], cut[None]) for cut in cuts]),
    )


def chance_band(
    *, num_experts: Sequence[int], measure: str, num_draws: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Band:
    """What rankings that have nothing in common give, by permutation: the mean over layers of so many experts each.

    measure: "spearman", "kendall", or a share such as "0.25" for the overlap of cuts.

    Raises:
        MetricError: another measure, or a layer with fewer than two experts.
    """
    if min(num_experts, default=0) < 2:
        raise MetricError(f"num_experts is {list(num_experts)}; every layer takes at least 2")
    generator = np.random.default_rng(seed)
    total = np.zeros(num_draws)
    for experts in num_experts:
        # What is compared is permuted, not the scores behind it: nothing has to be ranked once per draw.
        values, compare = _comparison(np.arange(experts, dtype=np.float64), measure)
        total += compare(values, generator.permuted(np.tile(values, (num_draws, 1)), axis=1))
    means = total / len(num_experts)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Band(float(means.mean()), float(low), float(high))


def cut_correlation(*, overlap: ArrayLike, share: float) -> FloatArray:
    """The correlation of two normal scores whose lowest ``share`` overlap like this (tetrachoric correlation), -1..1.

    It makes overlaps of different shares comparable, and lets Spearman-Brown lengthen them. The chance overlap gives 0.
    """
    angles = np.linspace(-np.pi / 2, np.pi / 2, 721)
    return np.sin(np.interp(np.asarray(overlap, dtype=np.float64), _overlaps(angles, share), angles))


def cut_overlap(*, correlation: ArrayLike, share: float) -> FloatArray:
    """The reverse of ``cut_correlation``: the overlap of the lowest ``share`` of two normal scores."""
    angle = np.arcsin(np.clip(np.asarray(correlation, dtype=np.float64), -1.0, 1.0))
    return _overlaps(np.atleast_1d(angle), share).reshape(np.shape(angle))


def _overlaps(angles: FloatArray, share: float) -> FloatArray:
    """Overlap by arcsine of the correlation: Plackett's integral of the normal density over the correlation."""
    from scipy.special import ndtri

    cut = float(ndtri(share))
    nodes, weights = np.polynomial.legendre.leggauss(32)
    theta = angles[:, None] * (nodes + 1) / 2  # shape: (angles, nodes), from 0 to the angle
    density = np.exp(-(cut**2) / np.maximum(1.0 + np.sin(theta), 1e-12)) / (2 * np.pi)
    both = share**2 + (density * weights).sum(1) * angles / 2
    return cast(FloatArray, np.clip(both / share, 0.0, 1.0))


def _checked(first: ArrayLike, second: ArrayLike) -> tuple[FloatArray, FloatArray]:
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if not one.ndim or not other.ndim or one.shape[-1] != other.shape[-1]:
        raise MetricError(f"rankings have shapes {one.shape} and {other.shape}; their last axes are the same experts")
    return one, other


def _comparison(scores: FloatArray, measure: str) -> tuple[FloatArray, Callable[[FloatArray, FloatArray], FloatArray]]:
    """What a measure compares of scores, and how it compares two of them along the last axis."""
    if measure == "spearman":
        return _standard_ranks(scores), _correlated
    if measure == "kendall":
        return scores, lambda first, second: kendall(first=first, second=second)
    try:
        return _in_cut(scores, float(measure)), _overlap
    except ValueError:
        raise MetricError(f"measure is {measure!r}; it is spearman, kendall or a share such as 0.25") from None


def _kendall_of_all(values: FloatArray) -> FloatArray:
    """(S, S) tau-b of all pairs of S scores: one product of the matrix that says of two experts which is larger."""
    one, other = np.triu_indices(values.shape[1], 1)
    kind = np.float32 if len(one) < 2**24 else np.float64  # whole numbers up to there are exact
    signs = np.empty((len(values), len(one)), kind)
    for row, scores in zip(signs, values, strict=True):
        first, second = scores[one], scores[other]
        np.subtract(first > second, first < second, out=row, dtype=kind)
    products = (signs @ signs.T).astype(np.float64)
    untied = np.sqrt(np.diag(products))
    return ratio(products, np.outer(untied, untied))


def _standard_ranks(values: FloatArray) -> FloatArray:
    """Ranks with mean 0 and length 1, NaN where a value is; 0 where all are tied."""
    ranks = _mean_ranks(values)
    ranks = ranks - ranks.mean(axis=-1, keepdims=True)
    return ratio(ranks, np.sqrt((ranks**2).sum(axis=-1, keepdims=True)), empty=0.0)


def _mean_ranks(values: FloatArray) -> FloatArray:
    """Ranks from 0 along the last axis; ties share their mean, NaN makes all NaN. As scipy's, whose import is slow."""
    order = np.argsort(values, axis=-1)
    ordered = np.take_along_axis(values, order, axis=-1)
    places = np.arange(values.shape[-1])
    begins = np.ones(values.shape, dtype=bool)
    begins[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    ends = np.roll(begins, -1, axis=-1)
    first = np.maximum.accumulate(np.where(begins, places, 0), axis=-1)
    last = np.minimum.accumulate(np.where(ends, places, places[-1])[..., ::-1], axis=-1)[..., ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=-1)
    ranks[np.isnan(values).any(axis=-1)] = np.nan
    return ranks


def _correlated(first: FloatArray, second: FloatArray) -> FloatArray:
    tied = ~(first.any(axis=-1) & second.any(axis=-1))
    return np.asarray(np.where(tied, np.nan, np.clip((first * second).sum(axis=-1), -1.0, 1.0)), dtype=np.float64)


def _in_cut(values: FloatArray, share: float) -> FloatArray:
    """(..., experts) how far each expert belongs to the lowest share: 1, 0, or a part where it ties at the cut."""
    if not 0.0 < share < 1.0:
        raise MetricError(f"share is {share}; it lies between 0 and 1")
    size = max(1, int(share * values.shape[-1]))
    last = np.partition(values, size - 1, axis=-1)[..., size - 1, None]
    below, tied = values < last, values == last
    left = size - below.sum(axis=-1, keepdims=True)
    part: FloatArray = below + tied * ratio(left, tied.sum(axis=-1, keepdims=True), empty=0.0)
    return part


def _overlap(first: FloatArray, second: FloatArray) -> FloatArray:
    return ratio((first * second).sum(axis=-1), first.sum(axis=-1))
