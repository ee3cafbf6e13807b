"""Every policy against its formula, replayed by hand."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.errors import PlanError
from planner.simulate.policies.hobbit import fit_hobbit
from planner.simulate.policies.lists import shallow_first
from planner.simulate.replay import replay, residency
from planner.simulate.workload import Workload, batched, decode
from tests.planner.simulate.replay_by_hand import arc_by_hand, by_hand, hobbit_by_hand

QUICK = settings(max_examples=25, deadline=None)


def workload(
    seed: int, *, layers: int = 3, experts: int = 6, k: int = 2, requests: int = 3, tokens: int = 9
) -> Workload:
    """Requests of different lengths with topics of their own; some tokens use fewer experts, in some layers none."""
    generator = np.random.default_rng(seed)
    ids = np.full((layers, requests, tokens, k), -1)
    for request in range(requests):
        skew = generator.dirichlet(np.full(experts, 0.7), size=layers)
        for layer, token in np.ndindex(layers, generator.integers(2, tokens + 1)):
            odds = 0.8 * skew[layer] + 0.2 / experts
            used = generator.choice([0, 1, k], p=[0.05, 0.15, 0.8])
            ids[layer, request, token, :used] = generator.choice(experts, used, replace=False, p=odds)
    weights = np.sort(generator.integers(1, 64, ids.shape) / 64, axis=-1)[..., ::-1]  # exact in floating point
    ids[0, 0, 0, 0] = max(ids[0, 0, 0, 0], 0)
    return decode(selections=ids, num_experts=experts, weights=weights)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("lru", {}), ("lfu", {}), ("lfu_in_cache", {}), ("weighted", {}), ("edgemoe", {}),
    ("edgemoe", {"distance": "printed"}), ("window", {}), ("window", {"foresight": 0}), ("window", {"foresight": 1}),
    ("window", {"foresight": 3}),
]  # fmt: skip


def check(work: Workload, policy: str, slots: int, shared: bool, warm: bool, **parameters: Any) -> None:
    """Missing experts, and which of the needed were there, equal the replay by hand."""
    given_ = {name: value for name, value in parameters.items() if name != "hand"}
    there = by_hand(work, policy, slots, shared=shared, warm=warm, **parameters.get("hand", given_))
    done = replay(work, policy=policy, slots=slots, shared=shared, warm=warm, **given_)
    assert done.missing.tolist() == (work.needed - there.sum(axis=2)).tolist()
    stretch = range(work.num_passes // 3, work.num_passes)
    found = residency(work, policy=policy, slots=slots, shared=shared, warm=warm, passes=stretch, **given_)
    assert found.tolist() == there[:, stretch.start :].tolist()


@pytest.mark.parametrize(("policy", "parameters"), CASES)
@QUICK
@given(st.integers(0, 10**6), st.integers(0, 7), st.booleans(), st.booleans())
def test_ranked_policies(
    policy: str, parameters: dict[str, Any], seed: int, slots: int, shared: bool, warm: bool
) -> None:
    check(workload(seed), policy, 2 * slots if shared else slots, shared, warm, **parameters)


@pytest.mark.parametrize("policy", ["lru", "lfu", "weighted", "window"])
@QUICK
@given(st.integers(0, 10**6), st.integers(0, 6), st.booleans())
def test_passes_of_several_tokens(policy: str, seed: int, slots: int, shared: bool) -> None:
    work = batched(workload(seed), size=3)
    check(work, policy, 3 * slots if shared else slots, shared, True)


@QUICK
@given(st.integers(0, 10**6), st.integers(0, 6), st.booleans())
def test_mixtral_offloading_uses_hits_first(seed: int, offloaded: int, warm: bool) -> None:
    work = workload(seed, k=3)
    there = by_hand(work, "mixtral_offloading", 6 - offloaded, shared=False, warm=warm)
    done = replay(work, policy="mixtral_offloading", slots=0, warm=warm, offload_per_layer=offloaded)
    assert done.missing.tolist() == (work.needed - there.sum(axis=2)).tolist()
    assert done.slots == 3 * (6 - offloaded)


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 7), st.booleans(), st.booleans())
def test_moe_infinity(seed: int, slots: int, shared: bool, warm: bool) -> None:
    work, train = workload(seed), workload(seed + 1, requests=4)
    check(work, "moe_infinity", 2 * slots if shared else slots, shared, warm, train=train)


def test_what_moe_infinity_ships_counts_uses_inside_its_cache() -> None:
    work = workload(3, tokens=40)
    shipped = replay(work, policy="moe_infinity", slots=7, shared=True, behaviour="released")
    assert (shipped.missing == replay(work, policy="lfu_in_cache", slots=7, shared=True).missing).all()


@QUICK
@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(0, 3), st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from([(1.0, 0.0, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25), (0.0, 0.5, 0.25, 0.25), (0.0, 0.0, 0.5, 0.5)]),
       st.sampled_from([None, (0.5, 0.75), (0.0, 1.0), (0.0, 0.5)]))  # fmt: skip
def test_hobbit(
    seed: int, slots: int, second: int, shared: bool, warm: bool, paper: bool, weights: tuple[float, ...],
    thresholds: tuple[float, float] | None,
) -> None:  # fmt: skip
    work = workload(seed, layers=4, k=3)
    slots, second = (3 * slots, 3 * second) if shared else (slots, second)
    expected = hobbit_by_hand(
        work, slots, second, shared=shared, warm=warm, weights=weights, thresholds=thresholds, paper=paper
    )
    done = replay(
        work, policy="hobbit", slots=slots, shared=shared, warm=warm, weights=weights, thresholds=thresholds,
        narrow_slots=second, distance="paper" if paper else "corrected",
    )  # fmt: skip
    assert done.missing.tolist() == expected[0].tolist()
    if thresholds is None:
        assert done.narrow is None and done.skipped is None
        return
    assert done.narrow is not None and done.skipped is not None
    assert done.narrow.tolist() == expected[1].tolist()
    assert done.skipped.tolist() == expected[2].tolist()
    assert done.stalled.sum() == (expected[0] > expected[2]).sum()  # nobody waits for what is left out


def test_hobbit_splits_gate_weight_as_its_paper_says() -> None:
    """Two equal experts of Mixtral: nothing lies before the first, half before the second."""
    work = decode(selections=np.array([[[[0, 1]]]]), num_experts=8, weights=np.array([[[[0.5, 0.5]]]]))
    for thresholds, narrow, skipped in [((0.6, 0.9), 0, 0), ((0.4, 0.9), 1, 0), ((0.1, 0.4), 0, 1)]:
        done = replay(work, policy="hobbit", slots=4, thresholds=thresholds, narrow_slots=1)
        assert done.narrow is not None and done.skipped is not None
        assert (done.narrow.sum(), done.skipped.sum()) == (narrow, skipped)


def test_fitted_weights_load_least_of_all_on_the_grid() -> None:
    work = workload(8, tokens=60)
    weights = fit_hobbit(work, slots=7, parts=4)
    assert sum(weights) == pytest.approx(1)
    points = [(a, b, c, 4 - a - b - c) for a in range(5) for b in range(5 - a) for c in range(5 - a - b)]
    costs = {
        point: replay(
            work, policy="hobbit", slots=7, shared=True, weights=tuple(one / 4 for one in point)
        ).missing.sum()
        for point in points
    }
    assert len(costs) == 35
    assert costs[tuple(round(4 * one) for one in weights)] == min(costs.values()) < max(costs.values())


def test_fitting_looks_at_some_requests_of_a_long_workload() -> None:
    work = workload(9, requests=8, tokens=30)
    short = fit_hobbit(work, slots=3, shared=False, parts=3, max_steps=3 * int(np.diff(work.offsets).max()))
    assert short[3] == 0  # the distance has no effect in caches per layer, so it is not tried
    assert short == fit_hobbit(work.requests([0]), slots=3, shared=False, parts=3)


@QUICK
@given(st.integers(0, 10**6), st.integers(0, 6), st.booleans(), st.booleans())
def test_arc(seed: int, slots: int, shared: bool, warm: bool) -> None:
    work = workload(seed, tokens=25)
    rooms = [2 * slots] if shared else [slots] * 3
    expected = arc_by_hand(work, rooms, shared=shared, warm=warm)
    done = replay(work, policy="arc", slots=rooms[0], shared=shared, warm=warm)
    assert done.missing.tolist() == expected.tolist()


@pytest.mark.parametrize("eviction", ["arc", "lru"])
def test_fate_gives_the_first_layers_all_that_the_floors_leave(eviction: str) -> None:
    work = workload(4, layers=4, tokens=30)
    assert shallow_first(15, np.array([2, 2, 2, 2]), 6).tolist() == [6, 5, 2, 2]
    done = replay(work, policy="fate", layer_slots=[4, 4, 4, 3], eviction=eviction)
    assert (done.missing == replay(work, policy=eviction, layer_slots=[6, 5, 2, 2]).missing).all()
    assert done.slots == 15
    with pytest.raises(PlanError, match="4 slots are fewer than the 8 that one token needs in 4 layers"):
        replay(work, policy="fate", slots=1)


class TestStatic:
    def test_frequency_is_the_best_fixed_set_for_the_text_it_was_counted_on(self) -> None:
        work = workload(5)
        counts = sorted(work.counts().ravel().tolist(), reverse=True)
        for slots in (0, 1, 5, 11, 18):
            done = replay(work, policy="static", slots=slots, shared=True, train=work)
            assert done.hits.sum() == sum(counts[:slots])
        each = np.sort(work.counts(), axis=1)[:, ::-1]
        done = replay(work, policy="static", layer_slots=[1, 4, 2], train=work)
        assert done.hits.sum(axis=0).tolist() == [each[0, :1].sum(), each[1, :4].sum(), each[2, :2].sum()]

    def test_counts_are_of_the_training_requests(self) -> None:
        work, other = workload(5, experts=9), workload(6, experts=9)
        top = other.counts().argmax(axis=1)
        there = residency(work, policy="static", slots=1, train=other, passes=range(work.num_passes))
        assert (there == (work.ids == top[:, None, None])).all()

    @pytest.mark.parametrize(
        ("placement", "held"),
        [("uniform", [[0, 1, 2], [0, 1], [0, 1]]), ("front_loading", [[0, 1, 2, 3, 4, 5], [0], []])],
    )
    def test_placements_without_counts(self, placement: str, held: list[list[int]]) -> None:
        work = workload(7)
        there = residency(
            work, policy="static", slots=7, shared=True, placement=placement, passes=range(work.num_passes)
        )
        for layer, mine in enumerate(held):
            assert (there[layer] == np.isin(work.ids[layer], mine)).all()

    def test_a_random_placement_depends_on_the_seed_alone(self) -> None:
        work = workload(7, experts=16, tokens=40)
        found = [
            replay(work, policy="static", slots=20, shared=True, placement="random", seed=seed).missing
            for seed in (1, 1, 2)
        ]
        assert (found[0] == found[1]).all() and (found[0] != found[2]).any()


def test_weighting_by_tokens_is_counting_when_passes_hold_one_token() -> None:
    work = workload(2, tokens=40)
    assert (replay(work, policy="weighted", slots=3).missing == replay(work, policy="lfu", slots=3).missing).all()
    heavy = changed(work, tokens=(work.tokens * (1 + work.ids % 3)).astype(np.uint16))
    assert (replay(heavy, policy="weighted", slots=3).missing != replay(work, policy="lfu", slots=3).missing).any()
