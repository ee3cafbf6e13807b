"""Caches kept as linked lists: least recently used over all layers, and ARC. Every operation takes constant time.

A list is a ring of objects through a head of its own, an extra object: after the head comes the newest, before it the
oldest. This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.simulate._cache import Flags, Ids, Missing, Times
from profiler.metrics._stack import compiled

Links = NDArray[np.int32]

RECENT, FREQUENT, RECENT_GONE, FREQUENT_GONE = 0, 1, 2, 3  # ARC's T1, T2, B1, B2
_NOWHERE = -1


@compiled
def _take_out(item: int, newer: Links, older: Links) -> None:
    newer[older[item]], older[newer[item]] = newer[item], older[item]


@compiled
def _put_first(item: int, head: int, newer: Links, older: Links) -> None:
    second = older[head]
    older[head], newer[second] = item, item
    newer[item], older[item] = head, second


@compiled
def _oldest(head: int, since: int, newer: Links, used: Times) -> int:
    """The oldest object of a list that was used before ``since``; the head itself if there is none."""
    item = newer[head]
    while item != head and used[item] >= since:
        item = newer[item]
    return int(item)


@compiled
def replay_lru(
    ids: Ids, starts: Flags, experts: int, room: int, cold: bool, missing: Missing, first: int, there: Flags
) -> None:
    """Least recently used, in one cache of ``room`` slots for all layers. Arguments as :func:`_replay.replay`."""
    layers, passes, width = ids.shape
    head = layers * experts
    newer, older = np.full(head + 1, head, np.int32), np.full(head + 1, head, np.int32)
    used, inside, held = np.full(head + 1, -1, np.int64), np.zeros(head, np.bool_), 0
    for at in range(passes):
        if cold and starts[at]:
            newer[:], older[:], used[:], inside[:], held = head, head, -1, False, 0
        for layer in range(layers):
            row, base, now = ids[layer, at], layer * experts, (np.int64(at) * layers + layer) * width
            lost = 0
            for rank in range(width):
                if row[rank] >= 0:
                    hit = inside[base + row[rank]]
                    lost += not hit
                    used[base + row[rank]] = now + rank
                    if first <= at < first + there.shape[1]:
                        there[layer, at - first, rank] = hit
            missing[layer, at] = lost
            for rank in range(width):
                if row[rank] < 0:
                    continue
                item = base + row[rank]
                if inside[item]:
                    _take_out(item, newer, older)
                elif held < room:
                    held += 1
                else:
                    out = _oldest(head, now, newer, used)
                    if out == head:
                        continue  # all slots hold what the step needs
                    _take_out(out, newer, older)
                    inside[out] = False
                inside[item] = True
                _put_first(item, head, newer, older)


@compiled
def replay_arc(
    ids: Ids, starts: Flags, experts: int, rooms: Times, shared: bool, cold: bool, missing: Missing, first: int,
    there: Flags,
) -> None:  # fmt: skip
    """ARC, per layer (rooms: slots of each) or in one cache for all (rooms[0]). Arguments as :func:`_replay.replay`."""
    layers, passes, width = ids.shape
    objects = layers * experts if shared else experts
    newer, older = np.empty(objects + 4, np.int32), np.empty(objects + 4, np.int32)
    used, where = np.empty(objects + 4, np.int64), np.empty(objects, np.int8)
    sizes, target = np.zeros(4, np.int64), np.zeros(1)
    for outer in range(passes if shared else layers):
        for inner in range(layers if shared else passes):
            layer, at = (inner, outer) if shared else (outer, inner)
            if (inner == 0 and (outer == 0 or not shared)) or (cold and starts[at] and (layer == 0 or not shared)):
                where[:], sizes[:], used[:], target[0] = _NOWHERE, 0, -1, 0.0
                for head in range(objects, objects + 4):
                    newer[head] = older[head] = head
            row, base, now = ids[layer, at], layer * experts if shared else 0, (np.int64(at) * layers + layer) * width
            lost = 0
            for rank in range(width):
                if row[rank] >= 0:
                    hit = where[base + row[rank]] == RECENT or where[base + row[rank]] == FREQUENT
                    lost += not hit
                    used[base + row[rank]] = now + rank
                    if first <= at < first + there.shape[1]:
                        there[layer, at - first, rank] = hit
            missing[layer, at] = lost
            for rank in range(width):
                if row[rank] >= 0:
                    _request(base + row[rank], rooms[0 if shared else layer], now, newer, older, used, where, sizes,
                             target)  # fmt: skip


@compiled
def _move(item: int, to: int, newer: Links, older: Links, where: NDArray[np.int8], sizes: Times) -> None:
    """Make an object the newest of a list; -1 = of none."""
    if where[item] != _NOWHERE:
        _take_out(item, newer, older)
        sizes[where[item]] -= 1
    where[item] = to
    if to >= 0:
        _put_first(item, len(where) + to, newer, older)
        sizes[to] += 1


@compiled
def _request(
    item: int, room: int, now: int, newer: Links, older: Links, used: Times, where: NDArray[np.int8], sizes: Times,
    target: NDArray[np.float64],
) -> None:  # fmt: skip
    """One request of ARC's pseudocode (Megiddo and Modha, 2003, figure 4); what the step needs is not evicted."""
    was = where[item]
    if was in (RECENT, FREQUENT):
        _move(item, FREQUENT, newer, older, where, sizes)
        return
    if was == RECENT_GONE:
        target[0] = min(float(room), target[0] + max(1.0, sizes[FREQUENT_GONE] / sizes[RECENT_GONE]))
    elif was == FREQUENT_GONE:
        target[0] = max(0.0, target[0] - max(1.0, sizes[RECENT_GONE] / sizes[FREQUENT_GONE]))
    full = sizes[RECENT] + sizes[FREQUENT] >= room
    keeps = True  # the evicted one stays known
    if was == _NOWHERE:
        if sizes[RECENT] + sizes[RECENT_GONE] >= room:
            if sizes[RECENT] < room and sizes[RECENT_GONE]:
                _move(newer[len(where) + RECENT_GONE], _NOWHERE, newer, older, where, sizes)
            else:
                keeps = False
        elif sizes.sum() >= 2 * room and sizes[FREQUENT_GONE]:
            _move(newer[len(where) + FREQUENT_GONE], _NOWHERE, newer, older, where, sizes)
    if full:
        recent = sizes[RECENT] > target[0] or (was == FREQUENT_GONE and sizes[RECENT] == target[0])
        source = RECENT if not keeps or (sizes[RECENT] and recent) else FREQUENT
        out = _oldest(len(where) + source, now, newer, used)
        if out >= len(where):  # all of that list is needed by this step
            source = FREQUENT if source == RECENT else RECENT
            out = _oldest(len(where) + source, now, newer, used)
        if out >= len(where):
            return  # all slots hold what the step needs
        gone = RECENT_GONE if source == RECENT else FREQUENT_GONE
        _move(out, gone if keeps else _NOWHERE, newer, older, where, sizes)
    _move(item, RECENT if was == _NOWHERE else FREQUENT, newer, older, where, sizes)
