"""LPT with swaps against all partitions, and against the bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from planner.place.lpt import least_maximum, lpt, packed, swapped
from planner.place.rebalance import balanced_packing


def _best(weight: np.ndarray, bins: int) -> float:
    """The least largest bin of all ways to fill bins equally."""
    size = len(weight) // bins

    def fill(left: frozenset[int], bins_left: int) -> float:
        if not bins_left:
            return 0.0
        first = min(left)
        return min(
            max(weight[[first, *others]].sum(), fill(left - {first, *others}, bins_left - 1))
            for others in itertools.combinations(sorted(left - {first}), size - 1)
        )

    return fill(frozenset(range(len(weight))), bins)


@pytest.mark.parametrize("seed", range(6))
def test_near_the_best_of_all_partitions(seed: int) -> None:
    weight = np.random.default_rng(seed).lognormal(0, 1, 9)
    best = _best(weight, 3)
    found = np.bincount(packed(weight[None], 3)[0], weights=weight).max()
    assert least_maximum(weight, 3) <= best + 1e-12 <= found + 2e-12
    assert found <= best * 1.06  # the worst of these is 1.05 above it


@pytest.mark.parametrize(("experts", "gap"), [(128, 1e-3), (256, 1e-4)])
def test_close_to_the_bound_with_many_experts(experts: int, gap: float) -> None:
    for seed in range(5):
        weight = np.random.default_rng(seed).lognormal(0, 0.8, (1, experts))
        device = packed(weight, 8)[0]
        assert (np.bincount(device) == experts // 8).all()
        largest = np.bincount(device, weights=weight[0]).max()
        assert largest <= least_maximum(weight[0], 8) * (1 + gap)


def test_swaps_never_make_it_worse_and_end_where_no_swap_helps() -> None:
    rng = np.random.default_rng(3)
    weight = rng.lognormal(0, 1, (1, 24))
    start, _ = balanced_packing(weight.astype(np.float32), 4)
    after = swapped(weight[0], start[0], 4)
    total = np.bincount(after, weights=weight[0])
    assert total.max() <= np.bincount(start[0], weights=weight[0]).max()
    fullest = int(total.argmax())
    for one, other in itertools.product(np.flatnonzero(after == fullest), np.flatnonzero(after != fullest)):
        change = weight[0, one] - weight[0, other]
        assert max(total[fullest] - change, total[after[other]] + change) >= total.max() * (1 - 1e-9)


def test_one_heavy_expert_is_what_only_replicas_mend() -> None:
    load = np.ones((1, 16))
    load[0, 3] = 40
    alone, more = lpt(load=load, devices=4), lpt(load=load, devices=4, redundant=4)
    assert alone.load(load).max() == 43  # the heavy one with three others
    assert more.counts()[0, 3] == 5 and more.load(load).max() < 20
    assert (more.copies().sum(-1) == 5).all()
