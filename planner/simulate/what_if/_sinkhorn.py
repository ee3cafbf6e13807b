"""Kernels for the transport plan of a batch.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

import numpy as np

from planner.simulate.what_if._rows import GROUP, MAGIC_BITS, Ids, Values32, exponentials, reordered, take
from profiler.metrics._arrays import FloatArray, IntArray
from profiler.metrics._stack import compiled


@compiled
def softmax(ids: Ids, logits: Values32, log_partition: Values32, least: float, probability: FloatArray) -> None:
    """Write the probabilities of all experts (tokens, E); ``least`` where one is not stored, or smaller.

    ids, logits (tokens, m), -1 = none; log_partition (tokens,).
    """
    m = ids.shape[1]
    listed, shifted = np.empty(m, np.float32), np.empty(m, np.float32)
    whole = shifted.view(np.int32)
    factors = np.empty(m, np.float64)
    powers = factors.view(np.int64)
    floor = np.log(least)
    for token in range(len(ids)):
        for place in range(m):
            # Where none is stored there is no number either.
            value = logits[token, place] - log_partition[token]
            listed[place] = value if ids[token, place] >= 0 else np.float32(floor)
        exponentials(listed, shifted, floor)
        for place in range(m):
            powers[place] = (np.int64(whole[place]) - MAGIC_BITS + 1023) << 52
        probability[token] = least
        for place in range(m):
            if ids[token, place] >= 0:
                probability[token, ids[token, place]] = listed[place] * factors[place]


@reordered
def transport(kernel: FloatArray, tolerance: float, rounds: int, column: FloatArray) -> float:
    """Scale rows and columns of the kernel (tokens, E) until each row adds up to 1 and each column to tokens / E.

    Write the factors of the columns to ``column`` (E,); return the largest relative error of a column.
    """
    tokens, experts = kernel.shape
    wanted = tokens / experts
    sums = np.empty(experts, np.float64)
    column[:] = 1.0
    error = np.inf
    for _ in range(rounds):
        sums[:] = 0.0
        for token in range(tokens):
            total = 0.0
            for expert in range(experts):
                total += kernel[token, expert] * column[expert]
            part = 1.0 / total
            for expert in range(experts):
                sums[expert] += kernel[token, expert] * part
        error = 0.0
        for expert in range(experts):
            error = max(error, abs(column[expert] * sums[expert] / wanted - 1.0))
        if error < tolerance:
            break
        for expert in range(experts):
            column[expert] = wanted / sums[expert]
    return error


@compiled
def rechosen(
    kernel: FloatArray, column: FloatArray, ids: Ids, own: IntArray, agreeing: IntArray, load: IntArray, sums: IntArray
) -> float:
    """Choose the largest entries of kernel (tokens, E) x column (E,), as many as before; return their kernel.

    The first ``own`` of ids (tokens, m) are the choice before. Add to load (E,) and sums: same sets, own selections
    kept, new ones, same sets of tokens that agree (1 in agreeing (tokens,)).
    """
    experts, m = len(column), ids.shape[1]
    work = np.zeros((experts + GROUP - 1) // GROUP * GROUP, np.float64)
    bits = work.view(np.int64)
    bits[experts:] = -1
    worth, chosen = np.empty(m + 1, np.int64), np.empty(m + 1, np.int64)
    before = np.full(experts, -1, np.int64)
    total = 0.0
    for token in range(len(ids)):
        wanted = own[token]
        while wanted > 0 and ids[token, wanted - 1] < 0:
            wanted -= 1
        for expert in range(experts):
            work[expert] = kernel[token, expert] * column[expert]
        for rank in range(wanted):
            before[ids[token, rank]] = token
        take(bits, ids[token], min(2 * wanted, m), wanted, worth, chosen)
        kept = 0
        for rank in range(wanted):
            item = chosen[rank]
            load[item] += 1
            total += kernel[token, item]
            if before[item] == token:
                kept += 1
        if wanted > 0 and kept == wanted:
            sums[0] += 1
            sums[3] += agreeing[token]
        sums[1] += kept
        sums[2] += wanted - kept
    return total
