"""Slow, obvious set caches: one cache of one size, and the best that any could do, by trying everything."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import combinations

import numpy as np

from planner.simulate.workload import Workload, decode

Steps = list[list[int]]


def random_workload(
    seed: int,
    *,
    layers: int = 2,
    sequences: int = 3,
    tokens: int = 9,
    experts: int = 6,
    k: int = 2,
    ragged: bool = True,
) -> Workload:
    """Requests of different lengths; tokens that use fewer than k experts."""
    generator = np.random.default_rng(seed)
    skew = generator.dirichlet(np.ones(experts), size=layers)
    ids = np.full((layers, sequences, tokens, k), -1)
    for at in np.ndindex(layers, sequences, tokens):
        ids[at] = generator.choice(experts, k, replace=False, p=0.7 * skew[at[0]] + 0.3 / experts)
    if ragged:
        fewer = np.where(generator.random(ids.shape[:3]) < 0.7, k, generator.integers(1, k + 1, ids.shape[:3]))
        ids[np.arange(k) >= fewer[..., None]] = -1
        lengths = generator.integers(1, tokens + 1, size=sequences)
        ids[:, np.arange(tokens) >= lengths[:, None]] = -1
    weights = np.sort(generator.random(ids.shape), axis=-1)[..., ::-1]
    domains = [f"d{one % 2}" for one in range(sequences)]
    return decode(selections=ids, num_experts=experts, weights=weights, domains=domains)


def steps_of(workload: Workload, *, shared: bool) -> list[list[Steps]]:
    """[cache][request] -> steps, each a list of objects in the order of the workload."""
    ids, experts = workload.ids, workload.num_experts
    spans = [range(workload.offsets[one], workload.offsets[one + 1]) for one in range(workload.num_requests)]
    every = range(workload.num_layers)

    def step(layer: int, at: int) -> list[int]:
        return [int(one) + (layer * experts if shared else 0) for one in ids[layer, at] if one >= 0]

    if shared:
        return [[[step(layer, at) for at in span for layer in every] for span in spans]]
    return [[[step(layer, at) for at in span] for span in spans] for layer in every]


def hits_of(steps: Steps, slots: int, policy: str, *, segment: int = 0) -> list[int]:
    """Hits per step of one pinned cache; ``segment``: steps after this one whose uses count (sch)."""
    resident: set[int] = set()
    last: dict[int, tuple[int, int]] = {}
    uses: dict[int, int] = {}
    hits = []

    def worth(item: int, now: int) -> tuple[float, ...]:
        ahead = [at for at in range(now + 1, len(steps)) if item in steps[at]]
        if policy == "lru":
            return last[item]
        if policy == "lfu":
            return (uses[item], *last[item])
        if policy == "sch":
            return (sum(at <= now + segment for at in ahead), *last[item])
        return (-ahead[0] if ahead else -np.inf, -item)

    for now, step in enumerate(steps):
        hits.append(len(resident & set(step)))
        for rank, item in enumerate(step):
            last[item] = (now, rank)
            uses[item] = uses.get(item, 0) + 1
        for item in step:  # one after another, as a real cache would, evicting before it loads
            if item not in resident:
                others = [one for one in resident if one not in step]
                if len(resident) == slots:
                    resident.remove(min(others, key=lambda one: worth(one, now)))
                resident.add(item)
    return hits


def hits_flat(steps: Steps, slots: int) -> list[int]:
    """Hits per step of Belady's rule on single uses."""
    flat = [item for step in steps for item in step]
    resident: set[int] = set()
    found = []
    for now, item in enumerate(flat):
        found.append(item in resident)
        if item not in resident:
            if len(resident) == slots:
                later = {one: flat.index(one, now + 1) if one in flat[now + 1 :] else np.inf for one in resident}
                resident.remove(max(resident, key=lambda one: (later[one], one)))
            resident.add(item)
    ends = np.cumsum([0, *map(len, steps)])
    return [sum(found[ends[at] : ends[at + 1]]) for at in range(len(steps))]


def fewest_misses(steps: Steps, slots: int, *, bypass: bool) -> int:
    """The fewest misses of any cache, by exhaustive search over what it keeps after every step."""
    needs = [frozenset(step) for step in steps]

    @cache
    def best(at: int, resident: frozenset[int]) -> int:
        if at == len(needs):
            return 0
        need = needs[at]
        missing = len(need - resident)
        return missing + min(best(at + 1, kept) for kept in after(resident, need))

    def after(resident: frozenset[int], need: frozenset[int]) -> Iterable[frozenset[int]]:
        there = resident | need
        if bypass:
            yield from (frozenset(kept) for kept in combinations(sorted(there), min(slots, len(there))))
        else:
            others = sorted(resident - need)
            room = min(slots - len(need), len(others))
            yield from (need | frozenset(kept) for kept in combinations(others, room))

    return best(0, frozenset())
