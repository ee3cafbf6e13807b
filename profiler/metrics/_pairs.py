"""Loops over the pairs of experts that one token uses, in one layer or in two, compiled.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import FloatArray, IntArray
from ._stack import compiled


@compiled
def count_pairs(first: NDArray[Any], second: NDArray[Any], offsets: IntArray, part: IntArray, counts: IntArray) -> None:
    """Add to counts (parts, experts, other experts) the tokens that use an expert in ``first`` and one in ``second``.

    first, second (tokens, k): selections of two layers for the same tokens, -1 = none. offsets (sequences + 1,); part
    (sequences,).
    """
    for sequence in range(len(offsets) - 1):
        table = counts[part[sequence]]
        for token in range(offsets[sequence], offsets[sequence + 1]):
            for one in first[token]:
                if one >= 0:
                    row = table[one]
                    for other in second[token]:
                        if other >= 0:
                            row[other] += 1


@compiled
def count_own_pairs(ids: NDArray[Any], offsets: IntArray, part: IntArray, counts: IntArray) -> None:
    """Add to counts (parts, experts, experts) the pairs of one layer, each once and whichever way round; a token's
    expert with itself on the diagonal. ids (tokens, k), -1 = none; offsets (sequences + 1,); part (sequences,).
    """
    for sequence in range(len(offsets) - 1):
        table = counts[part[sequence]]
        for token in range(offsets[sequence], offsets[sequence + 1]):
            for place in range(ids.shape[1]):
                one = ids[token, place]
                if one >= 0:
                    row = table[one]
                    for later in range(place, ids.shape[1]):
                        other = ids[token, later]
                        if other >= 0:
                            row[other] += 1


@compiled
def count_foreseen(
    first: NDArray[Any],
    second: NDArray[Any],
    offsets: IntArray,
    fold: IntArray,
    tables: FloatArray,
    top_k: int,
    group: IntArray,
    sums: FloatArray,
) -> None:
    """Rank the experts of the next layer by the sum of the rows of a table that a token's experts name, and see where
    the chosen ones stand.

    tables (folds, experts, next experts): what each fold is predicted with. fold, group (sequences,). sums (groups,
    2 + extra): entry 0 gets the choices, entry 1 + a those whose first place among the top_k + a best is reached with a
    (not with a - 1). Ties go to the smaller id.
    """
    extra = sums.shape[1] - 2
    experts = tables.shape[2]
    scores = np.empty(experts)
    for sequence in range(len(offsets) - 1):
        table, mine = tables[fold[sequence]], sums[group[sequence]]
        for token in range(offsets[sequence], offsets[sequence + 1]):
            scores[:] = 0.0
            for one in first[token]:
                if one >= 0:
                    row = table[one]
                    for other in range(experts):
                        scores[other] += row[other]
            for chosen in second[token]:
                if chosen < 0:
                    continue
                least, place = scores[chosen], 0
                for other in range(chosen):
                    place += scores[other] >= least
                for other in range(chosen + 1, experts):
                    place += scores[other] > least
                mine[0] += 1
                needed = max(place + 1 - top_k, 0)
                if needed <= extra:
                    mine[1 + needed] += 1
