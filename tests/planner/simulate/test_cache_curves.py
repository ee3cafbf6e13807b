"""Curves of all sizes against single caches in plain Python, exhaustive search, and profiler.metrics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from set_caches import fewest_misses, hits_flat, hits_of, random_workload, steps_of

from moescope.errors import PlanError
from planner.simulate._curves import lru_depths
from planner.simulate.bounds import BOUNDS, bounds
from planner.simulate.curves import (
    StackPolicy,
    curve,
    largest_steps,
    overflow_steps,
    popularity,
    static_bound,
)
from planner.simulate.replay import replay
from planner.simulate.workload import batched, decode
from profiler.metrics._stack import Policy, request_depths
from profiler.metrics.cache_hit_rate import hit_rate_curve

POLICIES: list[tuple[StackPolicy, int | None]] = [("lru", None), ("lfu", None), ("sch", 1), ("sch", 4)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["lru", "lfu", "sch", "min_set", "min_flat"])
def test_equals_single_caches(seed: int, shared: bool, warm: bool, size: int, name: str) -> None:
    work = batched(random_workload(seed, k=1 + seed % 3), size=size)
    length = 2 if name == "sch" else None
    segment = 2 * (work.num_layers if shared else 1)
    options = {"shared": shared, "warm": warm}
    if name.startswith("min"):
        found = bounds(work, names=[name], **options)[name]  # type: ignore[list-item]
    else:
        found = curve(work, policy=name, segment_length=length, **options)  # type: ignore[arg-type]
    for at, requests in enumerate(steps_of(work, shared=shared)):
        np.testing.assert_array_equal(found.uses[:, at], [sum(map(len, steps)) for steps in requests])
        runs = [[step for steps in requests for step in steps]] if warm else requests
        owners = np.repeat(np.arange(len(requests)), [len(steps) for steps in requests])
        least = 1 if name == "min_flat" else max(len(step) for run in runs for step in run)
        assert np.isnan(found.hits[:, at, : least - 1]).all()
        for slots in range(least, found.hits.shape[2] + 1):
            one = hits_flat if name == "min_flat" else None
            hits = [one(run, slots) if one else hits_of(run, slots, name, segment=segment) for run in runs]
            expected = np.bincount(owners, weights=np.concatenate(hits), minlength=len(requests))
            np.testing.assert_array_equal(found.hits[:, at, slots - 1], expected, err_msg=f"{slots} slots")


@pytest.mark.parametrize("k", [1, 2, 3])
def test_lru_by_last_uses_equals_lru_by_walking(k: int) -> None:
    # uncompiled, so that a step too many before last uses are renumbered is an error and no silent write
    work = random_workload(k, layers=1, sequences=4, tokens=60, experts=5, k=k, ragged=False)
    requests = np.ascontiguousarray(work.ids[0], dtype=np.int32)
    found, expected = np.empty_like(requests), np.empty_like(requests)
    lru_depths.py_func(requests, work.offsets[[0, 2, 4]], 5, found)  # type: ignore[attr-defined]
    request_depths(requests, work.offsets[[0, 2, 4]], 5, int(Policy.LRU), 1, True, expected)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", ["lru", "lfu", "min_set", "static"])
def test_equals_replays_of_single_sizes(shared: bool, warm: bool, name: str) -> None:
    train, work = random_workload(1, k=3, experts=7), batched(random_workload(2, k=3, experts=7, tokens=30), size=2)
    options = {"shared": shared, "warm": warm}
    if name == "static":
        found = popularity(train, work, shared=shared)
    elif name == "min_set":
        found = bounds(work, names=["min_set"], **options)["min_set"]  # type: ignore[arg-type]
    else:
        found = curve(work, policy=name, **options)  # type: ignore[arg-type]
    least = int(largest_steps(work).max())
    for slots in range(least, found.hits.shape[2] + 1):
        single = replay(work, policy=name, slots=slots, train=train if name == "static" else None, **options)
        np.testing.assert_array_equal(single.hits.sum(axis=1), found.hits[..., slots - 1].sum(axis=1))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), experts=st.integers(3, 7), k=st.integers(1, 3), tokens=st.integers(2, 12))
def test_bounds_equal_exhaustive_search(seed: int, experts: int, k: int, tokens: int) -> None:
    work = random_workload(seed, layers=1, sequences=1, tokens=tokens, experts=experts, k=min(k, experts))
    found = bounds(work)
    steps = steps_of(work, shared=False)[0][0]
    total = sum(map(len, steps))
    largest = int(largest_steps(work)[0])
    for slots in range(1, min(experts, 5) + 1):
        bypass = fewest_misses(steps, slots, bypass=True)
        assert total - found["min_bypass"].hits[0, 0, slots - 1] == bypass
        if slots >= largest:
            assert total - found["min_set"].hits[0, 0, slots - 1] == fewest_misses(steps, slots, bypass=False)
    assert fewest_misses(steps, 0, bypass=True) == total  # no slots are legal, and hit nothing


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), k=st.integers(1, 3), size=st.integers(1, 3), shared=st.booleans(), warm=st.booleans()
)
def test_order_of_bounds_and_policies(seed: int, k: int, size: int, shared: bool, warm: bool) -> None:
    work = batched(random_workload(seed, k=k), size=size)
    found = {name: one.hits for name, one in bounds(work, shared=shared, warm=warm).items()}
    # Per request a bound may lose what it wins later: only a whole run that starts empty is bounded.
    total = {name: hits.sum(axis=0) if warm else hits for name, hits in found.items()}
    assert (total["min_bypass"] >= total["min_flat"]).all()
    whole = ~np.isnan(total["min_set"])
    assert (total["min_flat"] >= total["min_set"])[whole].all()
    for policy, length in POLICIES:
        hits = curve(work, policy=policy, segment_length=length, shared=shared, warm=warm).hits
        hits = hits.sum(axis=0) if warm else hits
        assert (np.isnan(hits) == ~whole).all()
        assert (total["min_set"] >= hits)[whole].all()
    for hits in total.values():
        assert (np.diff(np.nan_to_num(hits), axis=-1) >= 0).all()
    cold = curve(work, policy="lru", shared=shared, warm=warm)
    used = [
        len({item for steps in requests for step in steps for item in step})
        for requests in steps_of(work, shared=shared)
    ]
    if warm:  # with a slot for every expert, only first uses miss
        np.testing.assert_array_equal(cold.uses.sum(axis=0) - cold.hits[..., -1].sum(axis=0), used)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_at_k_slots_all_policies_are_one(seed: int, shared: bool) -> None:
    # every step needs k = 3, so that a cache of k slots holds the last step whatever its rule (of one layer, if shared)
    work = random_workload(seed, layers=1 if shared else 3, tokens=30, experts=8, k=3, ragged=False)
    optimal = bounds(work, names=["min_set"], shared=shared)["min_set"].hits[..., 2]
    for policy, length in POLICIES:
        found = curve(work, policy=policy, segment_length=length, shared=shared)
        np.testing.assert_array_equal(found.hits[..., 2], optimal)


@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_metrics(shared: bool) -> None:
    work = random_workload(5, sequences=6, tokens=40, experts=12, k=3)
    longest = int(np.diff(work.offsets).max())
    selections = np.full((work.num_layers, work.num_requests, longest, work.ids.shape[2]), -1, np.int16)
    for one in range(work.num_requests):
        span = slice(work.offsets[one], work.offsets[one + 1])
        selections[:, one, : span.stop - span.start] = work.ids[:, span]
    for policy, ours in (("lru", "lru"), ("lfu", "lfu"), ("sch", "sch"), ("belady", "min_set")):
        length = 3 if policy == "sch" else None
        expected = hit_rate_curve(
            selections=selections, num_experts=12, policy=policy, segment_length=length, shared=shared,  # type: ignore[arg-type]
            compulsory_free=False, convention="clean",
        )  # fmt: skip
        if ours == "min_set":
            found = bounds(work, names=["min_set"], shared=shared, warm=False)["min_set"]
        else:
            found = curve(work, policy=ours, segment_length=length, shared=shared, warm=False)  # type: ignore[arg-type]
        rates = found.rates() if shared else found.layer_rates()
        np.testing.assert_allclose(rates[..., 2:], expected[..., 2:], atol=1e-12)  # from k slots on


def test_bounds_part_near_k_and_meet_at_many_slots() -> None:
    # At k slots min_set is LRU, and the flat and the bypassing bound are far below; from 4 k on the bounds agree.
    generator = np.random.default_rng(0)
    experts, k, tokens = 64, 6, 1500
    logits, ids = generator.normal(size=experts), []
    popular = generator.normal(size=experts)
    for _ in range(tokens):
        logits = 0.7 * logits + np.sqrt(1 - 0.7**2) * generator.normal(size=experts)
        ids.append(np.argsort(-(logits + popular))[:k])
    work = decode(selections=np.array(ids)[None, None], num_experts=experts)
    miss = {name: 1 - one.rates() for name, one in bounds(work).items()}
    lru = 1 - curve(work, policy="lru").rates()
    assert miss["min_set"][k - 1] == lru[k - 1]
    assert miss["min_bypass"][k - 1] < miss["min_flat"][k - 1] < 0.85 * miss["min_set"][k - 1]
    assert miss["min_set"][4 * k - 1] < 1.05 * miss["min_bypass"][4 * k - 1]
    assert 1.3 * miss["min_set"][4 * k - 1] < lru[4 * k - 1]


def test_steps_larger_than_the_cache() -> None:
    work = decode(selections=np.array([[0, 1, -1], [0, 1, 2], [1, 2, -1], [0, 1, -1]])[None, None], num_experts=4)
    assert largest_steps(work).tolist() == [3] and largest_steps(work, shared=True).tolist() == [3]
    assert overflow_steps(work).tolist() == [[4, 1, 0, 0]]
    strict = curve(work, policy="lru").hits[0, 0]
    np.testing.assert_array_equal(strict, [np.nan, np.nan, 6, 6])
    # two slots: {0,1}; the step 0 1 2 hits two and leaves 1 and 2, which both hit; then 1 alone
    np.testing.assert_array_equal(curve(work, policy="lru", overflow=True).hits[0, 0], [2, 5, 6, 6])
    found = bounds(work, overflow=True)
    np.testing.assert_array_equal(found["min_set"].hits[0, 0], [3, 5, 6, 6])
    np.testing.assert_array_equal(found["min_bypass"].hits[0, 0], [3, 5, 6, 6])


def test_overflow_of_a_shared_cache_is_per_layer() -> None:
    work = random_workload(1, layers=3, k=3)
    steps = steps_of(work, shared=True)[0]
    sizes = [len(step) for request in steps for step in request]
    expected = [sum(size > slots for size in sizes) for slots in range(1, 19)]
    assert overflow_steps(work, shared=True).tolist() == [expected]


def test_popularity_is_the_hits_of_the_top_experts() -> None:
    work = random_workload(3, sequences=8, tokens=20, experts=8, k=2)
    train, later = work.halves()
    found = popularity(train, later)
    joint = popularity(train, later, shared=True)
    assert (found.hits[..., -1] == found.uses).all() and (joint.hits[..., -1] == joint.uses).all()
    counts = train.counts()
    for layer in range(2):
        order = sorted(range(8), key=lambda one: (-counts[layer, one], one))
        for slots in (1, 3, 6):
            expected = np.isin(later.ids[layer], order[:slots]).sum(axis=1)
            sums = np.bincount(later.request_of_pass, weights=expected, minlength=later.num_requests)
            np.testing.assert_array_equal(found.hits[:, layer, slots - 1], sums)
    pairs = sorted(((layer, one) for layer in range(2) for one in range(8)), key=lambda at: (-counts[at], at))[:5]
    expected = sum(int((later.ids[layer] == one).sum()) for layer, one in pairs)
    assert joint.hits[:, 0, 4].sum() == expected
    best = static_bound(later, shared=True).hits.sum(axis=(0, 1))
    assert (best >= joint.hits.sum(axis=(0, 1))).all()
    assert (np.diff(best, n=2) <= 0).all()  # concave: greedy is exact


def test_refusals() -> None:
    work = random_workload(0)
    with pytest.raises(PlanError, match="policy 'arc' has no curve of all sizes: use one of lru, lfu, sch"):
        curve(work, policy="arc")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="segment_length is None: policy sch looks at 1 or more passes ahead"):
        curve(work, policy="sch")
    with pytest.raises(PlanError, match="segment_length is 4, but policy lru looks at no segment"):
        curve(work, policy="lru", segment_length=4)
    with pytest.raises(PlanError, match="bound 'min' is not known: use min_set, min_flat, min_bypass"):
        bounds(work, names=["min"])  # type: ignore[list-item]
    with pytest.raises(PlanError, match="2 layers of 6 experts, the one replayed 2 of 8"):
        popularity(work, random_workload(0, experts=8))
    assert BOUNDS == ("min_set", "min_flat", "min_bypass")
