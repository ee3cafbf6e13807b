"""One workload through a cache whose policy gives every expert a worth. See ``_cache`` for how it is kept.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.simulate._cache import (
    NEVER,
    NOBODY,
    UNKNOWN,
    Cache,
    Flags,
    Ids,
    Missing,
    Objects,
    Times,
    Worths,
    admit,
    clear,
    empty_cache,
    evict,
    least_of_all,
    least_worth,
)
from profiler.metrics._stack import compiled

SOME = 1e-6  # added to every expert's share in a predicted matrix, so that none is worth nothing
_ALL = 1 << 62  # after every time: nothing is pinned


class Rule(IntEnum):
    """What an expert is worth; the largest stays."""

    RECENCY = 0  # nothing: the time of the last use decides (LRU)
    COUNT = 1  # uses so far (LFU)
    COUNT_INSIDE = 2  # uses since it was loaded
    TOKENS = 3  # tokens that used it so far
    FORESIGHT = 4  # minus the time of the next use, as far as it can be seen
    ACTIVATION = 5  # uses since it was loaded, times its share of a predicted activation matrix


class Work(NamedTuple):
    """What is replayed. tokens, ahead, matrix and matrices may be of size 0 where no rule asks.

    ids, tokens, ahead: (layers, passes, width), ``ahead`` from :func:`next_passes`. starts: (passes,) a request begins.
    matrix: (passes,) which of the ``matrices`` (matrices, layers, E), shares of a layer's uses, foretells the pass.
    """

    ids: Ids
    starts: Flags
    tokens: NDArray[np.uint16]
    ahead: NDArray[np.int32]
    matrix: Times
    matrices: Worths


class Settings(NamedTuple):
    """How it is replayed.

    experts: E. capacity: (layers,) slots of each; of a shared cache, [0] = its slots. cold: the cache and all counts
    start anew with every request. hits_first: the misses of a step count as used after its hits, both in ascending id;
    otherwise the step's entries count as used in their order. foresight: passes ahead that next uses are known of; -1 =
    all. gap, shift: (2 * layers,) see :func:`_cache.least_of_all`.
    """

    rule: int
    experts: int
    capacity: Times
    shared: bool
    cold: bool
    hits_first: bool
    foresight: int
    gap: Worths
    shift: Worths


@compiled
def next_passes(ids: Ids, num_experts: int) -> NDArray[np.int32]:
    """The pass in which each used expert is used again, -1 = never or no expert: (layers, passes, width)."""
    layers, passes, width = ids.shape
    result = np.full((layers, passes, width), -1, np.int32)
    following = np.empty(num_experts, np.int32)
    for layer in range(layers):
        following[:] = -1
        for at in range(passes - 1, -1, -1):
            for rank in range(width):
                expert = ids[layer, at, rank]
                if expert >= 0:
                    result[layer, at, rank] = following[expert]
                    following[expert] = at
    return result


@compiled
def replay(work: Work, how: Settings, missing: Missing, first: int, there: Flags) -> None:
    """Write how many experts were missing in each step into ``missing`` (layers, passes), and which of those of the
    passes from ``first`` on were there into ``there`` (layers, some passes, width).
    """
    ids, starts, tokens, ahead, matrix, matrices = work
    rule, experts, shared, cold, hits_first = how.rule, how.experts, how.shared, how.cold, how.hits_first
    layers, passes, width = ids.shape
    cache = empty_cache(layers, experts)
    place, residents, held, worth, used, least = cache
    uses = np.zeros(layers * experts, np.int64)
    stride = max(width, 2 * experts)
    for outer in range(passes if shared else layers):
        for inner in range(layers if shared else passes):
            layer, at = (inner, outer) if shared else (outer, inner)
            base, now = layer * experts, (np.int64(at) * layers + layer) * stride
            if not shared or layer == 0:
                last = layers if shared else layer + 1
                if cold and starts[at]:
                    clear(cache, layer, last, experts)
                    uses[base : last * experts] = 0
                if rule == Rule.ACTIVATION and at > 0 and matrix[at] != matrix[at - 1]:
                    _foretell(matrices[matrix[at]], uses, worth, base, last * experts)
                    least[layer:last] = UNKNOWN
            row = ids[layer, at]
            if first <= at < first + there.shape[1]:
                _note(row, base, place, there[layer, at - first])
            if hits_first:
                needed, lost = _look_up_hits_first(row, base, experts, place, used, now)
            else:
                needed, lost = _look_up(row, base, place, used, now)
            if rule == Rule.FORESIGHT:
                _value_next(row, base, ahead[layer, at], worth, layer, layers)
            elif rule == Rule.ACTIVATION:
                _value_activation(row, base, matrices[matrix[at], layer], uses, worth)
            elif rule != Rule.RECENCY:
                _value_count(row, base, tokens[layer, at], rule == Rule.TOKENS, worth)
            least[layer] = UNKNOWN
            missing[layer, at] = lost
            if not lost:
                continue
            horizon = -np.inf
            if rule == Rule.FORESIGHT and how.foresight >= 0:
                horizon = -(float(at + how.foresight) * layers + layer)
                least[:] = UNKNOWN  # the window has moved on
            beyond = rule == Rule.FORESIGHT and needed > how.capacity[0 if shared else layer]
            since = _ALL if beyond else now
            forgets = rule == Rule.COUNT_INSIDE or rule == Rule.ACTIVATION
            if shared:
                _load_shared(row, how, cache, uses, layer, since, horizon, beyond, forgets)
            else:
                held[layer] = _load(
                    row, base, place, residents, held[layer], worth, used, uses, how.capacity[layer], since, horizon,
                    beyond, forgets,
                )  # fmt: skip
            least[layer] = UNKNOWN


@compiled
def _look_up(row: Ids, base: int, place: Ids, used: Times, now: int) -> tuple[int, int]:
    """How many experts a step needs, and how many of them are missing; all are marked as used, in their order."""
    needed, lost = 0, 0
    for rank in range(len(row)):
        expert = row[rank]
        if expert >= 0:
            needed += 1
            lost += place[base + expert] < 0
            used[base + expert] = now + rank
    return needed, lost


@compiled
def _look_up_hits_first(row: Ids, base: int, experts: int, place: Ids, used: Times, now: int) -> tuple[int, int]:
    """The same, marked as used in ascending id, and all that are missing after all that are there."""
    needed, lost = 0, 0
    for rank in range(len(row)):
        expert = row[rank]
        if expert >= 0:
            miss = place[base + expert] < 0
            needed += 1
            lost += miss
            used[base + expert] = now + expert + experts * miss
    return needed, lost


@compiled
def _note(row: Ids, base: int, place: Ids, there: Flags) -> None:
    for rank in range(len(row)):
        there[rank] = row[rank] >= 0 and place[base + row[rank]] >= 0


@compiled
def _value_count(row: Ids, base: int, tokens: NDArray[np.uint16], weighted: bool, worth: Worths) -> None:
    """One more use of each expert of a step, or as many as tokens use it."""
    for rank in range(len(row)):
        if row[rank] >= 0:
            worth[base + row[rank]] += tokens[rank] if weighted else 1.0


@compiled
def _value_next(row: Ids, base: int, ahead: NDArray[np.int32], worth: Worths, layer: int, layers: int) -> None:
    """Minus the time of each expert's next use."""
    for rank in range(len(row)):
        if row[rank] >= 0:
            worth[base + row[rank]] = -(float(ahead[rank]) * layers + layer) if ahead[rank] >= 0 else NEVER


