"""Bootstrap over sequences: the sequence is the unit that was sampled, tokens inside one are not independent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from moescope.errors import MetricError

from ._arrays import FloatArray, IntArray

Rule = Literal["basic", "percentile"]


def check_bootstrap(*, num_resamples: int, confidence: float, rule: str) -> None:
    """Refuse settings that no interval can be computed with."""
    if num_resamples < 2:
        raise MetricError(f"num_resamples is {num_resamples}; an interval takes at least 2, usually 1000")
    if not 0.0 < confidence < 1.0:
        raise MetricError(f"confidence is {confidence}; it lies between 0 and 1, usually 0.95")
    if rule not in get_args(Rule):
        raise MetricError(f"rule is {rule!r}; choose one of {', '.join(get_args(Rule))}")


def resample_weights(*, num_sequences: int, num_resamples: int, seed: int) -> FloatArray:
    """How often each sequence was drawn, per resample: (resamples, sequences); every row sums to ``num_sequences``.

    float64, so that a resampled sum is one BLAS product: weights @ per-sequence sums.
    """
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(num_sequences, np.full(num_sequences, 1.0 / num_sequences), size=num_resamples)
    return weights.astype(np.float64)


def interval(
    *, estimate: FloatArray, resampled: FloatArray, confidence: float, rule: Rule
) -> tuple[FloatArray, FloatArray]:
    """Lower and upper end, each of the shape of ``estimate``; resampled (resamples, ...).

    "basic" (the published code's): 2 x estimate - upper quantile, 2 x estimate - lower quantile, the quantiles being
    the sorted resamples number round(B(1 + confidence)/2) and round(B(1 - confidence)/2), counted from 0. It may
    leave the metric's range. "percentile": the two quantiles themselves, linearly interpolated.
    """
    tail = (1.0 - confidence) / 2.0
    if rule == "percentile":
        low, high = np.quantile(resampled, [tail, 1.0 - tail], axis=0)
        return low, high
    ordered = np.sort(resampled, axis=0)
    last = len(ordered) - 1
    low = ordered[min(round(len(ordered) * tail), last)]
    high = ordered[min(round(len(ordered) * (1.0 - tail)), last)]
    return 2.0 * estimate - high, 2.0 * estimate - low


def jackknife(*, estimate: FloatArray, without: FloatArray, confidence: float) -> tuple[FloatArray, FloatArray]:
    """Lower and upper end from what is left without each part of the text in turn (delete-a-group jackknife).

    For figures that drawing texts anew would bias, such as the largest of many shares. estimate (...); without
    (parts, ...). Student's t with parts - 1 degrees of freedom. NaN below two parts.
    """
    from scipy.stats import t

    parts = len(without)
    if parts < 2:
        return np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)
    error = np.sqrt((parts - 1) / parts * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    reach = float(t.ppf((1.0 + confidence) / 2.0, parts - 1)) * error
    return estimate - reach, estimate + reach


MAX_GROUPS = 512
"""Sequences beyond so many are drawn in random groups: the same spread of sums, and memory that does not grow."""


@dataclass(frozen=True)
class Resamples:
    """Texts drawn anew from sequences, or from random groups of them where there are thousands.

    group (sequences,): group of each sequence, 0..groups - 1. weights (resamples, groups): how often each was drawn.
    """

    group: IntArray
    weights: FloatArray

    @property
    def groups(self) -> int:
        """How many groups are drawn from."""
        return len(self.weights.T)

    @classmethod
    def of(cls, num_sequences: int, *, num_resamples: int, seed: int, max_groups: int = MAX_GROUPS) -> Resamples:
        """Resamples of so many sequences, above ``max_groups`` in random groups of (almost) equal size."""
        groups = min(num_sequences, max_groups)
        group = np.arange(num_sequences, dtype=np.int64)
        if num_sequences > max_groups:
            group = np.random.default_rng(seed).permutation(group) % groups
        return cls(group, resample_weights(num_sequences=groups, num_resamples=num_resamples, seed=seed))

    def sums(self, values: FloatArray | IntArray) -> FloatArray:
        """Sums over every resample, (resamples, ...), of sums per group, (groups, ...): one product."""
        flat = np.asarray(values, dtype=np.float64).reshape(self.groups, -1)
        product: FloatArray = self.weights @ flat
        return product.reshape(len(product), *values.shape[1:])
