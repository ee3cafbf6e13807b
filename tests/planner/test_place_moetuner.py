"""Stage 1 against all clusterings, stage 2 against all assignments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moescope.errors import PlanError
from planner.place import moetuner as module
from planner.place.moetuner import assign_clusters, balanced_clusters, moetuner
from tests.planner.test_place_lpt import _best

DEVICES, LAYERS = 4, 4


def _cost(flows: np.ndarray, order: tuple[tuple[int, ...], ...], bandwidth: np.ndarray, objective: str) -> float:
    """Written out: what goes from cluster a to cluster b of the next layer, over the link between their devices."""
    whole = 0.0
    for flow, first, second in zip(flows, order[:-1], order[1:], strict=True):
        parts = [
            flow[a, b] / bandwidth[first[a], second[b]]
            for a, b in itertools.product(range(len(flow)), repeat=2)
            if first[a] != second[b]
        ]
        whole += sum(parts) if objective == "sum" else max(parts)
    return whole


def _brute(flows: np.ndarray, bandwidth: np.ndarray, objective: str, *, fixed: bool) -> float:
    """All orders of all layers; with equal links the first layer's may be fixed, since devices are alike."""
    orders = list(itertools.permutations(range(DEVICES)))
    table = np.array([[[_cost(flow[None], (a, b), bandwidth, objective) for b in orders] for a in orders]
                      for flow in flows])  # fmt: skip
    first = [0] if fixed else range(len(orders))
    return min(
        sum(table[layer, path[layer], path[layer + 1]] for layer in range(len(flows)))
        for path in itertools.product(first, *[range(len(orders))] * len(flows))
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_chain_is_the_best_of_all_assignments(seed: int) -> None:
    flows = np.random.default_rng(seed).random((LAYERS - 1, DEVICES, DEVICES))
    order, cost, exact = assign_clusters(flows=flows)
    assert exact and cost == pytest.approx(_brute(flows, np.ones((4, 4)), "sum", fixed=True), rel=1e-12)
    assert cost == pytest.approx(_cost(flows, tuple(map(tuple, order)), np.ones((4, 4)), "sum"), rel=1e-12)


@pytest.mark.parametrize("objective", ["sum", "max"])
def test_unequal_links_of_few_devices_are_searched_in_full(objective: str) -> None:
    rng = np.random.default_rng(5)
    flows, bandwidth = rng.random((2, DEVICES, DEVICES)), rng.random((DEVICES, DEVICES)) + 0.1
    order, cost, exact = assign_clusters(flows=flows, bandwidth=bandwidth, objective=objective)  # type: ignore[arg-type]
    assert exact and cost == pytest.approx(_brute(flows, bandwidth, objective, fixed=False), rel=1e-12)
    assert cost == pytest.approx(_cost(flows, tuple(map(tuple, order)), bandwidth, objective), rel=1e-12)


def test_more_devices_are_searched_by_swaps_and_said_not_to_be_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    flows, bandwidth = rng.random((2, DEVICES, DEVICES)), rng.random((DEVICES, DEVICES)) + 0.1
    best = _brute(flows, bandwidth, "sum", fixed=False)
    monkeypatch.setattr(module, "SEARCHED_DEVICES", 3)
    _, cost, exact = assign_clusters(flows=flows, bandwidth=bandwidth)
    assert not exact and best <= cost + 1e-12 <= best * 1.05


@pytest.mark.parametrize("seed", range(4))
def test_the_solver_finds_the_best_clusters(seed: int) -> None:
    weight = np.random.default_rng(seed).lognormal(0, 1, (1, 9))
    found = balanced_clusters(load=weight, clusters=3)
    largest = np.bincount(found.cluster[0], weights=weight[0]).max()
    assert largest == pytest.approx(_best(weight[0], 3), rel=module.CLOSE)
    assert (np.bincount(found.cluster[0]) == 3).all() and found.gap[0] <= module.CLOSE


def test_experts_that_follow_each_other_end_on_one_device() -> None:
    # expert e is always followed by e + 1 (mod 8): clusters are balanced whatever they hold, so moves can be few
    layers, experts = 3, 8
    follow = np.zeros((layers - 1, experts, experts))
    follow[:, np.arange(experts), (np.arange(experts) + 1) % experts] = 100
    tuned = moetuner(load=np.full((layers, experts), 100), transitions=follow, devices=8)
    device = np.argsort(tuned.placement.experts, axis=1)
    assert tuned.exact and tuned.cost == 0
    assert (device[1][(np.arange(8) + 1) % 8] == device[0]).all()


def test_what_does_not_fit_together() -> None:
    with pytest.raises(PlanError, match=r"transitions of shape \(1, 4, 4\) are not those of 3 layers of 4"):
        moetuner(load=np.ones((3, 4)), transitions=np.ones((1, 4, 4)), devices=2)
    with pytest.raises(PlanError, match="objective 'mean' is unknown: choose sum or max"):
        assign_clusters(flows=np.ones((1, 2, 2)), objective="mean")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="give numbers above 0 between devices"):
        assign_clusters(flows=np.ones((1, 2, 2)), bandwidth=np.zeros((2, 2)))
