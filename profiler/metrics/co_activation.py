"""Co-activation: which experts of a layer one token uses together, and how far that is more than popularity.

Source of the conditional form: OLMoE (arXiv 2409.02060), section 5 and ``scripts/run_moe_analysis.py``, whose code
counts only experts of neighbouring ranks (7 of the 28 pairs of 8 experts); here all pairs count.

A token uses k different experts, so even a random router does not use them independently: N_ij N / (N_i N_j) is about
(k - 1) E / (k (E - 1)) there, not 1. What popularity alone gives is therefore fitted: pairs a_i a_j, i != j, with as
many pairs of each expert as were seen (quasi-independence, Goodman 1968; exact for k = 2, where it is what remains of
independent choices that happen to differ).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import MetricError

from ._arrays import FloatArray, Ids, IntArray, ratio

ITERATIONS = 2000
"""Steps after which the fit of quasi-independence is taken as it is: one expert in every token has none."""


def pair_counts(
    *, ids: Ids, offsets: IntArray, num_experts: int, part: IntArray | None = None, num_parts: int = 1
) -> IntArray:
    """Tokens that use both experts, (parts, experts, experts); on the diagonal the tokens that use the expert.

    ids (tokens, k), -1 = none, sequence after sequence; offsets (sequences + 1,): where each begins; part (sequences,):
    which part of the text it belongs to, None = one part. Counts of parts, and of texts, add up.
    """
    from ._pairs import count_own_pairs

    counts = np.zeros((num_parts, num_experts, num_experts), np.int64)
    mine = np.zeros(len(offsets) - 1, np.int64) if part is None else part
    count_own_pairs(np.ascontiguousarray(ids), offsets, mine, counts)
    used = np.einsum("pee->pe", counts).copy()
    counts += counts.transpose(0, 2, 1)
    np.einsum("pee->pe", counts)[...] = used
    return counts


def conditional(*, pairs: ArrayLike) -> FloatArray:
    """Share of an expert's tokens that use the other one too, N_ij / N_i: (experts, experts), rows of the first expert.

    0..1, not symmetric; the diagonal, and rows of unused experts, are NaN. pairs (experts, experts): ``pair_counts``.
    """
    counts = _checked(pairs)
    return _off_diagonal(ratio(counts, np.diag(counts)[:, None]))


def lift(*, pairs: ArrayLike, tokens: float) -> FloatArray:
    """N_ij N / (N_i N_j), 0..inf: how many times as often as if experts were used independently. tokens: N."""
    counts = _checked(pairs)
    used = np.diag(counts)
    return _off_diagonal(ratio(counts * tokens, np.outer(used, used)))


def jaccard(*, pairs: ArrayLike) -> FloatArray:
    """N_ij / (N_i + N_j - N_ij), 0..1: tokens that use both, of those that use either."""
    counts = _checked(pairs)
    used = np.diag(counts)
    return _off_diagonal(ratio(counts, used[:, None] + used - counts))


def pointwise_information(*, pairs: ArrayLike, tokens: float) -> FloatArray:
    """log2 of the lift, bits, -inf..inf: -inf for a pair that never meets; NaN where an expert is unused."""
    with np.errstate(divide="ignore"):
        information: FloatArray = np.log2(lift(pairs=pairs, tokens=tokens))
    return information


def expected(*, pairs: ArrayLike) -> FloatArray:
    """Tokens that would use both if popularity alone decided: quasi-independence, (experts, experts), diagonal NaN.

    Every expert has as many pairs as it was seen with; within them, partners differ by popularity alone.
    """
    counts = _checked(pairs)
    margin = counts.sum(axis=1) - np.diag(counts)
    if not margin.any():
        return _off_diagonal(np.zeros_like(counts))
    factor = margin / np.sqrt(margin.sum())
    for _ in range(ITERATIONS):
        better = np.sqrt(factor * ratio(margin, factor.sum() - factor, empty=0.0))
        done = np.abs(better - factor).max() <= 1e-12 * better.max()
        factor = better
        if done:
            break
    return _off_diagonal(np.outer(factor, factor))


def attraction(*, pairs: ArrayLike) -> FloatArray:
    """Tokens that use both over what popularity alone gives (:func:`expected`), 0..inf; 1 is chance at any k."""
    counts = _checked(pairs)
    return _off_diagonal(ratio(counts, np.nan_to_num(expected(pairs=counts))))


def pair_excess(*, pairs: ArrayLike) -> float:
    """Share of the pairs that would have to be others for popularity alone to explain them, 0..1.

    Total variation between the pairs that were seen and :func:`expected`. Few tokens lift it: :func:`chance_excess`
    says how far. NaN without pairs (k = 1).
    """
    counts = _checked(pairs)
    distance = np.nansum(np.abs(counts - expected(pairs=counts))) / 2
    return float(ratio(distance, counts.sum() - np.trace(counts)))


def chance_excess(*, pairs: ArrayLike, num_draws: int = 40, seed: int = 0) -> FloatArray:
    """``pair_excess`` of so many pairs drawn by popularity alone, (draws,): what only noise gives."""
    counts = _checked(pairs)
    fitted = np.nan_to_num(expected(pairs=counts))
    upper = np.triu_indices(len(counts), 1)
    total = int(counts[upper].sum())
    if not total:
        return np.full(num_draws, np.nan)
    generator = np.random.default_rng(seed)
    shares = fitted[upper] / fitted[upper].sum()
    found = []
    for drawn in generator.multinomial(total, shares, size=num_draws):
        table = np.zeros_like(counts)
        table[upper] = drawn
        found.append(pair_excess(pairs=table + table.T))
    return np.array(found)


def conditional_chance(*, num_experts: int, top_k: int) -> float:
    """What :func:`conditional` is for a router that draws k experts by lot: (k - 1) / (E - 1)."""
    return (top_k - 1) / (num_experts - 1) if num_experts > 1 else float("nan")


def lift_chance(*, num_experts: int, top_k: int) -> float:
    """What :func:`lift` is for a router that draws k experts by lot: (k - 1) E / (k (E - 1))."""
    return conditional_chance(num_experts=num_experts, top_k=top_k) * num_experts / top_k


MEASURES: dict[str, Callable[[NDArray[Any], float], FloatArray]] = {
    "attraction": lambda pairs, tokens: attraction(pairs=pairs),
    "co_activation": lambda pairs, tokens: conditional(pairs=pairs),
    "lift": lambda pairs, tokens: lift(pairs=pairs, tokens=tokens),
    "jaccard": lambda pairs, tokens: jaccard(pairs=pairs),
    "pointwise_information": lambda pairs, tokens: pointwise_information(pairs=pairs, tokens=tokens),
}
"""Every matrix by its name in the registry: f(pairs, tokens)."""


def _checked(pairs: ArrayLike) -> FloatArray:
    counts = np.asarray(pairs, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not len(counts):
        raise MetricError(f"pairs have shape {counts.shape}; they are counts of experts by experts of one layer")
    return counts


def _off_diagonal(matrix: FloatArray) -> FloatArray:
    matrix = np.array(matrix)
    np.fill_diagonal(matrix, np.nan)
    return matrix
