"""MoETuner (arXiv 2502.06643, read second-hand, not verified): clusters of experts, then clusters to devices.

Stage 1 gives each layer D clusters of E / D experts that carry as much. Stage 2 gives clusters to devices so that
tokens that go from a cluster to one of the next layer travel little. The paper solves both by integer programming.
Here:

- Stage 1 is LPT with swaps, and ``scipy.optimize.milp`` where experts are few and that left a gap.
- Stage 2, summed over equal links, depends on adjacent layers alone: giving each layer the assignment that suits the
  one before is optimal, by induction (the labels of a layer may be renamed together with all later ones). Unequal links
  or the largest transfer: all orders of few devices, by dynamic programming over layers, else a search by swaps.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import PlanError
from planner.place.lpt import least_maximum, packed
from planner.place.rebalance import check_load
from planner.place.slots import Placement, by_device, check_slots
from profiler.metrics._arrays import FloatArray, IntArray

Objective = Literal["sum", "max"]

SOLVER_EXPERTS = 16
"""Experts of a layer up to which the solver is asked unless more are named. With 32 and more it takes a second or more
per layer to improve LPT with swaps by less than a percent; beyond 64 it is worse after any bearable time."""

SEARCHED_DEVICES = 5
"""Devices up to which all orders are tried where links are unequal: 120 orders."""

STARTS = 8
"""Random assignments that the search by swaps starts from, beside that of equal links."""

CLOSE = 1e-3
"""A relative gap to the least possible maximum below which no solver is asked: chance unbalances later text by more."""

NODES = 500
"""Nodes of the solver's tree at most: so that the same loads give the same clusters on every machine."""


@dataclass(frozen=True)
class Clusters:
    """Stage 1.

    Attributes:
        cluster: (layers, E) of each expert.
        gap: (layers,) largest load of a cluster over the least that is known to be possible, minus 1. 0 = proven best.
        solved: layers that the solver improved or proved.
    """

    cluster: IntArray
    gap: FloatArray
    solved: int = 0


@dataclass(frozen=True)
class Tuned:
    """Both stages.

    Attributes:
        placement: the result.
        clusters: what stage 1 found.
        cost: of stage 2: transfers over bandwidth, summed or the largest of each layer, over layers.
        exact: whether stage 2 is proven optimal for these clusters.
    """

    placement: Placement
    clusters: Clusters = field(repr=False)
    cost: float
    exact: bool


def moetuner(
    *, load: ArrayLike, transitions: ArrayLike, devices: int, nodes: int = 1, bandwidth: ArrayLike | None = None,
    objective: Objective = "sum", seconds: float = 15.0, solver_experts: int = SOLVER_EXPERTS,
) -> Tuned:  # fmt: skip
    """Balanced clusters, on the devices that suit the layers before.

    Args:
        load: (layers, E) tokens of each expert.
        transitions: (layers - 1, E, E) tokens that use expert i of a layer and j of the next.
        devices: D, a divisor of E.
        nodes: among which devices are divided evenly.
        bandwidth: (D, D) of the link between two devices, any unit; None = all equal.
        objective: ``sum`` of all transfers, or the ``max`` of each pair of layers (the paper's).
        seconds: for the solver of stage 1, over all layers.
        solver_experts: experts of a layer up to which it is asked; 0 = never.

    Raises:
        PlanError: what does not fit together.
    """
    weight, table = check_load(load), np.asarray(transitions, np.float64)
    layers, experts = weight.shape
    check_slots(experts, experts, devices, nodes)
    if table.shape != (layers - 1, experts, experts):
        raise PlanError(f"transitions of shape {table.shape} are not those of {layers} layers of {experts} experts")
    clusters = balanced_clusters(load=weight, clusters=devices, seconds=seconds, solver_experts=solver_experts)
    flows = np.stack([
        _flow(one, first, second, devices)
        for one, first, second in zip(table, clusters.cluster[:-1], clusters.cluster[1:], strict=True)
    ]) if layers > 1 else np.zeros((0, devices, devices))  # fmt: skip
    order, cost, exact = assign_clusters(flows=flows, bandwidth=bandwidth, objective=objective)
    device = np.take_along_axis(order, clusters.cluster, 1)
    return Tuned(by_device(device, devices=devices, nodes=nodes), clusters, cost, exact)


