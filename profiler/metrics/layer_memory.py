"""What earlier layers say about a layer's choice: entropy left over, and what a second layer back adds.

RMoE (arXiv 2408.06793) gives the router a memory over layers. The statistic that says whether there is anything to
remember is the entropy of a layer's experts, less what the layers before say about it; a prefetch table can use as
much.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import FloatArray, IntArray, x_log_x
from .metric import Metric

MOST_CELLS = 1 << 21
"""Combinations of experts, times parts, up to which each has a counter; beyond, those that occur are sorted out."""


def choice_entropy(*, counts: ArrayLike) -> FloatArray:
    """Entropy of one of a token's experts, drawn by lot, bits: counts (..., experts) of choices. NaN without any."""
    values = np.asarray(counts, dtype=np.float64)
    total = values.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, np.log2(total) - x_log_x(values).sum(axis=-1) / total, np.nan)


def conditional_entropy(*, counts: ArrayLike) -> FloatArray:
    """H(later | earlier), bits, of one expert each, drawn by lot: counts (..., E, E') of ``transition_counts``.

    The plain estimate: with few tokens it is too small, by as much as mutual information is too large.
    """
    table = np.asarray(counts, dtype=np.float64)
    total = table.sum(axis=(-2, -1))
    spent = x_log_x(table.sum(axis=-1)).sum(axis=-1) - x_log_x(table).sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, spent / total, np.nan)


def memory_information(
    *, two_back: IntArray, one_back: IntArray, chosen: IntArray, part: IntArray, num_parts: int
) -> tuple[float, FloatArray]:
    """What the first choice two layers back says about a layer's, beyond the one of the layer before: bits, from 0.

    I(chosen; two_back | one_back), the plain estimate, and (parts,) the same without each part of the text: for
    intervals. What it gives of :func:`exchanged` choices is its error, measured.

    two_back, one_back, chosen (tokens,): first choices, -1 = none (left out); part (tokens,).
    """
    kept = (two_back >= 0) & (one_back >= 0) & (chosen >= 0)
    first, second, third = (column[kept].astype(np.int64) for column in (two_back, one_back, chosen))
    mine = part[kept]
    total, without = 0.0, np.zeros(num_parts)
    sizes = len(mine) - np.bincount(mine, minlength=num_parts)
    for sign, columns in ((1, (first, second, third)), (1, (second,)), (-1, (first, second)), (-1, (second, third))):
        whole, left = _sums(columns, mine, num_parts)
        total += sign * whole
        without += sign * left
    if not len(mine):
        return float("nan"), np.full(num_parts, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return max(total / len(mine), 0.0), np.where(sizes > 0, np.maximum(without / sizes, 0.0), np.nan)


def exchanged(*, two_back: IntArray, one_back: IntArray, seed: int) -> IntArray:
    """``two_back`` (tokens,) dealt anew among tokens with the same ``one_back``: what it says beyond that is gone."""
    lot = np.random.default_rng(seed).random(len(two_back))
    dealt = np.empty_like(two_back)
    dealt[np.lexsort((lot, one_back))] = two_back[np.argsort(one_back, kind="stable")]
    return dealt


def _sums(columns: tuple[IntArray, ...], part: IntArray, num_parts: int) -> tuple[float, FloatArray]:
    """Sum of n log2 n over the combinations that occur, and (parts,) the same without each part."""
    key = np.zeros(len(part), np.int64)
    for column in columns:
        key = key * (int(column.max(initial=0)) + 1) + column
    combinations = int(key.max(initial=-1)) + 1
    place = key
    if combinations * num_parts > MOST_CELLS:  # far more than occur
        _, place = np.unique(key, return_inverse=True)
        combinations = int(place.max(initial=-1)) + 1
    split = np.bincount(place * num_parts + part, minlength=combinations * num_parts).reshape(-1, num_parts)
    counts = split.sum(axis=1)
    return float(x_log_x(counts).sum()), x_log_x(counts[:, None] - split).sum(axis=0)


METRICS = (
    Metric(
        "conditional_entropy",
        "Conditional entropy of a choice",
        "bits",
        "0..log2 E",
        "less of the choice follows from the earlier layer",
        "arXiv 2408.06793",
        section="""
        How open the choice of an expert still is when one of the same token's experts in an earlier layer is known: one
        layer before, or two. Beside it, at distance 0, the entropy when nothing is known. Control `shuffled` takes the
        later expert of another token: what the estimate then loses is its error on so few tokens, not knowledge. The
        paper trains a router with a memory; this says what there would be to remember.
        - Formula: H(e_l | e_(l-d)) = -sum over pairs of n/N log2 (n / n of the earlier), one of the k experts each
        """,
    ),
    Metric(
        "layer_memory",
        "Memory of two layers",
        "bits",
        "0..log2 E",
        "a second layer back says more",
        "arXiv 2408.06793",
        section="""
        What the first choice of a token two layers back says about its first choice in a layer beyond that of the layer
        before: what a router that remembers more than one layer, or a table of two layers, would gain. Control
        `exchanged` swaps the earlier first choice among tokens that agree in the layer before; only what lies above it
        is knowledge.
        - Formula: I(e_l; e_(l-2) | e_(l-1)) of first choices
        """,
    ),
)
