"""LRU caches into which foreseen experts are brought, compiled.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profiler.metrics._arrays import IntArray
from profiler.metrics._stack import compiled

Ids16 = NDArray[np.int16]


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
