"""Transitions: which experts of a later layer follow those of an earlier one for the same token, and how well they can
be foreseen.

The counts are those of MoETuner (arXiv 2502.06643) and, for first choices, of ExFlow (arXiv 2401.08383), which place
experts by them. Predicting by the sum of conditional frequencies is what a prefetcher can do without running a router.
All k x k pairs of a token count; OLMoE's code zips experts of the same rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import MetricError

from ._arrays import FloatArray, Ids, IntArray, ratio, x_log_x

EXTRA = 8
"""Experts fetched beyond k up to which recall is counted, as table ``lookahead`` does."""


def transition_counts(
    *,
    first: Ids,
    second: Ids,
    offsets: IntArray,
    num_experts: Sequence[int],
    part: IntArray | None = None,
    num_parts: int = 1,
) -> IntArray:
    """Tokens that use expert i of one layer and j of another: (parts, experts, other layer's experts).

    first, second (tokens, k): selections of the two layers for the same tokens, -1 = none, sequence after sequence;
    offsets (sequences + 1,); num_experts: of both layers; part (sequences,): part of the text, None = one part.

    Raises:
        MetricError: the layers have different tokens.
    """
    from ._pairs import count_pairs

    if len(first) != len(second) or offsets[-1] != len(first):
        raise MetricError(f"layers of {len(first)} and {len(second)} tokens; both hold the {offsets[-1]} of the text")
    counts = np.zeros((num_parts, *num_experts), np.int64)
    mine = np.zeros(len(offsets) - 1, np.int64) if part is None else part
    count_pairs(np.ascontiguousarray(first), np.ascontiguousarray(second), offsets, mine, counts)
    return counts


def transition_shares(*, counts: ArrayLike) -> FloatArray:
    """Of the later layer's choices by tokens that use expert i, the share that falls on j: rows sum to 1, NaN unused.

    counts (experts, other experts): ``transition_counts``.
    """
    table = np.asarray(counts, dtype=np.float64)
    return ratio(table, table.sum(axis=1, keepdims=True))


def transition_lift(*, counts: ArrayLike) -> FloatArray:
    """Pairs over what independent layers of the same popularity would give, 0..inf; 1 is chance."""
    table = np.asarray(counts, dtype=np.float64)
    return ratio(table * table.sum(), np.outer(table.sum(axis=1), table.sum(axis=0)))


def transition_information(*, counts: ArrayLike) -> FloatArray:
    """Mutual information of a token's experts in two layers, bits, 0..log2 of the smaller E: counts (..., E, E').

    Of one of the k experts of each layer, drawn by lot. The plain estimate: with few tokens it is too large, by about
    (E - 1)(E' - 1) / (2 N ln 2) bits for k = 1. What it gives for shuffled tokens is that error, measured.
    """
    table = np.asarray(counts, dtype=np.float64)
    total = table.sum(axis=(-2, -1))
    joint, first, second = x_log_x(table), x_log_x(table.sum(axis=-1)), x_log_x(table.sum(axis=-2))
    sums = joint.sum(axis=(-2, -1)) - first.sum(axis=-1) - second.sum(axis=-1)
    return np.where(total > 0, np.maximum(ratio(sums + x_log_x(total), total), 0.0), np.nan)


def prediction_table(*, counts: ArrayLike) -> FloatArray:
    """P(j | i) for predicting, (..., E, E'): conditional frequencies with one choice spread by popularity added.

    So an expert that was never seen predicts what is popular. Rows sum to 1.
    """
    table = np.asarray(counts, dtype=np.float64)
    popular = table.sum(axis=-2, keepdims=True)
    popular = ratio(popular, popular.sum(axis=-1, keepdims=True), empty=1.0 / table.shape[-1])
    smoothed: FloatArray = (table + popular) / (table.sum(axis=-1, keepdims=True) + 1.0)
    return smoothed


def foreseen_sums(
    *,
    first: Ids,
    second: Ids,
    offsets: IntArray,
    tables: FloatArray,
    fold: IntArray,
    top_k: int,
    group: IntArray,
    num_groups: int,
    extra: int = EXTRA,
) -> FloatArray:
    """How many of a layer's choices the best-ranked experts hold when an earlier layer's experts rank them.

    Expert j scores the sum of P(j | i) over the experts i that the token uses; ties go to the smaller id.
    Returns (groups, 2 + extra): choices, then those among the top_k, top_k + 1, ... top_k + extra best. They add up.

    tables (folds, E, E'): ``prediction_table`` that sequences of each fold are predicted with, from the text of other
    folds; fold, group (sequences,); the rest as :func:`transition_counts`.
    """
    from ._pairs import count_foreseen

    sums = np.zeros((num_groups, 2 + extra))
    count_foreseen(
        np.ascontiguousarray(first), np.ascontiguousarray(second), offsets, fold, np.ascontiguousarray(tables), top_k,
        group, sums,
    )  # fmt: skip
    sums[:, 1:] = np.cumsum(sums[:, 1:], axis=1)
    return sums


def popular_sums(
    *, counts: ArrayLike, popularity: ArrayLike, fold: IntArray, top_k: int, extra: int = EXTRA
) -> FloatArray:
    """As :func:`foreseen_sums`, ranking by popularity alone: what a prefetcher gets that always fetches the same.

    counts (groups, experts): choices per group; popularity (folds, experts): what the groups of a fold are predicted
    with; fold (groups,). Ties go to the smaller id.
    """
    order = np.argsort(-np.asarray(popularity, dtype=np.float64), axis=1, kind="stable")[fold]
    ranked = np.cumsum(np.take_along_axis(np.asarray(counts, dtype=np.float64), order, axis=1), axis=1)
    widths = np.minimum(top_k + np.arange(extra + 1), ranked.shape[1]) - 1
    return np.concatenate([ranked[:, -1:], ranked[:, widths]], axis=1)


def recall(*, sums: ArrayLike) -> FloatArray:
    """Share of the choices that were foreseen, (..., 1 + extra), 0..1, from sums (..., 2 + extra); NaN of nothing."""
    counted = np.asarray(sums, dtype=np.float64)
    return ratio(counted[..., 1:], counted[..., :1])


def chance_recall(*, num_experts: int, top_k: int, extra: int = EXTRA) -> FloatArray:
    """What fetching random experts gives, (1 + extra,): (k + a) / E, at most 1."""
    return np.minimum((top_k + np.arange(extra + 1)) / num_experts, 1.0)
