"""A cache that evicts the expert of least worth: what policies with a worth per expert share.

Expert e of layer l is object l * E + e. A cache keeps a list of residents per layer, and serves either one layer
(caches of their own) or all of them. Every object has a worth, and the time of its last use, which breaks ties: of
equals the one used longest ago goes. What a step uses has the newest times, so "used before the step" is what may go.

In a shared cache the order of two experts of the same layer never depends on where the forward pass stands: rules that
look at the distance of a layer divide or shift the worth of all its experts alike. So each layer's least worthy
resident is remembered until the layer is touched, and an eviction compares one candidate per layer.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profiler.metrics._stack import compiled

Ids = NDArray[np.int16]
Objects = NDArray[np.int32]
Times = NDArray[np.int64]
Worths = NDArray[np.float64]
Flags = NDArray[np.bool_]
Missing = NDArray[np.uint16]

NOBODY = -1  # no resident may go
UNKNOWN = -2  # the layer was touched since its least worthy resident was looked up
NEVER = -1e300  # worth of what is not used again; below every other


class Cache(NamedTuple):
    """What is on the device.

    place: (objects,) place of each among its layer's residents, -1 = not on the device. residents: (objects,) the first
    held[layer] from layer * E on. held: (layers,). worth, used: (objects,) used = time of the last use, -1 = never.
    least: (layers,) place of the resident that goes first, or NOBODY, or UNKNOWN.
    """

    place: Ids
    residents: Objects
    held: Times
    worth: Worths
    used: Times
    least: Times


@compiled
def empty_cache(layers: int, experts: int) -> Cache:
    """Nothing on the device, and nothing used so far."""
    objects = layers * experts
    return Cache(
        np.full(objects, -1, np.int16),
        np.full(objects, -1, np.int32),
        np.zeros(layers, np.int64),
        np.zeros(objects),
        np.full(objects, -1, np.int64),
        np.full(layers, UNKNOWN, np.int64),
    )


@compiled
def least_worth(
    residents: Objects, worth: Worths, used: Times, base: int, held: int, since: int, horizon: float
) -> int:
    """Place of the resident that goes first, of those used before ``since``; NOBODY if there is none.

    The layer's ``held`` residents begin at ``base``. horizon: worths below it all count as equal.
    """
    best, smallest, oldest = NOBODY, 0.0, np.int64(0)
    for place in range(held):
        item = residents[base + place]
        last = used[item]
        if last >= since:
            continue
        mine = worth[item]
        if mine < horizon:
            mine = NEVER
        if best == NOBODY or mine < smallest or (mine == smallest and last < oldest):
            best, smallest, oldest = place, mine, last
    return best


@compiled
def least_of_all(
    cache: Cache, layer: int, experts: int, since: int, horizon: float, pace: float, gap: Worths, shift: Worths
) -> int:
    """The layer whose least worthy resident goes; NOBODY if nothing may. The step is one of ``layer``.

    An expert of the layer d ahead (0 = this one, in a circle) scores worth / pace / gap[d] + shift[d]; gap and shift
    repeat after as many entries as there are layers.
    """
    layers = len(cache.held)
    chosen, smallest, oldest = NOBODY, 0.0, np.int64(0)
    for other in range(layers):
        place = cache.least[other]
        if place == UNKNOWN or other == layer:
            place = least_worth(
                cache.residents, cache.worth, cache.used, other * experts, cache.held[other], since, horizon
            )
            cache.least[other] = place
        if place == NOBODY:
            continue
        item = cache.residents[other * experts + place]
        mine = cache.worth[item]
        if mine < horizon:
            mine = NEVER
        ahead = other - layer + layers
        score = mine / pace / gap[ahead] + shift[ahead]
        last = cache.used[item]
        if chosen == NOBODY or score < smallest or (score == smallest and last < oldest):
            chosen, smallest, oldest = other, score, last
    return chosen


@compiled
def evict(cache: Cache, layer: int, experts: int, place: int) -> int:
    """Take a resident off the device; return its object."""
    base = layer * experts
    item = cache.residents[base + place]
    cache.held[layer] -= 1
    moved = cache.residents[base + cache.held[layer]]
    cache.residents[base + place] = moved
    cache.place[moved] = place
    cache.place[item] = -1
    cache.least[layer] = UNKNOWN
    return int(item)


@compiled
def admit(cache: Cache, layer: int, experts: int, item: int) -> None:
    """Bring an object onto the device, which has room."""
    cache.residents[layer * experts + cache.held[layer]] = item
    cache.place[item] = cache.held[layer]
    cache.held[layer] += 1
    cache.least[layer] = UNKNOWN


@compiled
def clear(cache: Cache, first: int, last: int, experts: int) -> None:
    """Empty the layers first..last-1, and forget their past."""
    cache.held[first:last] = 0
    cache.least[first:last] = UNKNOWN
    cache.place[first * experts : last * experts] = -1
    cache.worth[first * experts : last * experts] = 0.0
    cache.used[first * experts : last * experts] = -1
