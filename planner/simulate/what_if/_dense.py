"""Kernels over the router probabilities of all experts of each token.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from profiler.metrics._arrays import FloatArray, IntArray
from profiler.metrics._stack import compiled

Ids = NDArray[np.int16]
Values32 = NDArray[np.float32]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def reordered(function: _Function) -> _Function:
    """As ``compiled``, and sums may be taken in any order, so that they run in the vector unit."""
    try:
        return cast(_Function, numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})(function))
    except RuntimeError:  # a read-only installation without a writable home
        return cast(_Function, numba.njit(nogil=True, fastmath={"reassoc", "contract"})(function))


@reordered
def neighbours(
    probability: Values32, direction: Values32, sequence: IntArray, window: int, temperature: float, mixed: Values32
) -> None:
    """Write the mean probability of the tokens before, weighted by softmax(cosine / temperature); a sequence's first
    token keeps its own.

    probability, direction, mixed (tokens, E): direction has norm 1; sequence (tokens,).
    """
    tokens, experts = probability.shape
    scale = np.float32(1 / temperature)
    for token in range(tokens):
        first = token
        while first > 0 and token - first < window and sequence[first - 1] == sequence[token]:
            first -= 1
        if first == token:
            mixed[token] = probability[token]
            continue
        for expert in range(experts):
            mixed[token, expert] = np.float32(0)
        total = np.float32(0)
        for other in range(first, token):
            alike = np.float32(0)
            for expert in range(experts):
                alike += direction[token, expert] * direction[other, expert]
            weight = np.exp((alike - np.float32(1)) * scale)
            total += weight
            for expert in range(experts):
                mixed[token, expert] += weight * probability[other, expert]
        part = np.float32(1) / total
        for expert in range(experts):
            mixed[token, expert] *= part


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
def _insert(item: int, value: float, size: int, wanted: int, worth: FloatArray, chosen: NDArray[np.int16]) -> int:
    """Put an expert among the ``wanted`` best so far, behind those of equal worth; return how many there are."""
    at = size if size < wanted else size - 1
    while at > 0 and worth[at - 1] < value:
        worth[at] = worth[at - 1]
        chosen[at] = chosen[at - 1]
        at -= 1
    worth[at] = value
    chosen[at] = item
    return size + 1 if size < wanted else size


@compiled
def largest(values: NDArray[np.floating[Any]], ids: Ids, own: IntArray, chosen: Ids) -> None:
    """Write the ``own`` experts with the largest values to ``chosen`` (tokens, most), -1 beyond.

    values (tokens, E). Of equal values the expert that stands first in ``ids`` (tokens, m) is taken; those that do not
    stand there come last, in order.
    """
    tokens, experts = values.shape
    worth = np.empty(chosen.shape[1], np.float64)
    candidates = np.empty(experts, np.int64)
    for token in range(tokens):
        wanted = own[token]
        size = 0
        listed = 0
        chosen[token] = -1
        if wanted == 0:
            continue
        least = -np.inf
        while listed < ids.shape[1] and ids[token, listed] >= 0:
            item = ids[token, listed]
            listed += 1
            value = values[token, item]
            if value > least or size < wanted:
                size = _insert(item, value, size, wanted, worth, chosen[token])
                if size == wanted:
                    least = worth[size - 1]
        if listed == experts:
            continue
        above = 0
        for item in range(experts):  # without a branch, which no processor could foresee
            candidates[above] = item
            above += 1 if values[token, item] > least or size < wanted else 0
        for place in range(above):
            item = candidates[place]
            value = values[token, item]
            if value > least or size < wanted:
                unlisted = True
                for other in range(listed):
                    if ids[token, other] == item:
                        unlisted = False
                        break
                if unlisted:
                    size = _insert(item, value, size, wanted, worth, chosen[token])
                    if size == wanted:
                        least = worth[size - 1]


@compiled
def compare_choice(
    chosen: Ids, ids: Ids, own: IntArray, mass: NDArray[np.floating[Any]], load: IntArray, sums: IntArray
) -> float:
    """Add a new choice to load (E,) and sums (same sets, own selections kept, new ones); return its mass.

    chosen (tokens, most); the first ``own`` of ids (tokens, m) are the choice before; mass (tokens, E).
    """
    total = 0.0
    before = np.full(mass.shape[1], -1, np.int64)
    for token in range(len(ids)):
        for rank in range(own[token]):
            before[ids[token, rank]] = token
        kept = 0
        for rank in range(own[token]):
            item = chosen[token, rank]
            load[item] += 1
            total += mass[token, item]
            if before[item] == token:
                kept += 1
        if own[token] > 0 and kept == own[token]:
            sums[0] += 1
        sums[1] += kept
        sums[2] += own[token] - kept
    return total


@compiled
def shared_with_previous(chosen: Ids, own: IntArray, sequence: IntArray, experts: int) -> tuple[int, int]:
    """Selections that the token before made, too, and selections of tokens that have one before; ``own`` of each."""
    shared = 0
    selections = 0
    last = np.full(experts, -1, np.int64)
    for token in range(len(chosen)):
        if token > 0 and sequence[token] == sequence[token - 1]:
            selections += own[token]
            for rank in range(own[token]):
                if last[chosen[token, rank]] == token - 1:
                    shared += 1
        for rank in range(own[token]):
            last[chosen[token, rank]] = token
    return shared, selections


@compiled
def spread(
    ids: Ids, stored: NDArray[np.floating[Any]], rest: NDArray[np.floating[Any]], dense: NDArray[np.floating[Any]]
) -> None:
    """Write (tokens, E) values from those of the stored experts (tokens, m), and one for all others (tokens,)."""
    for token in range(len(ids)):
        dense[token] = rest[token]
        for place in range(ids.shape[1]):
            if ids[token, place] >= 0:
                dense[token, ids[token, place]] = stored[token, place]
