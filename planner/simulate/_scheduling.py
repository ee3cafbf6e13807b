"""Loops of scheduling, compiled: swaps of tokens between two batches, and how often groups load anew.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profiler.metrics._arrays import IntArray
from profiler.metrics._stack import compiled


@compiled
def _change(uses: IntArray, leaves: NDArray[np.int32], enters: NDArray[np.int32]) -> int:
    """Change in the number of objects that a batch uses when one token leaves it and another enters.

    uses (objects,): tokens of the batch that use each; leaves, enters: objects of a token, -1 = none.
    """
    change = 0
    for item in leaves:
        if item >= 0 and uses[item] == 1:
            stays = False
            for other in enters:
                stays |= other == item
            change -= not stays
    for item in enters:
        if item >= 0 and uses[item] == 0:
            change += 1
    return change


@compiled
def swap_tokens(objects: NDArray[np.int32], second: NDArray[np.bool_]) -> None:
    """Swap tokens between two batches, always the pair that saves most objects over both, until none saves any.

    objects: (tokens, width) what each token uses, -1 = none; second (tokens,): those of the second batch, changed.
    Of pairs that save alike, the first.
    """
    count = objects.max() + 1
    uses = np.zeros((2, count), np.int64)
    for token in range(len(second)):
        for item in objects[token]:
            if item >= 0:
                uses[int(second[token]), item] += 1
    while True:
        best, pair = 0, (-1, -1)
        for one in range(len(second)):
            if second[one]:
                continue
            for other in range(len(second)):
                if not second[other]:
                    continue
                change = _change(uses[0], objects[one], objects[other]) + _change(uses[1], objects[other], objects[one])
                if change < best:
                    best, pair = change, (one, other)
        if best == 0:
            return
        one, other = pair
        for item in objects[one]:
            if item >= 0:
                uses[0, item] -= 1
                uses[1, item] += 1
        for item in objects[other]:
            if item >= 0:
                uses[1, item] -= 1
                uses[0, item] += 1
        second[one], second[other] = True, False
