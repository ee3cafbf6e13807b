"""Searches that change one layer step by step, compiled.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

import numpy as np

from profiler.metrics._arrays import FloatArray, IntArray
from profiler.metrics._stack import compiled


@compiled
def swap_experts(
    device: IntArray, load: FloatArray, total: FloatArray, limit: float, pull: FloatArray, pair: FloatArray,
    beside: FloatArray,
) -> float:  # fmt: skip
    """Swap experts of two devices as long as the sum over experts of pull[e, device of e], plus the sum of pair[e, f]
    over pairs on one device, grows and no device gets more than ``limit``; return by how much it grew.

    Pairs of experts are tried in ascending order, again until a round finds none. device (E,) and total (D,) load of
    each device are changed in place. load (E,); pull (E, D); pair (E, E), symmetric, 0 on the diagonal; beside (E, D):
    sum of pair[e, f] over the experts f of a device, kept up to date.
    """
    experts = len(device)
    grown = 0.0
    improved = True
    while improved:
        improved = False
        for one in range(experts):
            for other in range(one + 1, experts):
                a, b = device[one], device[other]
                if a == b:
                    continue
                gain = pull[one, b] - pull[one, a] + pull[other, a] - pull[other, b]
                gain += beside[one, b] - beside[one, a] + beside[other, a] - beside[other, b] - 2.0 * pair[one, other]
                if gain <= 1e-9:
                    continue
                change = load[other] - load[one]
                if (total[a] + change > limit and change > 0) or (total[b] - change > limit and change < 0):
                    continue
                device[one], device[other] = b, a
                total[a] += change
                total[b] -= change
                for expert in range(experts):
                    beside[expert, a] += pair[expert, other] - pair[expert, one]
                    beside[expert, b] += pair[expert, one] - pair[expert, other]
                grown += gain
                improved = True
    return grown


@compiled
def add_replicas(load: FloatArray, holds: IntArray, free: IntArray) -> None:
    """Give the busiest device relief, again and again: one of its experts goes to one more device, where the busiest
    device afterwards has least to do; until no replica helps or no device has room.

    An expert's load is shared evenly by the devices that hold it. load (E,); holds (D, E), 1 = held, and free (D,) room
    for replicas are changed in place. Of equally good ones, the smallest expert and device are taken.
    """
    devices, experts = holds.shape
    count = holds.sum(axis=0)
    total = np.zeros(devices)
    for device in range(devices):
        for expert in range(experts):
            if holds[device, expert]:
                total[device] += load[expert] / count[expert]
    while True:
        busiest = np.argmax(total)
        least, chosen, target = total[busiest] * (1.0 - 1e-12), -1, -1
        for expert in range(experts):
            if not holds[busiest, expert] or load[expert] <= 0:
                continue
            less = load[expert] / count[expert] - load[expert] / (count[expert] + 1)
            for device in range(devices):
                if free[device] < 1 or holds[device, expert]:
                    continue
                most = total[device] + load[expert] / (count[expert] + 1)
                for other in range(devices):
                    if other != device:
                        most = max(most, total[other] - less * holds[other, expert])
                if most < least:
                    least, chosen, target = most, expert, device
        if chosen < 0:
            return
        less = load[chosen] / count[chosen] - load[chosen] / (count[chosen] + 1)
        for other in range(devices):
            total[other] -= less * holds[other, chosen]
        count[chosen] += 1
        total[target] += load[chosen] / count[chosen]
        holds[target, chosen] = 1
        free[target] -= 1


@compiled
def spread_replicas(load: FloatArray, holds: IntArray, free: IntArray) -> None:
    """As many replicas as there is room for: one more for the expert whose replicas carry most each, as EPLB chooses;
    then, those that carry most first, each to the device with least to do that has room and does not hold the expert.

    What fits nowhere is left out. Arguments as of :func:`add_replicas`.
    """
    devices, experts = holds.shape
    count = np.ones(experts, np.int64)
    for _ in range(free.sum()):
        chosen = -1
        for expert in range(experts):
            if count[expert] < devices and (chosen < 0 or load[expert] * count[chosen] > load[chosen] * count[expert]):
                chosen = expert
        if chosen < 0:
            break
        count[chosen] += 1
    each = load / count
    total = np.zeros(devices)
    for device in range(devices):
        for expert in range(experts):
            if holds[device, expert]:
                total[device] += each[expert]
    for expert in np.argsort(-each, kind="mergesort"):
        for _ in range(count[expert] - 1):
            target = -1
            for device in range(devices):
                if free[device] > 0 and not holds[device, expert] and (target < 0 or total[device] < total[target]):
                    target = device
            if target >= 0 and load[expert] > 0:
                holds[target, expert] = 1
                total[target] += each[expert]
                free[target] -= 1
