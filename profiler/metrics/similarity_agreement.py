"""Whether two kinds of similarity find the same experts alike, and the order in which a matrix of experts is drawn.

Pairs of experts are not independent of each other, so chance is what remains when the experts of one matrix change
their names (Mantel 1967), not what a table of correlations says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MetricError

from ._arrays import FloatArray, IntArray, ratio

LEAST_PAIRS = 3
"""Fewer pairs of experts have no correlation worth the name."""

MOST_ORDERED = 512
"""Experts up to which leaves are put in their best order: its time grows with their cube (0.2 s for 512)."""


@dataclass(frozen=True)
class KindAgreement:
    """How far two kinds agree on the pairs of experts of one layer.

    pairs: on which both say something. spearman, kendall: rank correlations, -1..1; r_squared: of a straight line,
    0..1. low, middle, high: what renamed experts give for spearman, the ends of 95 % and the median; p_value: the part
    that gives at least as much, the real names counted among them. NaN with fewer than 3 pairs, or where one kind says
    the same of all.
    """

    first: str
    second: str
    pairs: int
    spearman: float
    kendall: float
    r_squared: float
    low: float
    middle: float
    high: float
    p_value: float


def agreement(
    *, similarities: Mapping[str, NDArray[Any]], permutations: int = 499, seed: int = 0
) -> list[KindAgreement]:
    """Agreement of every two kinds over the lower triangles of their matrices, with a Mantel test.

    similarities: (experts, experts) symmetric matrices by name, NaN = says nothing. R^2 between router-row and weight
    similarity over the lower triangle is what Look-into-MoEs prints. Where pairs are missing, the permutations
    correlate ranks over what is left after renaming.

    Raises:
        MetricError: matrices of different sizes.
    """
    matrices = {name: np.asarray(matrix, dtype=np.float64) for name, matrix in similarities.items()}
    shapes = {matrix.shape for matrix in matrices.values()}
    if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != shape[1] for shape in shapes):
        raise MetricError(f"matrices have shapes {sorted(shapes)}: all must be experts by experts")
    if not matrices:
        return []
    from scipy.stats import kendalltau, linregress, spearmanr  # slow to import

    names = list(matrices)
    lower = np.tril_indices(len(matrices[names[0]]), -1)
    values = np.stack([matrices[name][lower] for name in names])
    real, renamed = _renamed(values, lower, len(matrices[names[0]]), permutations, seed)
    result = []
    for i, j in combinations(range(len(names)), 2):
        both = np.isfinite(values[i]) & np.isfinite(values[j])
        one, other = values[i, both], values[j, both]
        if len(one) < LEAST_PAIRS or np.ptp(one) == 0 or np.ptp(other) == 0:
            result.append(KindAgreement(names[i], names[j], len(one), *[float("nan")] * 7))
            continue
        chance = renamed[:, i, j][np.isfinite(renamed[:, i, j])]
        low, middle, high = np.quantile(chance, (0.025, 0.5, 0.975)) if len(chance) else (np.nan,) * 3
        larger = int((chance >= real[i, j] - 1e-12).sum())
        result.append(
            KindAgreement(
                first=names[i],
                second=names[j],
                pairs=len(one),
                spearman=float(spearmanr(one, other).statistic),
                kendall=float(kendalltau(one, other).statistic),
                r_squared=float(linregress(one, other).rvalue ** 2),
                low=float(low),
                middle=float(middle),
                high=float(high),
                p_value=(1 + larger) / (1 + len(chance)),
            )
        )
    return result


def clustered_order(*, similarity: NDArray[Any]) -> IntArray:
    """(experts,) the experts so that alike ones stand beside each other.

    Average linkage over 1 - similarity, leaves in optimal order (Bar-Joseph et al. 2001). Pairs without a value count
    as less alike than any other; without any value the experts keep their order.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering  # slow to import
    from scipy.spatial.distance import squareform

    values = np.asarray(similarity, dtype=np.float64)
    lower = np.tril_indices(len(values), -1)
    known = values[lower][np.isfinite(values[lower])]
    if len(values) < 3 or not len(known):
        return np.arange(len(values))
    unlike = known.min() - (np.ptp(known) or 1.0)
    distance = known.max() - np.where(np.isfinite(values), values, unlike)
    distance = np.maximum((distance + distance.T) / 2, 0.0)
    np.fill_diagonal(distance, 0.0)
    condensed = squareform(distance, checks=False)
    tree = linkage(condensed, method="average")
    if len(values) <= MOST_ORDERED:
        tree = optimal_leaf_ordering(tree, condensed)
    order: IntArray = leaves_list(tree).astype(np.int64)
    return order


def nearest(*, similarity: NDArray[Any], count: int = 1) -> IntArray:
    """(experts, count) each expert's most similar others, the most similar first; -1 where there are no more.

    Of equal ones the lower number comes first.
    """
    values = np.array(similarity, dtype=np.float64)
    np.fill_diagonal(values, np.nan)
    count = min(count, max(len(values) - 1, 0))
    order = np.argsort(np.where(np.isfinite(values), -values, np.inf), axis=1, kind="stable")[:, :count]
    found = np.isfinite(np.take_along_axis(values, order, axis=1))
    result: IntArray = np.where(found, order, -1)
    return result


def _renamed(
    values: FloatArray, lower: tuple[IntArray, IntArray], experts: int, permutations: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """(kinds, kinds) correlation of ranks, and (permutations, kinds, kinds) the same with the second kind renamed."""
    from scipy.stats import rankdata

    kinds = len(values)
    ranks, known = np.zeros_like(values), np.isfinite(values)
    for kind in range(kinds):
        ranked = rankdata(values[kind, known[kind]])
        ranks[kind, known[kind]] = ranked - ranked.mean() if len(ranked) else ranked
    own = np.stack([ranks, ranks**2, known])  # shape: (3, kinds, pairs)
    # As full matrices, a row per two experts, so that a renaming is a choice of rows that lie together in memory.
    square = np.zeros((experts, experts, 3, kinds))
    square[lower] = square[lower[::-1]] = np.moveaxis(own, 2, 0)
    flat = square.reshape(experts**2, 3 * kinds)
    generator = np.random.default_rng(seed)
    renamed = np.empty((permutations, kinds, kinds))
    for draw in range(permutations):
        order = generator.permutation(experts)
        other = flat[order[lower[0]] * experts + order[lower[1]]].reshape(-1, 3, kinds)
        renamed[draw] = _correlated(own, other)
    return _correlated(own, np.moveaxis(own, 2, 0)), renamed


def _correlated(first: FloatArray, second: FloatArray) -> FloatArray:
    """(kinds, kinds) correlation of centred ranks over the pairs that both know; NaN where one says the same of all.

    first (3, kinds, pairs), second (pairs, 3, kinds): ranks, their squares, and whether they are known.
    """
    scale = np.sqrt((first[1] @ second[:, 2]) * (first[2] @ second[:, 1]))
    return ratio(first[0] @ second[:, 0], scale)
