"""Scores against counting token by token, windows against the passes that they hold."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moescope.errors import PlanError
from planner.place.dispatch import passes_of, routes
from planner.place.score import (
    added,
    balancedness,
    score,
    sglang_balancedness,
    tensorrt_imbalance,
)
from planner.place.slots import Placement, by_device, contiguous
from planner.place.stream import uniform
from planner.place.windows import routed_only, split, windows
from planner.simulate.workload import Workload, batched, decode, prefill

DEVICES = 3


def _work(seed: int = 0, layers: int = 3, experts: int = 6, requests: int = 7, k: int = 2) -> Workload:
    rng = np.random.default_rng(seed)
    popular = rng.normal(size=(layers, 1, 1, experts))
    ids = np.argsort(-(popular + rng.gumbel(size=(layers, requests, 9, experts))), axis=-1)[..., :k].astype(np.int16)
    for request in range(requests):
        ids[:, request, 4 + request % 6 :] = -1  # of unequal lengths
    return decode(selections=ids, num_experts=experts)


def _replicated() -> Placement:
    rows = [[0, 1, 2, 3, 0, 4, 5, 0, 1], [5, 4, 3, 2, 1, 0, 5, 4, 3], [0, 1, 2, 3, 4, 5, 0, 1, 2]]
    return Placement(np.array(rows), 6, DEVICES)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_every_sum_counted_token_by_token(batch: int) -> None:
    work, placement = _work(), _replicated()
    done, table = score(work, placement, count=2, batch=batch), routes(placement)
    owner = work.request_of_pass
    window = np.repeat([0, 1], [np.count_nonzero(owner < 3), np.count_nonzero(owner >= 3)])
    load = np.zeros((2, 3, DEVICES), int)
    remote = fan = away = adjacent = moves = 0
    per_pass: list[Counter[tuple[int, int, int]]] = [Counter() for _ in range(3)]
    for token in range(work.num_passes):
        home, group, place = owner[token] % DEVICES, owner[token] // batch, token - work.offsets[owner[token]]
        before: list[int] = []
        for layer in range(3):
            mine = [int(table[layer, home, one]) for one in work.ids[layer, token] if one >= 0]
            for device in mine:
                load[window[token], layer, device] += 1
                per_pass[layer][group, place, device] += 1
            remote += sum(device != home for device in mine)
            fan += len(set(mine))
            away += len(set(mine) - {home})
            adjacent += len(before) * len(mine)
            moves += sum(a != b for a in before for b in mine)
            before = mine
    largest = sum(
        max(counts[group, place, device] for device in range(DEVICES))
        for counts in per_pass
        for group, place in {key[:2] for key in counts}
    )
    np.testing.assert_array_equal(done.load, load)
    assert done.remote_pairs.sum() == remote and done.fan_out.sum() == fan and done.remote_fan_out.sum() == away
    assert done.adjacent.sum() == adjacent and done.moves.sum() == moves
    assert done.pass_largest.sum() == largest
    assert done.pass_balancedness == pytest.approx(load.sum() / DEVICES / largest)


def test_a_token_goes_to_the_replica_at_home_and_else_in_turn() -> None:
    placement = _replicated()
    table, copies = routes(placement), placement.copies()
    for layer in range(3):
        for home in range(DEVICES):
            for expert in range(6):
                target = table[layer, home, expert]
                assert copies[layer, target, expert] > 0
                assert target == home or copies[layer, home, expert] == 0
    many = Placement(np.array([[0, 1, 0, 2, 3, 4, 5, 1, 6, 7, 2, 3]]), 8, 6)  # expert 0 on devices 0 and 1 of 6
    assert sorted(Counter(routes(many)[0, :, 0]).items()) == [(0, 3), (1, 3)]


def test_fair_dispatch_shares_tokens_among_replicas() -> None:
    ids = np.zeros((1, 1, 90, 1), np.int16)  # one request, one expert, of which there are three replicas
    work, placement = decode(selections=ids, num_experts=3), Placement(np.array([[0, 1, 0, 2, 0, 1]]), 3, 3)
    assert score(work, placement, dispatch="fair").load.tolist() == [[[30, 30, 30]]]
    assert score(work, placement).load.tolist() == [[[90, 0, 0]]]
    with pytest.raises(PlanError, match="dispatch 'random' is unknown"):
        score(work, placement, dispatch="random")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [{"batch": 1}, {"batch": 3}, {"batch": 50}, {"chunk": 4}, {"chunk": 100}])
def test_passes_are_those_of_batches_and_chunks(shape: dict[str, int]) -> None:
    work, placement = _work(), contiguous(num_layers=3, num_experts=6, devices=DEVICES)
    united = prefill(work, chunk=shape["chunk"]) if "chunk" in shape else batched(work, size=shape["batch"])
    turn = passes_of(work, **shape)  # type: ignore[arg-type]
    assert np.bincount(turn).tolist() == united.pass_tokens.tolist()
    loads = np.zeros((3, united.num_passes, DEVICES), int)
    for layer in range(3):
        for at in range(united.num_passes):
            used = united.ids[layer, at] >= 0
            np.add.at(loads[layer, at], united.ids[layer, at][used] // 2, united.tokens[layer, at][used].astype(int))
    done = score(work, placement, **shape)  # type: ignore[arg-type]
    assert done.pass_largest.tolist() == loads.max(-1).sum(-1).tolist()
    assert done.passes.tolist() == (loads.sum(-1) > 0).sum(-1).tolist()


def test_three_ways_to_say_balanced() -> None:
    load = np.array([[4, 2, 0], [3, 3, 3], [0, 0, 0]])
    np.testing.assert_allclose(balancedness(load), [0.5, 1.0, np.nan])
    np.testing.assert_allclose(sglang_balancedness(load), [2.00001 / 4.00001, 1.0, 1.0])
    np.testing.assert_allclose(tensorrt_imbalance(load), [1.0, 0.0, np.nan])


def test_scores_of_pieces_add_up() -> None:
    work, placement = _work(), _replicated()
    whole = score(work, placement, count=1)
    parts = added([score(part, placement, count=1) for part in (work.requests(range(3)), work.requests(range(3, 6)))])
    rest = score(work.requests([6]), placement, count=1)
    np.testing.assert_array_equal(parts.fan_out + rest.fan_out, score(work, placement, batch=9).fan_out)
    assert parts.load.shape == (2, 3, DEVICES) and parts.tokens.sum() + rest.tokens.sum() == whole.tokens.sum()


def test_uniform_experts_are_balanced_but_for_chance() -> None:
    work = _work(requests=60, experts=12, k=3)
    placement = contiguous(num_layers=3, num_experts=12, devices=DEVICES)
    drawn = uniform(work)
    assert np.array_equal(drawn.ids >= 0, work.ids >= 0) and np.array_equal(uniform(work).ids, drawn.ids)
    real, even = score(work, placement, count=1), score(drawn, placement, count=1)
    assert even.mean_balancedness > 0.95 > real.mean_balancedness
    assert even.pass_balancedness > real.pass_balancedness
    assert even.remote_share == pytest.approx(2 / 3, abs=0.02) and even.move_share == pytest.approx(2 / 3, abs=0.02)


def test_the_initial_map_changes_by_slots_and_by_what_devices_lack() -> None:
    start = contiguous(num_layers=1, num_experts=6, devices=3, slots=9)
    assert start.experts.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]]
    other = Placement(np.array([[1, 0, 2, 3, 4, 0, 5, 1, 2]]), 6, 3)
    assert other.changed_slots(start) == 4  # two of them only change places on device 0
    assert other.copied_from(start) == 2  # expert 0 to device 1, expert 5 to device 2


def test_experts_on_one_device_twice_are_idle() -> None:
    assert Placement(np.array([[0, 0, 1, 2]]), 3, 2).idle_slots() == 1
    with pytest.raises(PlanError, match="expert 2 of layer 0 has no slot"):
        Placement(np.array([[0, 0, 1, 1]]), 3, 2)
    with pytest.raises(PlanError, match="all hold as many"):
        by_device(np.array([[0, 0, 0, 1]]), devices=2)


def test_nodes_are_counted_once() -> None:
    ids = np.array([[[[0, 1], [0, 2], [0, 7]]]], np.int16)
    work = decode(selections=ids, num_experts=8)
    done = score(work, contiguous(num_layers=1, num_experts=8, devices=4, nodes=2))
    # devices 0 0, 0 1, 0 3 on nodes 0 0, 0 0, 0 1
    assert done.fan_out.tolist() == [5] and done.node_fan_out.tolist() == [4]
    assert done.mean_node_fan_out == pytest.approx(4 / 3)


@pytest.mark.parametrize("by", ["requests", "passes"])
def test_windows_are_the_workload_in_order(by: str) -> None:
    work = _work()
    parts = windows(work, 3, by=by)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.concatenate([one.ids for one in parts], axis=1), work.ids)
    assert sum(part.num_passes for part in parts) == work.num_passes
    counts = [part.num_requests if by == "requests" else part.num_passes for part in parts]
    assert max(counts) - min(counts) <= 1
    fit, later = split(work, 0.5, by=by)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.concatenate([fit.ids, later.ids], axis=1), work.ids)
    assert all(part.offsets[-1] == part.num_passes and len(part.domains) == part.num_requests for part in parts)


def test_windows_that_cannot_be() -> None:
    with pytest.raises(PlanError, match="7 requests cannot be cut into 8 windows"):
        windows(_work(), 8)
    with pytest.raises(PlanError, match="part 1 is outside"):
        split(_work(), 1.0)
    with pytest.raises(PlanError, match="1 of the requests cannot be split"):
        split(_work(requests=1), 0.5)


def test_experts_without_weights_do_not_count() -> None:
    work = routed_only(_work(), 5)
    assert work.num_experts == 5 and work.ids.max() == 4
    assert work.counts().sum() == _work().counts()[:, :5].sum()
