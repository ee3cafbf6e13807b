"""Placement by affinity against all placements of small models, and pairs against counting by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moescope.errors import PlanError
from planner.place.affinity import affinity, followed, together
from planner.place.pairs import coactivations, transitions
from planner.place.score import score
from planner.place.slots import Placement
from planner.simulate.workload import Workload, batched, decode


def _work(layers: int = 2, experts: int = 6, tokens: int = 200, k: int = 2, seed: int = 0) -> Workload:
    rng = np.random.default_rng(seed)
    affine = rng.normal(size=(layers, 3, experts)) * 1.5  # three kinds of tokens, each with its experts
    kind = rng.integers(0, 3, (4, tokens))
    scores = affine[:, kind] + rng.gumbel(size=(layers, 4, tokens, experts))
    return decode(selections=np.argsort(-scores, axis=-1)[..., :k].astype(np.int16), num_experts=experts)


def _devices(placement: Placement) -> np.ndarray:
    """(layers, E) of a placement without replicas."""
    device = np.empty((placement.num_layers, placement.num_experts), np.int64)
    np.put_along_axis(device, placement.experts, np.tile(placement.device_of_slot, (placement.num_layers, 1)), 1)
    return device


def _every(experts: int, devices: int) -> list[tuple[int, ...]]:
    size = experts // devices
    every = set(itertools.permutations(np.repeat(np.arange(devices), size).tolist()))
    return sorted(every)


def test_pairs_counted_by_hand() -> None:
    work = _work(layers=3, tokens=20)
    near, follow = coactivations(work), transitions(work)
    expected, after = np.zeros_like(near), np.zeros_like(follow)
    for token in range(work.num_passes):
        for layer in range(3):
            for i, j in itertools.permutations(work.ids[layer, token], 2):
                expected[layer, i, j] += 1
            if layer < 2:
                for i, j in itertools.product(work.ids[layer, token], work.ids[layer + 1, token]):
                    after[layer, i, j] += 1
    np.testing.assert_array_equal(near, expected)
    np.testing.assert_array_equal(follow, after)
    with pytest.raises(PlanError, match="start from single tokens"):
        transitions(batched(work, size=2))


@pytest.mark.parametrize("objective", ["fanout", "balance"])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_a_layer_against_all_placements(objective: str, seed: int) -> None:
    work = _work(layers=1, seed=seed)
    table, sign = coactivations(work), 1 if objective == "fanout" else -1
    found = affinity(load=work.counts(), coactivations=table, devices=3, objective=objective, slack=9.0)  # type: ignore[arg-type]
    values = [sign * together(np.array([one]), table) for one in _every(6, 3)]
    reached = sign * together(_devices(found), table)
    assert reached == max(values)


@pytest.mark.parametrize("seed", range(3))
def test_from_layer_to_layer_against_all_placements(seed: int) -> None:
    work = _work(layers=2, seed=seed)
    follow = transitions(work)
    found = affinity(load=work.counts(), transitions=follow, devices=2, objective="none", slack=9.0)
    every = [np.array(one) for one in _every(6, 2)]
    values = [followed(np.stack([a, b]), follow) for a, b in itertools.product(every, every)]
    reached = followed(_devices(found), follow)
    assert reached == max(values)


def test_the_score_sees_what_each_aim_is_for() -> None:
    work = _work(layers=3, experts=12, tokens=400, k=3, seed=4)
    near, follow, load = coactivations(work), transitions(work), work.counts()
    plain = score(work, affinity(load=load, devices=4, objective="none"), batch=4)
    few = score(work, affinity(load=load, coactivations=near, devices=4, objective="fanout", slack=1.0), batch=4)
    even = score(work, affinity(load=load, coactivations=near, devices=4, objective="balance"), batch=4)
    stay = score(work, affinity(load=load, transitions=follow, devices=4, objective="none", slack=1.0), batch=4)
    assert few.mean_fan_out < plain.mean_fan_out < even.mean_fan_out
    assert even.pass_balancedness > max(plain.pass_balancedness, few.pass_balancedness)
    assert stay.move_share < plain.move_share


def test_pairs_are_the_scores_own_sums() -> None:
    work = _work(layers=3)
    placement = affinity(load=work.counts(), coactivations=coactivations(work), devices=2, slack=1.0)
    done, device = score(work, placement), _devices(placement)
    assert done.adjacent.sum() - done.moves.sum() == followed(device, transitions(work))
    # for k = 2 a token needs one device where its pair lies together, else two
    assert done.fan_out.sum() == 2 * done.tokens.sum() - together(device, coactivations(work))


@pytest.mark.parametrize("slack", [0.0, 0.1])
def test_no_device_gets_more_than_the_slack_allows(slack: float) -> None:
    work = _work(layers=2, experts=12, k=3)
    load = work.counts()
    least = affinity(load=load, devices=3, objective="none").load(load)  # LPT with swaps
    found = affinity(load=load, coactivations=coactivations(work), devices=3, slack=slack).load(load)
    assert (found.max(-1) <= least.max(-1) * (1 + slack) + 1e-9).all()


def test_unknown_aims_and_shapes_are_refused() -> None:
    with pytest.raises(PlanError, match="objective 'spread' is unknown: choose fanout, balance or none"):
        affinity(load=np.ones((1, 4)), devices=2, objective="spread")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="slack -1 cannot be"):
        affinity(load=np.ones((1, 4)), devices=2, slack=-1)
    with pytest.raises(PlanError, match=r"pairs of shape \(2, 4, 4\)"):
        affinity(load=np.ones((1, 4)), devices=2, coactivations=np.ones((2, 4, 4)))
