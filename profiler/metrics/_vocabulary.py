"""The loop that counts which experts take each token id, compiled.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import IntArray
from ._stack import compiled


@compiled
def largest_counts(
    ids: NDArray[Any], order: IntArray, bounds: IntArray, num_experts: int, largest: IntArray, expert: IntArray
) -> None:
    """Write the largest count of any expert among the tokens of each token id, and that expert, the smallest of equals.

    ids (tokens, k), -1 = none; order: tokens by token id, those of id i from bounds[i] to bounds[i + 1].
    """
    counts = np.zeros(num_experts, np.int64)
    for token_id in range(len(bounds) - 1):
        part = order[bounds[token_id] : bounds[token_id + 1]]
        for token in part:
            for slot in range(ids.shape[1]):
                if ids[token, slot] >= 0:
                    counts[ids[token, slot]] += 1
        most, who = 0, -1
        for token in part:
            for slot in range(ids.shape[1]):
                one = ids[token, slot]
                if one < 0:
                    continue
                count = counts[one]
                if count > most or (count == most and count > 0 and one < who):
                    most, who = count, one
                counts[one] = 0
        largest[token_id], expert[token_id] = most, who
