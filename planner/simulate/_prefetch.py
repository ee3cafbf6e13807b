"""Loops of predictors, compiled: experts ranked by tables, sequences matched, true routes corrupted.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiler.metrics._arrays import FloatArray, IntArray
from profiler.metrics._stack import compiled

Ids16 = NDArray[np.int16]
Floats32 = NDArray[np.float32]


@compiled
def best_experts(scores: FloatArray, best: Ids16) -> None:
    """Write the experts of the highest positive scores (E,) into best (width,), falling; ties to the smaller id."""
    best[:] = -1
    filled = 0
    for expert in range(len(scores)):
        score = scores[expert]
        if score <= 0.0 or (filled == len(best) and score <= scores[best[filled - 1]]):
            continue
        if filled < len(best):
            filled += 1
        place = filled - 1
        while place > 0 and scores[best[place - 1]] < score:
            best[place] = best[place - 1]
            place -= 1
        best[place] = expert


@compiled
def rank_by_tables(
    ids: Ids16,
    tokens: NDArray[np.uint16],
    tables: FloatArray,
    rows: IntArray,
    starts: IntArray,
    experts: Ids16,
    counts: IntArray,
    passes: IntArray,
    best: Ids16,
) -> None:
    """Rank a layer's experts by what earlier layers used, and by what followed the very same sets.

    Args:
        ids, tokens: (sources, passes, width) experts of earlier layers, -1 = none, and tokens that use each.
        tables: (sources, E, E) P(j | i), rows of sum 1; one table of zeros and no ids: rows of ``rows`` alone.
        rows: (levels, passes) row of the table of seen sets, weakest level first; -1 = never seen.
        starts: (rows + 1,) where each row begins in ``experts`` and ``counts``: choices that followed.
        passes: (rows,) how often the set was seen.
        best: (passes, width) to be written.
    """
    scores = np.empty(tables.shape[2])
    for one in range(len(best)):
        scores[:] = 0.0
        weight = 0.0
        for source in range(len(ids)):
            for rank in range(ids.shape[2]):
                expert = ids[source, one, rank]
                if expert >= 0:
                    share = float(tokens[source, one, rank])
                    weight += share
                    row = tables[source, expert]
                    for other in range(len(scores)):
                        scores[other] += share * row[other]
        if weight == 0.0:
            best[one] = -1
            continue
        for other in range(len(scores)):
            scores[other] /= weight
        for level in range(len(rows)):
            row_of_set = rows[level, one]
            if row_of_set < 0:
                continue
            choices = 0
            for at in range(starts[row_of_set], starts[row_of_set + 1]):
                choices += counts[at]
            prior = choices / passes[row_of_set]  # one pass's worth of choices is spread by the level below
            for other in range(len(scores)):
                scores[other] *= prior / (choices + prior)
            for at in range(starts[row_of_set], starts[row_of_set + 1]):
                scores[experts[at]] += counts[at] / (choices + prior)
        best_experts(scores, best[one])


@compiled
def match_sequences(
    ids: Ids16, tokens: NDArray[np.uint16], offsets: IntArray, stored: Floats32, lengths: FloatArray,
    matched: NDArray[np.int32],
) -> None:  # fmt: skip
    """After every step, the stored matrix most like the request so far, by the cosine of rows summed over layers.

    Args:
        ids, tokens: (layers, passes, width) of the workload; offsets (requests + 1,).
        stored: (layers, E, matrices) uses of each expert; lengths (layers, matrices) Euclidean norms of its rows.
        matched: (layers, passes) to be written: the matrix of the highest sum, the earlier one on ties.
    """
    layers, experts, matrices = stored.shape
    inverse = np.zeros((layers, matrices))
    for layer in range(layers):
        for one in range(matrices):
            if lengths[layer, one] > 0.0:
                inverse[layer, one] = 1.0 / lengths[layer, one]
    for request in range(len(offsets) - 1):
        own = np.zeros((layers, experts))
        square = np.zeros(layers)
        products = np.zeros((layers, matrices))
        cosines = np.zeros((layers, matrices))
        total = np.zeros(matrices)
        for step in range(offsets[request], offsets[request + 1]):
            for layer in range(layers):
                for rank in range(ids.shape[2]):
                    expert = ids[layer, step, rank]
                    if expert < 0:
                        continue
                    share = float(tokens[layer, step, rank])
                    square[layer] += share * (2.0 * own[layer, expert] + share)
                    own[layer, expert] += share
                    row = stored[layer, expert]
                    product = products[layer]
                    for one in range(matrices):
                        product[one] += share * row[one]
                if square[layer] > 0.0:
                    scale = 1.0 / np.sqrt(square[layer])
                    product = products[layer]
                    cosine = cosines[layer]
                    factor = inverse[layer]
                    for one in range(matrices):
                        new = product[one] * factor[one] * scale
                        total[one] += new - cosine[one]
                        cosine[one] = new
                best = 0
                for one in range(1, matrices):
                    if total[one] > total[best] + 1e-12:  # rounding makes no difference
                        best = one
                matched[layer, step] = best


@compiled
def _random(state: Any) -> Any:
    """The next of a stream of random 64-bit words (SplitMix64), and the state after it."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    word = state
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state, word ^ (word >> np.uint64(31))


@compiled
def place_experts(ids: Ids16, flags: NDArray[np.int8], popularity: FloatArray, seed: int, foreseen: Ids16) -> None:
    """Put needed experts, in random order, where a prediction is right, and others, by popularity, where it is wrong.

    Args:
        ids: (passes, width) experts of one layer, -1 = none.
        flags: (passes, places) 1 = right, 0 = wrong, -1 = nothing is foreseen there.
        popularity: (E,) weights of the wrong ones, each drawn at most once; experts of weight 0 are never drawn.
        seed: of this layer.
        foreseen: (passes, places) to be written.
    """
    needed = np.empty(ids.shape[1], np.int16)
    weights = np.empty(len(popularity))
    for one in range(len(ids)):
        state = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(one) * np.uint64(0x2545F4914F6CDD1D)
        weights[:] = popularity
        count = 0
        for expert in ids[one]:
            if expert >= 0:
                needed[count] = expert
                weights[expert] = 0.0
                count += 1
        left = weights.sum()
        drawn = 0
        for place in range(flags.shape[1]):
            foreseen[one, place] = -1
            if flags[one, place] < 0:
                continue
            state, word = _random(state)
            part = float(word >> np.uint64(11)) / 9007199254740992.0  # 2 ** 53: uniform in [0, 1)
            if flags[one, place] == 1:
                if drawn < count:
                    other = drawn + int(part * (count - drawn))
                    needed[drawn], needed[other] = needed[other], needed[drawn]
                    foreseen[one, place] = needed[drawn]
                    drawn += 1
                continue
            aim, last = part * left, -1
            for expert in range(len(weights)):
                if weights[expert] > 0.0:
                    last = expert
                    aim -= weights[expert]
                    if aim < 0.0:
                        break
            if last >= 0:
                foreseen[one, place] = last
                left -= weights[last]
                weights[last] = 0.0
