"""Kernels for rules under which each entry of a token's list is active up to a critical value of its own.

All values are tried in one walk: an entry that is active below place a of the ascending values adds 1 at [.., a], and
the sums from the right say how many are active at each value.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profiler.metrics._arrays import FloatArray, IntArray
from profiler.metrics._stack import compiled


@compiled
def _place(values: FloatArray, critical: float) -> int:
    """How many of the ascending values are at most ``critical``."""
    low = 0
    high = len(values)
    while low < high:
        middle = (low + high) // 2
        if values[middle] <= critical:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def prefix(
    ids: NDArray[np.int16], critical: FloatArray, mass: FloatArray, own: IntArray, agreeing: IntArray,
    beyond: FloatArray, values: FloatArray, counts: IntArray, load: IntArray, kept: FloatArray, same: IntArray,
    same_agreeing: IntArray, kept_own: IntArray, added: IntArray, unknown: IntArray,
) -> None:  # fmt: skip
    """Add tokens to the sums of all values.

    ids (tokens, width): -1 = none. critical (tokens, width): the entry is active at values up to it. mass (tokens,
    width). own (tokens,): so many first entries make the choice before; 0 leaves the token out. agreeing
    (tokens,) 0 or 1. beyond (tokens,): at values up to it more is active than is listed. counts (V, width + 1) is added
    to as it is; load (E, V + 1), kept, same, same_agreeing (of tokens that agree), kept_own, added and unknown (V + 1,)
    are to be summed up from the right, which leaves out place 0.
    """
    width = ids.shape[1]
    size = len(values)
    here = np.zeros(size + 1, np.int64)
    for token in range(len(ids)):
        if own[token] == 0:
            continue
        here[:] = 0
        least = size
        most = 0
        for rank in range(width):
            item = ids[token, rank]
            if item < 0:
                continue
            place = _place(values, critical[token, rank])
            here[place] += 1
            load[item, place] += 1
            kept[place] += mass[token, rank]
            if rank < own[token]:
                kept_own[place] += 1
                least = min(least, place)
            else:
                added[place] += 1
                most = max(most, place)
        if most < least:
            same[least] += 1
            same[most] -= 1
            same_agreeing[least] += agreeing[token]
            same_agreeing[most] -= agreeing[token]
        unknown[_place(values, beyond[token])] += 1
        active = 0
        for value in range(size - 1, -1, -1):
            active += here[value + 1]
            counts[value, active] += 1


@compiled
def doubtful(low: FloatArray, high: FloatArray, own: IntArray, values: FloatArray, doubts: IntArray) -> None:
    """Add the tokens whose answer is in doubt: at values above ``low`` and up to ``high`` of any entry.

    low, high (tokens, width); doubts (V,).
    """
    size = len(values)
    here = np.zeros(size + 1, np.int64)
    for token in range(len(low)):
        any_here = False
        for rank in range(own[token]):
            first = _place(values, low[token, rank])
            last = _place(values, high[token, rank])
            if first < last:
                if not any_here:
                    here[:] = 0
                    any_here = True
                here[first] += 1
                here[last] -= 1
        if any_here:
            open_now = 0
            for value in range(size):
                open_now += here[value]
                if open_now > 0:
                    doubts[value] += 1