@compiled
def _value_activation(row: Ids, base: int, shares: Worths, uses: Times, worth: Worths) -> None:
    """One more use of each expert of a step, in the terms of the predicted shares (E,)."""
    for rank in range(len(row)):
        if row[rank] >= 0:
            uses[base + row[rank]] += 1
            worth[base + row[rank]] = uses[base + row[rank]] * (shares[row[rank]] + SOME)


@compiled
def _foretell(shares: Worths, uses: Times, worth: Worths, first: int, last: int) -> None:
    """Another matrix (layers, E) foretells the passes from here on: worths of objects first..last-1 in its terms."""
    experts = shares.shape[1]
    for item in range(first, last):
        worth[item] = uses[item] * (shares[item // experts, item % experts] + SOME)


@compiled
def _load(
    row: Ids, base: int, place: Ids, residents: Objects, held: int, worth: Worths, used: Times, uses: Times,
    room: int, since: int, horizon: float, beyond: bool, forgets: bool,
) -> int:  # fmt: skip
    """Admit what is missing, each evicting the least worthy expert that the step does not need; how many are held then.

    A step that needs more than the cache holds admits what fits, in the order of its entries. With foresight
    (``beyond``) it keeps those used again first instead, whatever the step needs: nothing better is possible where not
    all can stay. forgets: what is not on the device loses its worth.
    """
    for rank in range(len(row)):
        expert = row[rank]
        if expert < 0 or place[base + expert] >= 0:
            continue
        item = base + expert
        spot, out = held, NOBODY
        if held < room:
            held += 1
        else:
            spot, out = least_worth(residents, worth, used, base, held, since, horizon), item
            if spot != NOBODY and not (beyond and _goes_before(item, residents[base + spot], worth, used, horizon)):
                out = residents[base + spot]
                place[out] = -1
        if out != item:
            residents[base + spot] = item
            place[item] = spot
        if forgets and out != NOBODY:
            worth[out] = 0.0
            uses[out] = 0
    return held


@compiled
def _load_shared(
    row: Ids, how: Settings, cache: Cache, uses: Times, layer: int, since: int, horizon: float, beyond: bool,
    forgets: bool,
) -> None:  # fmt: skip
    """The same in a cache that all layers share."""
    experts = how.experts
    held = cache.held.sum()
    for rank in range(len(row)):
        item = layer * experts + row[rank]
        if row[rank] < 0 or cache.place[item] >= 0:
            continue
        out = NOBODY
        if held < how.capacity[0]:
            held += 1
        else:
            out = item
            origin = least_of_all(cache, layer, experts, since, horizon, 1.0, how.gap, how.shift)
            if origin != NOBODY:
                spot = cache.least[origin]
                other = cache.residents[origin * experts + spot]
                if not (beyond and _goes_before(item, other, cache.worth, cache.used, horizon)):
                    out = evict(cache, origin, experts, spot)
        if out != item:
            admit(cache, layer, experts, item)
        if forgets and out != NOBODY:
            cache.worth[out] = 0.0
            uses[out] = 0


@compiled
def _goes_before(item: int, other: int, worth: Worths, used: Times, horizon: float) -> bool:
    """One object is worth less than another, or as much and used earlier."""
    mine, least = worth[item], worth[other]
    mine = NEVER if mine < horizon else mine
    least = NEVER if least < horizon else least
    return bool(mine < least or (mine == least and used[item] < used[other]))
