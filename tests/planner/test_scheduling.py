"""Tokens and requests put in another order: against trying everything, and what must not change."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moescope.errors import PlanError
from planner.simulate.grouping import expert_sets, grouped_requests, set_loads
from planner.simulate.scheduling import queue_schedule, route_bits, token_schedule, two_batches, unique_experts
from planner.simulate.workload import Ids, Workload, batched
from tests.planner.workloads import drawn_workload, of_selections, sets_of


def _unique(routes: Ids, second: np.ndarray) -> int:
    """Experts over both batches and all layers, by sets."""
    return sum(
        len(set().union(*(sets_of(layer[token]) for token in np.flatnonzero(part))))
        for layer in routes
        for part in (second, ~second)
    )


def _two_kinds(seed: int, tokens: int = 8) -> Ids:
    """Routes (2 layers, tokens, 2 of 8): either kind of token prefers its half of the experts."""
    generator = np.random.default_rng(seed)
    kind = generator.integers(0, 2, tokens)
    prefers = 1.5 * (np.arange(8) // 4 == kind[:, None])
    return np.argsort(-(generator.gumbel(size=(2, tokens, 8)) + prefers), axis=-1)[..., :2].astype(np.int16)


def _least(routes: Ids) -> int:
    tokens = routes.shape[1]
    return min(
        _unique(routes, ~np.isin(np.arange(tokens), half))
        for half in itertools.combinations(range(tokens), (tokens + 1) // 2)
    )


def test_two_batches_are_close_to_the_best_of_all_halves() -> None:
    plain, swapped, least, arrival = 0, 0, 0, 0
    for seed in range(30):
        routes = _two_kinds(seed, tokens=7 + seed % 2)
        one, other = (two_batches(routes, num_experts=8, swaps=swaps) for swaps in (False, True))
        half = routes.shape[1] // 2
        assert one.sum() == other.sum() == half
        best, first = _least(routes), _unique(routes, np.arange(len(one)) >= len(one) - half)
        assert best <= _unique(routes, other) <= _unique(routes, one) <= first
        plain, swapped = plain + _unique(routes, one), swapped + _unique(routes, other)
        least, arrival = least + best, arrival + first
    assert swapped <= 1.01 * least
    assert arrival - plain >= 0.6 * (arrival - least)


def test_no_swap_saves_more() -> None:
    routes = _two_kinds(99, tokens=14)
    second = two_batches(routes, num_experts=8)
    cost = _unique(routes, second)
    for one, other in itertools.product(np.flatnonzero(second), np.flatnonzero(~second)):
        swapped = second.copy()
        swapped[[one, other]] = False, True
        assert _unique(routes, swapped) >= cost


def test_clean_clusters_are_found_by_two_means_alone() -> None:
    kind = np.random.default_rng(0).permutation(np.repeat([0, 1], 16))
    routes = np.argsort(np.random.default_rng(1).random((3, 32, 4)), axis=-1)[..., :2] + 4 * kind[:, None]
    second = two_batches(routes.astype(np.int16), num_experts=8, swaps=False)
    assert len(set(zip(kind.tolist(), second.tolist(), strict=True))) == 2
    assert two_batches(routes[:, :1].astype(np.int16), num_experts=8).tolist() == [False]


def test_bits_are_the_sets() -> None:
    routes = np.array([[[1, 2], [0, -1]], [[0, 2], [-1, -1]]], np.int16)
    assert route_bits(routes, num_experts=3).astype(int).tolist() == [[0, 1, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0]]


def _mixed(lengths: tuple[int, ...]) -> Workload:
    """Requests of two kinds by turns, of different lengths, each kind with its own half of 8 experts."""
    generator = np.random.default_rng(0)
    selections = np.full((2, len(lengths), max(lengths), 2), -1)
    for request, length in enumerate(lengths):
        order = np.argsort(generator.random((2, length, 4)), axis=-1)[..., :2]
        selections[:, request, :length] = order + 4 * (request % 2)
    return of_selections(selections, 8)


def test_a_schedule_moves_tokens_and_keeps_them() -> None:
    work = _mixed((9, 12, 12, 5, 12, 12, 8, 12, 7))
    done = token_schedule(work, size=2)
    np.testing.assert_array_equal(done.before.counts(), work.counts())
    np.testing.assert_array_equal(done.after.counts(), work.counts())
    np.testing.assert_array_equal(done.before.pass_tokens, done.after.pass_tokens)
    assert done.after.pass_tokens.max() == 2 and done.after.pass_tokens.sum() == work.num_passes
    assert (done.unique_after < done.unique_before).all()
    expected = [np.mean([len(sets_of(ids)) for ids in layer]) for layer in done.after.ids]
    np.testing.assert_allclose(unique_experts(done.after), expected)
    kinds = [len({expert // 4 for expert in sets_of(ids)}) for ids in done.after.ids[0, done.after.pass_tokens == 2]]
    assert np.mean(kinds) < 1.2  # nearly every pass serves one kind


def test_a_schedule_by_routes_that_say_nothing_is_the_order_of_arrival() -> None:
    work = _mixed((6, 6, 6, 6))
    done = token_schedule(work, size=2, routes=np.full((2, 24, 1), -1, np.int16))
    np.testing.assert_array_equal(done.after.ids, done.before.ids)
    both = token_schedule(work, size=2, routes=work.ids[:, :, ::-1])  # the order of experts says nothing either
    np.testing.assert_array_equal(both.after.ids, token_schedule(work, size=2).after.ids)


@pytest.mark.parametrize("method", ["nearest", "sets"])
def test_grouped_requests_load_each_set_once(method: str) -> None:
    selections = np.repeat(np.array([[0, 1], [2, 3], [4, 5]])[[0, 1, 2, 0, 1, 2, 2, 0, 1]][None, :, None], 5, axis=2)
    work = of_selections(np.repeat(selections, 2, axis=0), 6)
    order = grouped_requests(work, method=method)
    assert sorted(order.tolist()) == list(range(9))
    sets = expert_sets(work)
    assert set_loads(sets, range(9)) == 8 * 4  # every change of request but one brings another set
    assert set_loads(sets, order) == 3 * 4  # each of three sets of 2 experts in 2 layers, once
    assert min(set_loads(sets[:6], each) for each in itertools.permutations(range(6))) == 3 * 4
    assert unique_experts(batched(work.requests(order), size=3)).tolist() == [2.0, 2.0]
    assert unique_experts(batched(work, size=3)).min() > 4


def test_the_first_passes_stand_for_a_request() -> None:
    work = _mixed((9, 12, 12, 5, 12, 12, 8, 12))
    kind = np.arange(8) % 2
    order = grouped_requests(work, first=3)
    assert np.flatnonzero(np.diff(kind[order])).size == 1  # one kind, then the other
    late = drawn_workload(1, layers=1, experts=6, requests=3, length=6)
    changed = late.ids.copy()
    changed[:, [5, 11, 17]] = 5
    np.testing.assert_array_equal(
        expert_sets(late, first=5), expert_sets(of_selections(changed.reshape(1, 3, 6, 2), 6), first=5)
    )


def test_sets_hold_the_most_used() -> None:
    work = of_selections([[[[0], [3], [3]], [[2], [1], [2]]]], 5)
    assert expert_sets(work)[:, 0].astype(int).tolist() == [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert expert_sets(work, experts=4)[0, 0].astype(int).tolist() == [1, 0, 0, 1, 0]  # no more than were used


def test_queues_serve_every_token_in_order() -> None:
    # one expert for every token, so that passes show which token ran
    selections = np.arange(5 * 6).reshape(1, 5, 6, 1)
    alone = queue_schedule(of_selections(selections, 30), size=2, window=4)
    order = alone.ids[0, :, 0].tolist()
    assert sorted(order) == list(range(30))
    for request in range(5):
        mine = [one for one in order if one // 6 == request]
        assert mine == sorted(mine)
    waits = [order.index(one) for one in range(0, 24, 6)]
    assert max(waits) <= 8  # by the longest queue alone the last of four would wait for 18 passes


def test_queues_run_what_shares_an_expert() -> None:
    work = _mixed((9, 12, 12, 5, 12, 12, 8, 12))
    done = queue_schedule(work, size=3, window=8)
    np.testing.assert_array_equal(done.counts(), work.counts())
    assert done.pass_tokens.max() <= 3 and done.pass_tokens.sum() == work.num_passes
    assert (done.tokens.max(axis=(0, 2)) == done.pass_tokens).all()  # one expert is used by all tokens of a pass
    arrival = batched(work, size=3)
    loads = [one.needed.sum() / one.pass_tokens.sum() for one in (done, arrival)]
    assert loads[0] < loads[1]


def test_what_cannot_be_scheduled_is_refused() -> None:
    work = _mixed((4, 4, 4))
    for call, message in (
        (lambda: token_schedule(work, size=0), "at least 1"),
        (lambda: token_schedule(batched(work, size=2), size=2), "single tokens"),
        (lambda: token_schedule(work, size=2, routes=work.ids[:, :5]), "foresee these passes"),
        (lambda: queue_schedule(work, size=4, window=2), "at least 4"),
        (lambda: grouped_requests(work, method="near"), "nearest and sets"),
        (lambda: grouped_requests(work, first=0), "at least 1"),
        (lambda: expert_sets(work, experts=9), "1 to 8"),
    ):
        with pytest.raises(PlanError, match=message):
            call()
