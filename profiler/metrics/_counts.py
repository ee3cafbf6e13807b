"""Selections counted per group of tokens, without an array of the size of the trace beside it.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import IntArray
from ._stack import compiled


@compiled
def group_counts(ids: NDArray[Any], offsets: IntArray, counts: IntArray) -> None:
    """Add to counts (texts, experts) what ids (tokens, k) select, -1 = none; text i begins at token offsets[i]."""
    for text in range(len(offsets) - 1):
        for token in range(offsets[text], offsets[text + 1]):
            for slot in range(ids.shape[1]):
                expert = ids[token, slot]
                if expert >= 0:
                    counts[text, expert] += 1


def counts_of(ids: NDArray[Any], offsets: IntArray, num_experts: int) -> IntArray:
    """Selections per text and expert, (texts, experts)."""
    counts = np.zeros((len(offsets) - 1, num_experts), dtype=np.int64)
    group_counts(ids, offsets, counts)
    return counts


def summed_by(values: NDArray[Any], group: IntArray, groups: int) -> NDArray[Any]:
    """(groups, ...) sums of values (texts, ...) by group, which may be empty."""
    result = np.zeros((groups, *values.shape[1:]), dtype=values.dtype)
    order = np.argsort(group, kind="stable")
    present, first = np.unique(group[order], return_index=True)
    if len(present):
        result[present] = np.add.reduceat(values[order], first, axis=0)
    return result
