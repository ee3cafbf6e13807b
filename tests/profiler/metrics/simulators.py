"""Slow, obvious versions of what the metrics compute: one cache of one size, one window at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Stream = list[list[int]]


def random_selections(
    seed: int,
    *,
    layers: int = 2,
    sequences: int = 3,
    tokens: int = 14,
    experts: int = 6,
    k: int = 2,
    ragged: bool = True,
) -> NDArray[np.int64]:
    """Selections with sequences of different lengths and tokens that use fewer than k experts, or none in one layer."""
    generator = np.random.default_rng(seed)
    skew = generator.dirichlet(np.ones(experts))
    selections = np.full((layers, sequences, tokens, k), -1)
    for layer, sequence in np.ndindex(layers, sequences):
        for token in range(tokens):
            selections[layer, sequence, token] = generator.choice(
                experts, k, replace=False, p=0.8 * skew + 0.2 / experts
            )
    if ragged:
        fewer = generator.integers(0, k + 1, size=selections.shape[:3])
        fewer = np.where(generator.random(fewer.shape) < 0.7, k, fewer)
        selections[np.arange(k) >= fewer[..., None]] = -1
        lengths = generator.integers(1, tokens + 1, size=sequences)
        lengths[0] = tokens
        selections[:, np.arange(tokens) >= lengths[:, None]] = -1
        selections[0, 0, -1, 0] = max(selections[0, 0, -1, 0], 0)  # the longest sequence really is that long
    return selections


def real_lengths(selections: NDArray[Any]) -> list[int]:
    used = (selections >= 0).any(axis=(0, 3))
    return [int(np.flatnonzero(one).max()) + 1 if one.any() else 0 for one in used]


def windows(selections: NDArray[Any], layer: int, expert: int, m: int, first: int = 0) -> list[int]:
    """f of every window of one expert, one window after another."""
    result = []
    for sequence, length in enumerate(real_lengths(selections)):
        uses = [int(expert in selections[layer, sequence, token]) for token in range(first, length)]
        result += [sum(uses[start : start + m]) for start in range(len(uses) - m + 1)]
    return result


def best_f1(values: Sequence[int], m: int) -> tuple[float, float, int]:
    """SRP, router size and threshold of windows, by trying every threshold."""
    needed = sum(values)
    best = (0.0, 0.0, 0)
    for threshold in range(m + 1):
        hit = sum(f for f in values if f >= threshold)
        kept = m * sum(f >= threshold for f in values)
        f1 = 2 * hit / max(1, kept + needed)
        if f1 > best[0]:
            best = (f1, kept / needed if needed else 0.0, threshold)
    return best


def streams(selections: NDArray[Any], experts: int, *, shared: bool, by_layer: bool) -> list[list[Stream]]:
    """Requests as [cache][sequence][step][rank]; ``by_layer``: a shared cache takes one layer per step."""
    layers = len(selections)

    def step(layer: int, sequence: int, token: int) -> list[int]:
        return [int(e) + (layer * experts if shared else 0) for e in selections[layer, sequence, token] if e >= 0]

    lengths = list(enumerate(real_lengths(selections)))
    if not shared:
        return [[[step(layer, s, t) for t in range(n)] for s, n in lengths] for layer in range(layers)]
    if by_layer:
        return [[[step(layer, s, t) for t in range(n) for layer in range(layers)] for s, n in lengths]]
    return [[[sum((step(layer, s, t) for layer in range(layers)), []) for t in range(n)] for s, n in lengths]]


def cache_hits(stream: Stream, slots: int, policy: str, window: int, *, pinned: bool, free: bool) -> int:
    """Hits of one sequence in one cache; ``window``: steps, the present one included, that SCH counts."""
    accesses = [(index, item) for index, step in enumerate(stream) for item in step]
    cache: set[int] = set()
    seen: set[int] = set()
    served: list[int] = []
    hits = 0

    def worth(item: int, index: int) -> tuple[float, float]:
        now = len(served)
        last = max((time for time, other in enumerate(served) if other == item), default=-1)
        if policy == "lru":
            return (0, last)
        if policy == "lfu":
            return (served.count(item), last)
        ahead = [time for time in range(now, len(accesses)) if accesses[time][1] == item]
        if policy == "sch":
            return (sum(accesses[time][0] < index + window for time in ahead), last)
        return (-ahead[0], 0) if ahead else (-np.inf, -item)

    for index, step in enumerate(stream):
        for item in step:
            if item in cache:
                hits += 1
            elif item not in seen:
                hits += free and len(seen) < slots
                seen.add(item)
        for item in step:
            if item not in cache:
                if len(cache) == slots:
                    cache.remove(min(cache, key=lambda one: (pinned and one in step, worth(one, index))))
                cache.add(item)
            served.append(item)
    return hits
