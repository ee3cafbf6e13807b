"""Stack kernels beside :mod:`profiler.metrics._stack`: one walk per step instead of one per expert.

Both write depths in the format of ``request_depths``: d for an object found at depth d, num_objects + d for one used
for the first time when d others had been, -1 where there is no request. A cache of C slots holds the top C of its
stack.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profiler.metrics._arrays import IntArray
from profiler.metrics._stack import compiled, next_uses

Ids32 = NDArray[np.int32]

_NEVER = np.int64(1) << np.int64(31)  # next use of what is never needed again, + its id, so that order is total


@compiled
def _add(tree: Ids32, slot: int, amount: int) -> None:
    """Fenwick tree: one more, or one fewer, object last used at ``slot``."""
    slot += 1
    while slot < len(tree):
        tree[slot] += amount
        slot += slot & -slot


@compiled
def _up_to(tree: Ids32, slot: int) -> int:
    """Objects last used at ``slot`` or before."""
    slot += 1
    total = 0
    while slot > 0:
        total += tree[slot]
        slot -= slot & -slot
    return total


@compiled
def _renumber(tree: Ids32, slot_of: Ids32, object_at: Ids32, clock: int) -> int:
    """Last uses moved together to the front, in order; return the first free slot."""
    tree[:] = 0
    free = 0
    for slot in range(clock):
        item = object_at[slot]
        if item >= 0 and slot_of[item] == slot:
            slot_of[item] = free
            object_at[free] = item
            _add(tree, free, 1)
            free += 1
    return free


@compiled
def lru_depths(requests: Ids32, offsets: IntArray, num_objects: int, depths: Ids32) -> None:
    """``request_depths`` of ``Policy.LRU`` with ``pinned``, in time that grows with the logarithm of the objects.

    The depth of an object is the number of others used since: a Fenwick tree over the order of last uses counts them.
    requests (steps, width), offsets (sequences + 1,), depths (steps, width): as there.
    """
    width = requests.shape[1]
    span = 4 * num_objects + width
    tree = np.zeros(span + 1, np.int32)
    slot_of = np.full(num_objects, -1, np.int32)
    object_at = np.full(span, -1, np.int32)
    for sequence in range(len(offsets) - 1):
        tree[:] = 0
        slot_of[:] = -1
        clock = 0
        size = 0
        for step in range(offsets[sequence], offsets[sequence + 1]):
            if clock + width > span:
                clock = _renumber(tree, slot_of, object_at, clock)
            unseen = num_objects + size
            for rank in range(width):
                item = requests[step, rank]
                if item < 0:
                    depths[step, rank] = -1
                elif slot_of[item] < 0:
                    depths[step, rank] = unseen
                    unseen += 1
                else:
                    depths[step, rank] = size - _up_to(tree, slot_of[item])
            for rank in range(width):
                item = requests[step, rank]
                if item < 0:
                    continue
                if slot_of[item] >= 0:
                    _add(tree, slot_of[item], -1)
                else:
                    size += 1
                slot_of[item] = clock
                object_at[clock] = item
                _add(tree, clock, 1)
                clock += 1


@compiled
def _nearest_last(pool: Ids32, size: int, item: int, due: IntArray) -> None:
    """Insert ``item`` into the pool of ``size`` objects, whose next uses descend."""
    at = size
    while at > 0 and due[pool[at - 1]] < due[item]:
        pool[at] = pool[at - 1]
        at -= 1
    pool[at] = item


@compiled
def _restack(stack: Ids32, position: Ids32, due: IntArray, needed: Ids32, count: int, marked: Ids32, step: int,
             size: int, pinned: bool, pool: Ids32) -> None:  # fmt: skip
    """The stack after a step that needs ``needed[:count]``, next uses descending: every size keeps the nearest.

    A cache of C slots held the top C and is offered the step's objects, too. It keeps the C with the nearest next use;
    ``pinned``: all that the step needs before any other. Walking down, the pool holds what the caches so far did not
    keep; there are never more than ``count``, and none below the deepest object that the step needs.
    """
    depth, waiting = 0, 0
    if pinned:
        for rank in range(count):
            other = int(stack[rank]) if rank < size else -1
            if other >= 0 and marked[other] != step:
                _nearest_last(pool, waiting, other, due)
                waiting += 1
            item = needed[count - 1 - rank]
            stack[rank] = item
            position[item] = rank
        depth = count
    else:
        pool[:count] = needed[:count]
        waiting = count
    while waiting > 0:
        if depth < size:
            other = stack[depth]
            if marked[other] != step:
                best = pool[waiting - 1]
                if due[other] < due[best]:
                    depth += 1
                    continue
                _nearest_last(pool, waiting - 1, other, due)
                stack[depth] = best
                position[best] = depth
                depth += 1
                continue
        waiting -= 1
        best = pool[waiting]
        stack[depth] = best
        position[best] = depth
        depth += 1


@compiled
def optimal_depths(requests: Ids32, offsets: IntArray, num_objects: int, pinned: bool, depths: Ids32) -> None:
    """Depth of every request under the best replacement that knows the future, for sets.

    requests (steps, width): object ids, each once in a step, -1 = none. offsets (sequences + 1,): the stack starts
    empty at each. pinned: the experts of a step are all resident together (min_set; of a step larger than the cache
    those with the nearest next use stay). Otherwise a miss need not be admitted (min_bypass).
    """
    width = requests.shape[1]
    stack = np.full(num_objects, -1, np.int32)
    position = np.full(num_objects, -1, np.int32)
    marked = np.full(num_objects, -1, np.int32)
    due = np.zeros(num_objects, np.int64)
    needed = np.empty(width, np.int32)
    pool = np.empty(width + 1, np.int32)
    for sequence in range(len(offsets) - 1):
        first = offsets[sequence]
        following = next_uses(requests[first : offsets[sequence + 1]], num_objects)
        position[:] = -1
        size = 0
        for step in range(first, offsets[sequence + 1]):
            count = 0
            new = 0
            for rank in range(width):
                item = requests[step, rank]
                if item < 0:
                    depths[step, rank] = -1
                    continue
                if position[item] < 0:
                    depths[step, rank] = num_objects + size + new
                    new += 1
                else:
                    depths[step, rank] = position[item]
                ahead = following[(step - first) * width + rank]
                due[item] = ahead if ahead >= 0 else _NEVER + item
                marked[item] = step
                _nearest_last(needed, count, item, due)
                count += 1
            _restack(stack, position, due, needed, count, marked, step, size, pinned, pool)
            size += new
