"""Kernels that look a token's experts up among its stored router scores.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profiler.metrics._arrays import FloatArray, IntArray
from profiler.metrics._stack import compiled

Ids = NDArray[np.int16]
Logits = NDArray[np.float32]


@compiled
def agrees(ids: Ids, scored: Ids, logits: Logits, found: IntArray) -> None:
    """Write 1 where no stored expert outside of the choice has a larger logit than one inside, else 0.

    ids (tokens, k), scored and logits (tokens, m) in descending logit, found (tokens,).
    """
    for token in range(len(ids)):
        number = 0
        for rank in range(ids.shape[1]):
            if ids[token, rank] >= 0:
                number += 1
        inside = 0
        lowest = np.float32(np.inf)
        highest = np.float32(-np.inf)
        for place in range(scored.shape[1]):
            item = scored[token, place]
            if item < 0:
                continue
            chosen = False
            for rank in range(ids.shape[1]):
                if ids[token, rank] == item:
                    chosen = True
            if chosen:
                inside += 1
                lowest = logits[token, place]
            elif highest == -np.inf:
                highest = logits[token, place]
            if inside == number or (not chosen and lowest < highest):
                break
        found[token] = 1 if inside == number and lowest >= highest else 0


@compiled
def gates(
    ids: Ids, weights: Logits, rounding: Logits, scored: Ids, logits: Logits, slack: float, found: IntArray
) -> None:
    """Add to found (2,): tokens with two experts whose logits are stored, and those of them whose two largest gate
    weights have the ratio of a softmax, e^(l_2 - l_1), which scaling and renormalisation leave as it is.

    ids, weights (tokens, k) in descending weight; rounding (tokens,): by what a weight may be wrong; slack: relative.
    """
    if ids.shape[1] < 2:
        return
    for token in range(len(ids)):
        if ids[token, 1] < 0 or weights[token, 0] <= 0:
            continue
        first, second = np.nan, np.nan
        for place in range(scored.shape[1]):
            if scored[token, place] == ids[token, 0]:
                first = logits[token, place]
            if scored[token, place] == ids[token, 1]:
                second = logits[token, place]
        if np.isnan(first) or np.isnan(second):
            continue
        found[0] += 1
        expected = np.exp(second - first)
        error = rounding[token]
        low = (weights[token, 1] - error) / (weights[token, 0] + error)
        high = np.inf
        if weights[token, 0] > error:
            high = (weights[token, 1] + error) / (weights[token, 0] - error)
        if low * (1 - slack) <= expected and expected <= high * (1 + slack):
            found[1] += 1


@compiled
def logits_of(ids: Ids, scored: Ids, logits: Logits, values: FloatArray, missing: NDArray[np.bool_]) -> None:
    """Write the logit of each chosen expert; the least stored one where it is not among them, which is at least it.

    values (tokens, k); missing (tokens,): whether a chosen expert's logit is not stored.
    """
    for token in range(len(ids)):
        last = scored.shape[1] - 1
        while last > 0 and scored[token, last] < 0:
            last -= 1
        missing[token] = False
        for rank in range(ids.shape[1]):
            item = ids[token, rank]
            if item < 0:
                continue
            found = False
            for place in range(last + 1):
                if scored[token, place] == item:
                    values[token, rank] = logits[token, place]
                    found = True
                    break
            if not found:
                values[token, rank] = logits[token, last]
                missing[token] = True
