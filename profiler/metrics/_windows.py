"""The loop that counts windows, compiled.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import IntArray
from ._stack import compiled


@compiled
def count_windows(
    ids: NDArray[Any],
    offsets: IntArray,
    length: int,
    first_expert: int,
    row: IntArray,
    group: IntArray,
    by_expert: IntArray,
    by_group: IntArray,
) -> None:
    """Add the windows of ``length`` tokens to by_expert[row of the sequence, expert, f] and by_group[its group, f]."""
    experts = by_expert.shape[1]
    count = np.zeros(experts, np.int64)
    since = np.zeros(experts, np.int64)
    for sequence in range(len(offsets) - 1):
        start, stop = offsets[sequence], offsets[sequence + 1]
        windows = stop - start - length + 1
        if windows < 1:
            continue
        mine, pooled = by_expert[row[sequence]], by_group[group[sequence]]
        count[:] = 0
        since[:] = 0
        for token in range(start, start + length):
            for expert in ids[token]:
                place = expert - first_expert
                if expert >= 0 and 0 <= place < experts:
                    count[place] += 1
        for window in range(1, windows):
            for step in range(2):
                token = start + window - 1 + step * length  # first the token that leaves, then the one that enters
                for expert in ids[token]:
                    place = expert - first_expert
                    if expert < 0 or place < 0 or place >= experts:
                        continue
                    stood = window - since[place]
                    if stood:
                        mine[place, count[place]] += stood
                        pooled[count[place]] += stood
                        since[place] = window
                    count[place] += 2 * step - 1
        for place in range(experts):
            stood = windows - since[place]
            mine[place, count[place]] += stood
            pooled[count[place]] += stood
