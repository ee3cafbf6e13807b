"""One cache stack for every policy: the depth at which each request finds its object serves all sizes in one pass.

A cache that always evicts the object of smallest priority, with priorities that do not depend on its size, holds the
top C entries of one stack for every size C at once (Mattson et al., 1970). A request that finds its object at depth
d therefore hits in every cache of more than d slots. LRU, LFU, SCH (uses in the near future) and Belady differ in
the priority alone.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from ._arrays import IntArray

Ids32 = NDArray[np.int32]
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Policy(IntEnum):
    """What makes an object worth keeping; ties go to the one used last."""

    LRU = 0  # the last use
    LFU = 1  # uses so far, never forgotten
    SCH = 2  # uses in the window of steps ahead
    BELADY = 3  # the next use; objects never used again rank behind all others, the smaller id first


def compiled(function: _Function) -> _Function:
    """Compile with numba, releasing the GIL; keep the machine code on disk wherever numba finds a place to write."""
    try:
        return cast(_Function, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # a read-only installation without a writable home: compile anew in every process
        return cast(_Function, numba.njit(nogil=True)(function))


_COUNT = np.int64(1) << np.int64(31)  # priority = count x 2^31 + time of last use, which breaks ties
_PIN = np.int64(1) << np.int64(62)  # added to what the step still needs: above every other priority
_PINNED = np.int64(1) << np.int64(61)  # a priority from here on is pinned


@compiled
def serve(stack: Ids32, position: Ids32, priority: IntArray, size: int, item: int) -> int:
    """Bring ``item`` to the top of the stack; return the new size.

    Every cache too small to hold it evicts its object of smallest priority: the old top is carried down, at each
    depth the higher priority stays and the lower is carried on, and what arrives at the item's old place (or, for a
    new item, at the bottom) stays there. position (objects,): depth of each object, -1 = not in the stack.
    """
    end = position[item]
    if end < 0:
        end = size
        size += 1
    if end > 0:
        carried = stack[0]
        worth = priority[carried]
        for depth in range(1, end):
            other = stack[depth]
            if priority[other] < worth:
                stack[depth] = carried
                position[carried] = depth
                carried = other
                worth = priority[other]
        stack[end] = carried
        position[carried] = end
    stack[0] = item
    position[item] = 0
    return size


@compiled
def next_uses(requests: Ids32, num_objects: int) -> IntArray:
    """When each request's object is requested again, in requests since the first; -1 = never: (steps x width,)."""
    steps, width = requests.shape
    following = np.full(num_objects, -1, np.int64)
    result = np.full(steps * width, -1, np.int64)
    for time in range(steps * width - 1, -1, -1):
        item = requests[time // width, time % width]
        if item >= 0:
            result[time] = following[item]
            following[item] = time
    return result


@compiled
def _look_up(
    requests: Ids32, step: int, position: Ids32, priority: IntArray, size: int, pinned: bool, depths: Ids32
) -> None:
    """Depth of every request of a step, before any of them is served; pins the objects if asked to."""
    unseen = len(position) + size
    for rank in range(requests.shape[1]):
        item = requests[step, rank]
        if item < 0:
            depths[step, rank] = -1
            continue
        if position[item] >= 0:
            depths[step, rank] = position[item]
        else:
            depths[step, rank] = unseen
            unseen += 1
        if pinned and priority[item] < _PINNED:
            priority[item] += _PIN


@compiled
def _unpin(requests: Ids32, step: int, priority: IntArray) -> None:
    for rank in range(requests.shape[1]):
        item = requests[step, rank]
        if item >= 0 and priority[item] >= _PINNED:
            priority[item] -= _PIN


@compiled
def _foresee(requests: Ids32, step: int, count: IntArray, priority: IntArray) -> None:
    """A step comes into the window: each of its objects has one more use ahead."""
    for rank in range(requests.shape[1]):
        item = requests[step, rank]
        if item >= 0:
            count[item] += 1
            priority[item] += _COUNT


@compiled
def _sequence_depths(requests: Ids32, num_objects: int, policy: int, window: int, pinned: bool, depths: Ids32) -> None:
    """``request_depths`` of one sequence: requests and depths (steps, width)."""
    steps, width = requests.shape
    stack = np.empty(num_objects, np.int32)
    position = np.full(num_objects, -1, np.int32)
    priority = np.zeros(num_objects, np.int64)
    count = np.zeros(num_objects, np.int64)
    following = next_uses(requests, num_objects) if policy == Policy.BELADY else np.empty(0, np.int64)
    if policy == Policy.SCH:
        for step in range(min(window, steps)):
            _foresee(requests, step, count, priority)
    size = 0
    for step in range(steps):
        _look_up(requests, step, position, priority, size, pinned, depths)
        for rank in range(width):
            item = requests[step, rank]
            if item < 0:
                continue
            size = serve(stack, position, priority, size, item)
            worth = np.int64(step * width + rank)
            if policy == Policy.LFU:
                count[item] += 1
                worth += count[item] * _COUNT
            elif policy == Policy.SCH:
                count[item] -= 1
                worth += count[item] * _COUNT
            elif policy == Policy.BELADY:
                worth = -following[worth] if following[worth] >= 0 else -(_COUNT + item)
            priority[item] = worth + _PIN if pinned else worth
        if pinned:
            _unpin(requests, step, priority)
        if policy == Policy.SCH and step + window < steps:
            _foresee(requests, step + window, count, priority)


@compiled
def request_depths(
    requests: Ids32, offsets: IntArray, num_objects: int, policy: int, window: int, pinned: bool, depths: Ids32
) -> None:
    """Write the depth of every request into ``depths``: d for an object found at depth d, num_objects + d for an
    object used for the first time when d others had been, -1 where there is no request.

    requests (steps, width): object ids, -1 = none. offsets (sequences + 1,): first step of each sequence; the stack
    starts empty at each. All requests of a step are looked up together, then served in order. policy: a ``Policy``.
    window: steps, this one included, whose uses Policy.SCH counts. pinned: nothing that the step needs is evicted
    before the step is over, as far as the cache can hold it.
    """
    for sequence in range(len(offsets) - 1):
        part = slice(offsets[sequence], offsets[sequence + 1])
        _sequence_depths(requests[part], num_objects, policy, window, pinned, depths[part])


@compiled
def hit_histograms(
    depths: Ids32, offsets: IntArray, num_objects: int, compulsory_free: bool
) -> tuple[IntArray, IntArray]:
    """Requests by depth, and requests in all, of each sequence: (sequences, num_objects) and (sequences,).

    The requests that C slots answer are the sum over depths below C. compulsory_free: a first use counts by the number
    of objects used before it, that is as a hit while the cache is not full; otherwise as a miss at every size.
    """
    sequences = len(offsets) - 1
    histogram = np.zeros((sequences, num_objects), np.int64)
    asked = np.zeros(sequences, np.int64)
    for sequence in range(sequences):
        for step in range(offsets[sequence], offsets[sequence + 1]):
            for rank in range(depths.shape[1]):
                depth = depths[step, rank]
                if depth < 0:
                    continue
                asked[sequence] += 1
                if depth < num_objects:
                    histogram[sequence, depth] += 1
                elif compulsory_free:
                    histogram[sequence, depth - num_objects] += 1
    return histogram, asked
