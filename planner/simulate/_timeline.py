"""The clock of a device that computes while one channel copies experts to it.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiler.metrics._arrays import FloatArray, IntArray
from profiler.metrics._stack import compiled

Ids = NDArray[np.int16]
Counts = NDArray[np.int64]


class Fallback(IntEnum):
    """Where an expert runs that is not on the device."""

    LINK = 0  # on the device, when it has been copied
    FASTER = 1  # on the CPU if that takes less time than copying it and running it on the device
    CPU = 2  # always on the CPU
    SPLIT = 3  # as many on either as ends the step first


class Total(IntEnum):
    """Places in the array of sums that the kernels fill."""

    LOADS = 0  # copies that steps asked for
    PREFETCHES = 1  # copies that predictions asked for
    LINK_SECONDS = 2  # of copies over the link
    DISK_SECONDS = 3  # of reads
    BYTES = 4  # over the link
    WASTED_BYTES = 5  # of prefetches whose expert was evicted, or left at the end, without a use
    CPU_EXPERTS = 6  # experts that the CPU ran
    STALLED = 7  # steps in which the device had nothing to do for a while
    HITS = 8  # experts that were there, or on their way, when the router answered
    LATE = 9  # of those, the ones still on their way
    DROPPED = 10  # prefetches that were taken back before they began
    STAGED = 11  # loads that found no slot: they pass through a buffer and are not kept


@compiled
def _step(
    ready: int, loads: IntArray, reads: IntArray, on_link: int, copy: FloatArray, read: FloatArray,
    expert: float, cpu: float, overlap: bool,
) -> tuple[float, float, float, float]:  # fmt: skip
    """Seconds of one step after its router's answer, of which the device waits, and that link and disk are busy.

    ready: experts on the device. loads, reads (2,): missing ones in host memory, and on disk, in full and in narrow
    width; they come in this order. The first ``on_link`` of them are copied and run on the device, the others run on
    the CPU. copy, read (2,): seconds of one copy and one read of either width.
    """
    device, waited = (ready * expert, 0.0) if overlap else (0.0, 0.0)
    link = disk = host = last = 0.0
    link_busy = 0.0
    place = 0
    for tier in range(2):
        for width in range(2):
            for _ in range(loads[width] if tier == 0 else reads[width]):
                if tier == 1:
                    disk += read[width]
                there = disk if tier == 1 else 0.0
                if place < on_link:
                    link = max(link, there) + copy[width]
                    link_busy += copy[width]
                    last = link
                    if overlap:
                        waited += max(0.0, link - device)
                        device = max(link, device) + expert
                else:
                    host = max(host, there) + cpu
                place += 1
    if not overlap:
        waited = last
        device = last + (ready + min(on_link, place)) * expert
    waited += max(0.0, host - device)
    return max(device, host), waited, link_busy, disk


@compiled
def on_demand(
    needed: Counts, missing: Counts, narrow: Counts, skipped: Counts, from_disk: Counts, dense: FloatArray,
    expert: FloatArray, cpu: FloatArray, size: FloatArray, copy: FloatArray, read: FloatArray, fallback: int,
    overlap: bool, seconds: FloatArray, waiting: FloatArray, totals: FloatArray,
) -> None:  # fmt: skip
    """Fill seconds and waiting (layers, passes) of every step, and the totals.

    needed, missing, narrow, skipped, from_disk, dense, expert, cpu: (layers, passes). size, copy, read: (layers, 2)
    bytes, seconds over the link and seconds from disk, in full and in narrow width.
    """
    loads, reads = np.zeros(2, np.int64), np.zeros(2, np.int64)
    layers, passes = needed.shape
    for layer in range(layers):
        for at in range(passes):
            ready = needed[layer, at] - missing[layer, at]
            slim = narrow[layer, at]
            full = missing[layer, at] - slim - skipped[layer, at]
            reads[0] = min(full, from_disk[layer, at])
            reads[1] = min(slim, from_disk[layer, at] - reads[0])
            loads[0], loads[1] = full - reads[0], slim - reads[1]
            wanted = full + slim
            unit, host = expert[layer, at], cpu[layer, at]
            first = last = wanted
            if fallback == Fallback.CPU or (fallback == Fallback.FASTER and host < copy[layer, 0] + unit):
                first = last = 0
            elif fallback == Fallback.SPLIT:
                first = 0
            best = (np.inf, 0.0, 0.0, 0.0)
            chosen = 0
            for on_link in range(last, first - 1, -1):
                found = _step(ready, loads, reads, on_link, copy[layer], read[layer], unit, host, overlap)
                if found[0] < best[0]:
                    best, chosen = found, on_link
            seconds[layer, at] = dense[layer, at] + best[0]
            waiting[layer, at] = best[1]
            totals[Total.LOADS] += chosen
            totals[Total.CPU_EXPERTS] += wanted - chosen
            totals[Total.LINK_SECONDS] += best[2]
            totals[Total.DISK_SECONDS] += best[3]
            totals[Total.STALLED] += best[1] > 0
            totals[Total.HITS] += ready
            full_copies = min(chosen, loads[0]) + min(max(chosen - loads[0] - loads[1], 0), reads[0])
            totals[Total.BYTES] += full_copies * size[layer, 0] + (chosen - full_copies) * size[layer, 1]


@compiled
def _take(older: IntArray, newer: IntArray, item: int) -> None:
    newer[older[item]] = newer[item]
    older[newer[item]] = older[item]


@compiled
def _put(older: IntArray, newer: IntArray, end: int, item: int) -> None:
    """As the newest of the list whose two ends meet at ``end``."""
    last = older[end]
    newer[last] = item
    older[item] = last
    newer[item] = end
    older[end] = item


@compiled
def _oldest(
    newer: IntArray, end: int, held_for: IntArray, first: int, needed_by: IntArray, step: int, arrival: FloatArray,
    now: float,
) -> int:  # fmt: skip
    """The object used longest ago that no step from ``first`` on holds, that ``step`` does not need, and whose copy is
    not running; -1 = none."""
    item = newer[end]
    while item != end:
        if held_for[item] < first and needed_by[item] != step and arrival[item] <= now:
            return int(item)
        item = newer[item]
    return -1


@compiled
def prefetched(
    ids: Ids, predicted: Ids, slots: IntArray, ahead: int, dense: FloatArray, expert: FloatArray, tail: FloatArray,
    size: FloatArray, copy: FloatArray, overlap: bool, seconds: FloatArray, waiting: FloatArray, missing: NDArray[Any],
    totals: FloatArray,
) -> None:  # fmt: skip
    """Fill seconds, waiting and missing (layers, passes) of every step, and the totals.

    ids, predicted: (layers, passes, width), -1 = none. slots: (1,) of one cache for all layers, or (layers,).
    dense, expert: (layers, passes). tail: (passes,). size, copy: (layers, experts) bytes and seconds of one copy.
    The rules are those of :func:`planner.simulate.timeline.prefetching`.
    """
    layers, passes, width = ids.shape
    experts, caches = copy.shape[1], len(slots)
    objects = layers * experts
    older, newer = np.empty(objects + caches, np.int64), np.empty(objects + caches, np.int64)
    for cache in range(caches):
        older[objects + cache] = newer[objects + cache] = objects + cache
    held = np.zeros(caches, np.int64)
    resident, unused = np.zeros(objects, np.bool_), np.zeros(objects, np.bool_)
    arrival = np.zeros(objects, np.float64)
    held_for, needed_by = np.full(objects, -1, np.int64), np.full(objects, -1, np.int64)
    waiting_for = np.full(objects, -1, np.int64)  # the step that a queued prefetch is for
    room = (ahead + 1) * predicted.shape[2] + 1
    queue, targets, issued = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.float64)
    head = behind = 0
    now = channel = 0.0
    for at in range(passes):
        for layer in range(layers):
            step = at * layers + layer
            before, router = now, now + dense[layer, at]

            while head < behind:  # prefetches that begin before the router answers
                item = queue[head % room]
                target = targets[head % room]
                begin = max(channel, issued[head % room])
                if waiting_for[item] == target and begin >= router:
                    break
                head += 1
                if waiting_for[item] != target:
                    continue
                waiting_for[item] = -1
                cache = item // experts if caches > 1 else 0
                if held[cache] >= slots[cache]:
                    victim = _oldest(newer, objects + cache, held_for, step, needed_by, step - 1, arrival, begin)
                    if victim < 0:
                        totals[Total.DROPPED] += 1
                        continue
                    _take(older, newer, victim)
                    resident[victim] = False
                    if unused[victim]:
                        totals[Total.WASTED_BYTES] += size[victim // experts, victim % experts]
                    held[cache] -= 1
                held[cache] += 1
                _put(older, newer, objects + cache, item)
                resident[item] = unused[item] = True
                held_for[item] = target
                channel = begin + copy[item // experts, item % experts]
                arrival[item] = channel
                totals[Total.PREFETCHES] += 1
                totals[Total.LINK_SECONDS] += copy[item // experts, item % experts]
                totals[Total.BYTES] += size[item // experts, item % experts]

            cache = layer if caches > 1 else 0
            end = objects + cache
            unit = expert[layer, at]
            count = ready = 0
            for rank in range(width):
                if ids[layer, at, rank] >= 0:
                    item = layer * experts + ids[layer, at, rank]
                    needed_by[item] = step
                    count += 1
                    ready += resident[item] and arrival[item] <= router
            while head < behind and targets[head % room] <= step:  # not begun in time
                item = queue[head % room]
                if waiting_for[item] == targets[head % room]:
                    waiting_for[item] = -1
                    totals[Total.DROPPED] += needed_by[item] != step
                head += 1
            device = router + ready * unit if overlap else router
            waited, last = 0.0, router
            for turn in range(2):  # the copy that is running first, then those that the step asks for
                for rank in range(width):
                    if ids[layer, at, rank] < 0:
                        continue
                    item = layer * experts + ids[layer, at, rank]
                    if turn == 0:
                        if not resident[item] or arrival[item] <= router:
                            continue
                        totals[Total.LATE] += 1
                        last = arrival[item]
                    elif resident[item]:
                        _take(older, newer, item)
                        _put(older, newer, end, item)
                        unused[item] = False
                        totals[Total.HITS] += 1
                        continue
                    else:
                        channel = max(channel, router) + copy[layer, item % experts]
                        last = channel
                        missing[layer, at] += 1
                        totals[Total.LOADS] += 1
                        totals[Total.LINK_SECONDS] += copy[layer, item % experts]
                        totals[Total.BYTES] += size[layer, item % experts]
                        victim = -1
                        if held[cache] >= slots[cache]:
                            victim = _oldest(newer, end, held_for, step + 1, needed_by, step, arrival, router)
                            if victim < 0:
                                victim = _oldest(
                                    newer, end, held_for, passes * layers, needed_by, step, arrival, router
                                )
                        if victim >= 0:
                            _take(older, newer, victim)
                            resident[victim] = False
                            if unused[victim]:
                                totals[Total.WASTED_BYTES] += size[victim // experts, victim % experts]
                            held[cache] -= 1
                        if held[cache] < slots[cache]:
                            held[cache] += 1
                            _put(older, newer, end, item)
                            resident[item], unused[item], arrival[item] = True, False, channel
                        else:
                            totals[Total.STAGED] += 1
                    if overlap:
                        waited += max(0.0, last - device)
                        device = max(last, device) + unit
            if not overlap:
                waited, device = last - router, last + count * unit
            now = device
            seconds[layer, at], waiting[layer, at] = now - before, waited
            totals[Total.STALLED] += waited > 0

            target = step + ahead
            if target < passes * layers:
                row = predicted[target % layers, target // layers]
                for rank in range(len(row)):
                    if row[rank] < 0:
                        continue
                    item = (target % layers) * experts + row[rank]
                    if resident[item]:
                        held_for[item] = max(held_for[item], target)
                    elif waiting_for[item] < 0:
                        waiting_for[item] = target
                        queue[behind % room], targets[behind % room], issued[behind % room] = item, target, router
                        behind += 1
        now += tail[at]
    for item in range(objects):
        if unused[item] and resident[item]:
            totals[Total.WASTED_BYTES] += size[item // experts, item % experts]