def balanced_clusters(
    *, load: FloatArray, clusters: int, seconds: float = 15.0, solver_experts: int = SOLVER_EXPERTS
) -> Clusters:
    """Stage 1: (layers, E) into clusters of equal size whose largest load is small.

    The solver is asked, layer by layer, until its seconds are spent. It ends by its nodes as a rule; where its seconds
    end it, what it has found by then depends on the machine.
    """
    found = packed(load, clusters)
    gap, solved = np.zeros(len(load)), 0
    left = seconds
    for layer, weight in enumerate(load):
        most = float(np.bincount(found[layer], weights=weight, minlength=clusters).max())
        least = least_maximum(weight, clusters)
        if most > least * (1 + CLOSE) and len(weight) <= solver_experts and left > 0:
            began = time.perf_counter()
            better, least = solve_clusters(weight, clusters, seconds=left)
            left -= time.perf_counter() - began
            if better is not None:
                reached = float(np.bincount(better, weights=weight, minlength=clusters).max())
                if reached < most * (1 - 1e-9):
                    found[layer], most = better, reached
            solved += 1
        gap[layer] = max(most / least - 1, 0.0) if least > 0 else 0.0
    return Clusters(found, np.where(gap < 1e-9, 0.0, gap), solved)


def solve_clusters(
    weight: FloatArray, clusters: int, *, seconds: float, nodes: int = NODES
) -> tuple[IntArray | None, float]:
    """The least largest load by integer programming: (E,) clusters or None, and what no solution can go below."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    experts, scale = len(weight), float(weight.sum()) / clusters
    count = experts * clusters
    each, held, below = np.zeros((experts, count + 1)), np.zeros((clusters, count + 1)), np.zeros((clusters, count + 1))
    for one in range(clusters):
        columns = np.arange(experts) * clusters + one
        each[np.arange(experts), columns] = held[one, columns] = 1
        below[one, columns] = weight / scale
    below[:, -1] = -1
    upper = np.append(np.ones(count), np.inf)
    heaviest = int(np.argmax(weight))
    upper[heaviest * clusters + 1 : (heaviest + 1) * clusters] = 0  # clusters are alike: the heaviest opens the first
    answer = milp(
        np.append(np.zeros(count), 1.0), integrality=np.append(np.ones(count), 0), bounds=Bounds(0, upper),
        constraints=[
            LinearConstraint(each, 1, 1), LinearConstraint(held, experts // clusters, experts // clusters),
            LinearConstraint(below, -np.inf, 0),
        ],
        options={"time_limit": max(seconds, 0.01), "mip_rel_gap": CLOSE / 10, "node_limit": nodes},
    )  # fmt: skip
    bound = answer.mip_dual_bound
    least = max(least_maximum(weight, clusters), float(bound) * scale if bound is not None else 0.0)
    if answer.x is None:
        return None, least
    chosen: IntArray = np.argmax(answer.x[:-1].reshape(experts, clusters), axis=1)
    return chosen, least


def assign_clusters(
    *, flows: FloatArray, bandwidth: ArrayLike | None = None, objective: Objective = "sum"
) -> tuple[IntArray, float, bool]:
    """Stage 2: (layers, D) the device of each cluster, the cost, and whether it is proven optimal.

    Args:
        flows: (layers - 1, D, D) tokens from each cluster to each of the next layer.
        bandwidth: (D, D), above 0 off the diagonal; None = 1 everywhere. Staying on a device costs nothing.
        objective: ``sum`` or ``max`` over the pairs of devices, of two adjacent layers; layers add up.

    Raises:
        PlanError: an unknown objective, or bandwidths out of shape or range.
    """
    if objective not in ("sum", "max"):
        raise PlanError(f"objective {objective!r} is unknown: choose sum or max")
    devices = flows.shape[-1]
    slowness = _slowness(bandwidth, devices)
    links = slowness[~np.eye(devices, dtype=bool)]
    chained = _chain(flows)
    if objective == "sum" and (not len(links) or links.min() == links.max()):
        return chained, _cost(flows, chained, slowness, objective), True
    if devices <= SEARCHED_DEVICES:
        order = _every_order(flows, slowness, objective)
        return order, _cost(flows, order, slowness, objective), True
    rng = np.random.default_rng(0)
    starts = [chained, *(np.array([rng.permutation(devices) for _ in chained]) for _ in range(STARTS))]
    found = [_swap_search(flows, start, slowness, objective) for start in starts]
    costs = [_cost(flows, order, slowness, objective) for order in found]
    best = int(np.argmin(costs))
    return found[best], costs[best], False


def _chain(flows: FloatArray) -> IntArray:
    """Each layer's clusters where most of their tokens come from, as good as can be given the layer before."""
    from scipy.optimize import linear_sum_assignment

    devices = flows.shape[-1]
    order = [np.arange(devices)]
    for flow in flows:
        arriving = np.zeros((devices, devices))  # shape: (device of the layer before, cluster)
        arriving[order[-1]] = flow
        rows, columns = linear_sum_assignment(arriving, maximize=True)
        device = np.empty(devices, np.int64)
        device[columns] = rows
        order.append(device)
    return np.stack(order)


