"""Kernel that chooses anew among a token's stored logits plus a vector.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profiler.metrics._arrays import FloatArray, IntArray
from profiler.metrics._stack import compiled


@compiled
def reroute(
    ids: NDArray[np.int16], logits: FloatArray, mass: FloatArray, own: IntArray, agreeing: IntArray, shift: FloatArray,
    order: IntArray, load: IntArray, sums: IntArray,
) -> float:  # fmt: skip
    """Add tokens to load (E,) and to sums (same sets, own selections kept, new ones, unproven tokens, same
    sets of tokens that agree); return the mass.

    ids, logits, mass (tokens, m) in descending logit, -1 = none; own (tokens,) experts to take; agreeing (tokens,)
    0 or 1; shift (E,); order (E,)
    experts in descending shift. Of equal sums the one with the larger logit is taken.
    """
    m = ids.shape[1]
    total = 0.0
    taken = np.empty(m, np.int64)
    worth = np.empty(m, np.float64)
    stored_at = np.full(len(shift), -1, np.int64)
    for token in range(len(ids)):
        wanted = min(own[token], m)
        if wanted == 0:
            continue
        size = 0
        listed = 0
        for place in range(m):
            item = ids[token, place]
            if item < 0:
                break
            listed += 1
            value = logits[token, place] + shift[item]
            if size == wanted and value <= worth[size - 1]:
                continue
            at = size if size < wanted else size - 1
            while at > 0 and worth[at - 1] < value:
                worth[at] = worth[at - 1]
                taken[at] = taken[at - 1]
                at -= 1
            worth[at] = value
            taken[at] = place
            if size < wanted:
                size += 1
        kept = 0
        for rank in range(size):
            place = taken[rank]
            if place < wanted:
                kept += 1
            load[ids[token, place]] += 1
            total += mass[token, place]
        if kept == size:
            sums[0] += 1
            sums[4] += agreeing[token]
        sums[1] += kept
        sums[2] += size - kept
        if listed < len(shift):
            for place in range(listed):
                stored_at[ids[token, place]] = token
            for item in order:
                if stored_at[item] != token:
                    if logits[token, listed - 1] + shift[item] >= worth[size - 1]:
                        sums[3] += 1
                    break
    return total
