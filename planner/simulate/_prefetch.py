"""Loops of prefetching, compiled: experts ranked by tables, sequences matched, true routes corrupted, caches replayed.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Caches(NamedTuple):
    """LRU caches as lists in order of last use; objects are numbered layer x E + expert, and each has one cache.

    Attributes:
        newer, older: (objects,) neighbours in the order of the cache, -1 = none.
        ends: (caches, 2) the newest and the oldest object, -1 = none.
        held: (caches,) objects; slots: (caches,) that there is room for.
        there: (objects,) whether it is in its cache; unused: whether a prediction brought it and no step used it since.
        masked: (objects,) predictions under way that name it.
        needed: (objects,) the last step that needed it.
    """

    newer: IntArray
    older: IntArray
    ends: IntArray
    held: IntArray
    slots: IntArray
    there: NDArray[np.bool_]
    unused: NDArray[np.bool_]
    masked: IntArray
    needed: IntArray


def empty_caches(*, objects: int, slots: IntArray) -> Caches:
    """Caches with nothing in them."""
    none = np.full(objects, -1, np.int64)
    return Caches(
        none, none.copy(), np.full((len(slots), 2), -1, np.int64), np.zeros(len(slots), np.int64), slots,
        np.zeros(objects, np.bool_), np.zeros(objects, np.bool_), np.zeros(objects, np.int64), none.copy(),
    )  # fmt: skip


@compiled
def _unlink(caches: Caches, cache: int, item: int) -> None:
    """Take an object out of the order of its cache."""
    before, after = caches.newer[item], caches.older[item]
    if before >= 0:
        caches.older[before] = after
    else:
        caches.ends[cache, 0] = after
    if after >= 0:
        caches.newer[after] = before
    else:
        caches.ends[cache, 1] = before


@compiled
def _link(caches: Caches, cache: int, item: int, end: int) -> None:
    """Put an object at the new end (0) or the old end (1) of the order of its cache."""
    neighbour = caches.ends[cache, end]
    caches.newer[item] = -1 if end == 0 else neighbour
    caches.older[item] = neighbour if end == 0 else -1
    if neighbour < 0:
        caches.ends[cache, 1 - end] = item
    elif end == 0:
        caches.newer[neighbour] = item
    else:
        caches.older[neighbour] = item
    caches.ends[cache, end] = item


@compiled
def _admit(caches: Caches, cache: int, item: int, step: int, demanded: bool) -> bool:
    """Put an object into its cache as the newest, in place of the one used longest ago that ``step`` does not need.

    Foreseen objects stay, unless a demanded one finds no other place. False = there is no room.
    """
    if caches.held[cache] >= caches.slots[cache]:
        victim, fallback = caches.ends[cache, 1], -1
        while victim >= 0 and (caches.needed[victim] == step or caches.masked[victim] > 0):
            if fallback < 0 and caches.needed[victim] != step:
                fallback = victim
            victim = caches.newer[victim]
        if victim < 0 and demanded:
            victim = fallback
        if victim < 0:
            return False
        _unlink(caches, cache, victim)
        caches.there[victim] = caches.unused[victim] = False
        caches.held[cache] -= 1
    _link(caches, cache, item, 0)
    caches.there[item] = True
    caches.unused[item] = not demanded
    caches.held[cache] += 1
    return True


@compiled
def _serve(caches: Caches, cache: int, first: int, ids: Ids16, step: int, absent: NDArray[np.bool_]) -> tuple[int, int]:
    """One step uses its experts; returns how many it needs, and how many of them were fetched for their first use."""
    wanted, useful = 0, 0
    for expert in ids:
        if expert >= 0:
            caches.needed[first + expert] = step
            wanted += 1
    for rank in range(len(ids)):
        if ids[rank] < 0:
            continue
        item = first + ids[rank]
        if caches.there[item]:
            useful += caches.unused[item]
            caches.unused[item] = False
            _unlink(caches, cache, item)
            _link(caches, cache, item, 0)
        else:
            absent[rank] = True
            _admit(caches, cache, item, step, True)
    return wanted, useful


@compiled
def _fetch(caches: Caches, cache: int, first: int, foreseen: Ids16, step: int, limit: int) -> int:
    """Bring foreseen experts that are not there, the most confident first, and keep all foreseen ones from eviction."""
    fetched = 0
    for expert in foreseen:
        if expert >= 0:
            caches.masked[first + expert] += 1
    for expert in foreseen:
        if expert >= 0 and not caches.there[first + expert]:
            if fetched == limit or not _admit(caches, cache, first + expert, step, False):
                break
            fetched += 1
    return fetched


@compiled
def _settle(caches: Caches, cache: int, first: int, foreseen: Ids16) -> None:
    """Experts fetched in vain are the next to go."""
    for expert in foreseen:
        if expert >= 0 and caches.unused[first + expert]:
            _unlink(caches, cache, first + expert)
            _link(caches, cache, first + expert, 1)


@compiled
def replay_lru(
    caches: Caches, ids: Ids16, foreseen: Ids16, ahead: int, limit: int, demote: bool, absent: NDArray[np.bool_],
    unfetched: NDArray[np.bool_], fetched: NDArray[np.uint16], useful: NDArray[np.uint16],
) -> int:  # fmt: skip
    """Replay steps layer by layer, pass by pass: predictions are fetched ``ahead`` steps before they are due.

    Args:
        caches: empty; one per layer, or one that all share.
        ids: (layers, passes, width) needed; foreseen (layers, passes, predictions), each -1 = none.
        ahead: steps between fetching and use.
        limit: fetches per step at most; 0 = predictions change nothing.
        demote: experts fetched in vain are the next to go.
        absent: (layers, passes, width) to be set: needed and not there.
        unfetched: (layers, passes, predictions) to be set: foreseen and not there when the step begins.
        fetched: (layers, passes) to be written: experts fetched for the step.
        useful: to be written: experts used that a prediction had brought, at their first use.

    Returns:
        Steps that needed more experts than their cache has slots.
    """
    layers, passes = ids.shape[0], ids.shape[1]
    experts = len(caches.there) // layers
    shared = len(caches.held) == 1
    overflow = 0
    for step in range(passes * layers):
        layer, one = step % layers, step // layers
        cache, first = 0 if shared else layer, layer * experts
        for rank in range(foreseen.shape[2]):
            expert = foreseen[layer, one, rank]
            if expert >= 0:
                unfetched[layer, one, rank] = not caches.there[first + expert]
                if limit > 0 and step >= ahead:
                    caches.masked[first + expert] -= 1
        wanted, used = _serve(caches, cache, first, ids[layer, one], step, absent[layer, one])
        useful[layer, one] = used
        overflow += wanted > caches.slots[cache]
        if demote:
            _settle(caches, cache, first, foreseen[layer, one])
        due = step + ahead
        if limit > 0 and due < passes * layers:
            layer, one = due % layers, due // layers
            cache = 0 if shared else layer
            fetched[layer, one] = _fetch(caches, cache, layer * experts, foreseen[layer, one], step, limit)
    return overflow
