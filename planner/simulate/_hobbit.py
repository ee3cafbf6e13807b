"""HOBBIT's two caches: experts in full and in a narrower version, evicted by one priority.

This module imports numba; import it inside the function that needs it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.simulate._cache import (
    NOBODY,
    UNKNOWN,
    Cache,
    Flags,
    Ids,
    Missing,
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

Forms = NDArray[np.int8]

FULL, NARROW, SKIPPED = 0, 1, 2


class Priority(NamedTuple):
    """Weights of the last use, of the uses and of the uses in full, and what each layer ahead adds.

    shift: (2 * layers,) see :func:`_cache.least_of_all`; of no effect in caches per layer.
    """

    recency: float
    frequency: float
    full: float
    shift: Worths


@compiled
def forms_of(weights: NDArray[np.float32], ids: Ids, first: float, second: float) -> Forms:
    """(layers, passes, width) the version in which a missing expert is loaded, by the gate weight ranked before it."""
    layers, passes, width = ids.shape
    forms = np.zeros((layers, passes, width), np.int8)
    for layer in range(layers):
        for at in range(passes):
            total, before = 0.0, 0.0
            for rank in range(width):
                if ids[layer, at, rank] >= 0:
                    total += weights[layer, at, rank]
            for rank in range(width):
                if ids[layer, at, rank] < 0:
                    continue
                share = before / total if total > 0 else 0.0
                forms[layer, at, rank] = FULL if share <= first else NARROW if share <= second else SKIPPED
                before += weights[layer, at, rank]
    return forms


@compiled
def replay(
    ids: Ids, forms: Forms, starts: Flags, experts: int, rooms: Times, narrow_rooms: Times, shared: bool, cold: bool,
    priority: Priority, missing: Missing, narrow: Missing, skipped: Missing, first: int, there: Flags,
) -> None:  # fmt: skip
    """Write missing experts of each step into ``missing`` (layers, passes), and which of them are loaded in the narrow
    version or left out into ``narrow`` and ``skipped``.

    forms: (layers, passes, width) from :func:`forms_of`; of size 0 = all in full. rooms, narrow_rooms: (layers,) slots,
    of a shared cache [0]. starts, first, there: as :func:`_replay.replay`.
    """
    layers, passes, width = ids.shape
    cache, second = empty_cache(layers, experts), empty_cache(layers, experts)
    second = Cache(second.place, second.residents, second.held, cache.worth, cache.used, second.least)  # one record
    frequency, full = np.zeros(layers * experts), np.zeros(layers * experts)
    token = np.zeros(layers, np.int64)
    gap, mixed = np.ones(2 * layers), forms.size > 0
    asks = np.zeros(width, np.int8)
    for outer in range(passes if shared else layers):
        for inner in range(layers if shared else passes):
            layer, at = (inner, outer) if shared else (outer, inner)
            if starts[at] and (layer == 0 or not shared):
                last = layers if shared else layer + 1
                part = slice(layer * experts, last * experts)
                if cold:
                    clear(cache, layer, last, experts)
                    clear(second, layer, last, experts)
                cache.worth[part], frequency[part], full[part], token[layer:last] = 0.0, 0.0, 0.0, 0
                cache.least[layer:last] = UNKNOWN
                second.least[layer:last] = UNKNOWN
            token[layer] += 1
            now, base = (np.int64(at) * layers + layer) * width, layer * experts
            for rank in range(width):
                asks[rank] = -1
                if ids[layer, at, rank] < 0:
                    continue
                item = base + ids[layer, at, rank]
                form = forms[layer, at, rank] if mixed else FULL
                whole = cache.place[item] >= 0
                hit = whole or (form != FULL and second.place[item] >= 0)
                if not hit:
                    missing[layer, at] += 1
                    narrow[layer, at] += form == NARROW
                    skipped[layer, at] += form == SKIPPED
                    asks[rank] = form
                if first <= at < first + there.shape[1]:
                    there[layer, at - first, rank] = hit
                cache.used[item] = now + rank
                frequency[item] += 1.0
                full[item] += whole or form == FULL
                cache.worth[item] = (
                    priority.recency * token[layer] + priority.frequency * frequency[item] + priority.full * full[item]
                )
            cache.least[layer] = UNKNOWN
            second.least[layer] = UNKNOWN
            if missing[layer, at] > skipped[layer, at]:
                pace = float(token[layer])
                for rank in range(width):
                    if asks[rank] == FULL:
                        _load(cache, layer, experts, base + ids[layer, at, rank], rooms, shared, now, pace, gap,
                              priority.shift)  # fmt: skip
                    elif asks[rank] == NARROW:
                        _load(second, layer, experts, base + ids[layer, at, rank], narrow_rooms, shared, now, pace,
                              gap, priority.shift)  # fmt: skip
                cache.least[layer] = UNKNOWN
                second.least[layer] = UNKNOWN


@compiled
def _load(
    cache: Cache, layer: int, experts: int, item: int, rooms: Times, shared: bool, now: int, pace: float,
    gap: Worths, shift: Worths,
) -> None:  # fmt: skip
    """Bring an expert onto the device; the one of least priority makes room, of those that the step does not need."""
    room = rooms[0 if shared else layer]
    held = cache.held.sum() if shared else cache.held[layer]
    if held >= room:
        origin, place = layer, NOBODY
        if shared:
            origin = least_of_all(cache, layer, experts, now, -np.inf, pace, gap, shift)
            place = cache.least[origin] if origin != NOBODY else NOBODY
        else:
            place = least_worth(
                cache.residents, cache.worth, cache.used, layer * experts, cache.held[layer], now, -np.inf
            )
        if place == NOBODY:
            return
        evict(cache, origin, experts, place)
    admit(cache, layer, experts, item)