def _every_order(flows: FloatArray, slowness: FloatArray, objective: Objective) -> IntArray:
    """The best of all orders of all layers, by dynamic programming over layers."""
    devices = flows.shape[-1]
    orders = np.array(list(itertools.permutations(range(devices))))
    best, came = np.zeros(len(orders)), []
    for flow in flows:
        step = np.empty((len(orders), len(orders)))
        for one, first in enumerate(orders):
            slow = slowness[first][:, orders].transpose(1, 0, 2)  # shape: (orders, clusters, next clusters)
            moved = flow * slow
            step[one] = moved.sum((1, 2)) if objective == "sum" else moved.max((1, 2))
        total = best[:, None] + step
        came.append(np.argmin(total, axis=0))
        best = total.min(axis=0)
    at = int(np.argmin(best))
    path = [at]
    for back in reversed(came):
        at = int(back[at])
        path.append(at)
    return np.asarray(orders[path[::-1]])


def _swap_search(flows: FloatArray, start: IntArray, slowness: FloatArray, objective: Objective) -> IntArray:
    """Swap two clusters of a layer, or of it and all later ones, as long as the cost falls."""
    order, cost = start.copy(), _cost(flows, start, slowness, objective)
    improved = True
    while improved:
        improved = False
        for layer, (one, other) in itertools.product(
            range(len(order)), itertools.combinations(range(len(order[0])), 2)
        ):
            for last in sorted({layer + 1, len(order)}):
                tried = order.copy()
                part = tried[layer:last]
                tried[layer:last] = np.where(part == one, other, np.where(part == other, one, part))
                found = _cost(flows, tried, slowness, objective)
                if found < cost * (1 - 1e-12):
                    order, cost, improved = tried, found, True
    return order


def _cost(flows: FloatArray, order: IntArray, slowness: FloatArray, objective: Objective) -> float:
    slow = slowness[order[:-1, :, None], order[1:, None, :]]
    moved = flows * slow
    return float(moved.sum() if objective == "sum" else moved.max(axis=(1, 2), initial=0.0).sum())


def _slowness(bandwidth: ArrayLike | None, devices: int) -> FloatArray:
    """(D, D) 1 / bandwidth; 0 on the diagonal."""
    table = np.ones((devices, devices)) if bandwidth is None else np.array(bandwidth, np.float64)
    if table.shape != (devices, devices):
        raise PlanError(f"bandwidth of shape {table.shape} is not that of {devices} x {devices} links")
    off = ~np.eye(devices, dtype=bool)
    if not (table[off] > 0).all():
        raise PlanError(f"bandwidth holds {min(table[off], default=math.nan):g}: give numbers above 0 between devices")
    return np.where(off, 1.0 / np.where(off, table, 1.0), 0.0)


def _flow(table: FloatArray, first: IntArray, second: IntArray, clusters: int) -> FloatArray:
    """(clusters, clusters) what goes from each cluster of a layer to each of the next."""
    rows, columns = np.eye(clusters)[first], np.eye(clusters)[second]
    flow: FloatArray = rows.T @ table @ columns
    return flow
