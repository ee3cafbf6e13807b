"""Placement by affinity: experts that one token uses together, in a layer and from layer to layer.

Two aims contradict each other inside a layer, so both are offered:

- ``fanout``: few devices per token, for less all-to-all. Together on a device go experts that fire together. What is
  maximised is the pairs of a token's experts on one device; for k = 2 that is exactly the tokens that need one device.
- ``balance``: the experts of each token on different devices, so that even few tokens load devices evenly. The same
  pairs are minimised; their sum is that of the squares of how many experts a token has on each device.

From layer to layer a token's next expert is wanted on the device of its last, as ExFlow has it (arXiv 2401.08383, one
integer program over all layers and first choices alone; read second-hand, not verified). Here all k x k pairs count,
and a search by swaps starts from LPT with swaps, sweeping over layers until nothing improves, and again after random
swaps (with a fixed seed). No device gets more load
than ``slack`` beyond what LPT with swaps needs.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from moescope.errors import PlanError
from planner.place.lpt import packed
from planner.place.rebalance import check_load
from planner.place.slots import Placement, by_device, check_slots
from profiler.metrics._arrays import FloatArray, IntArray

Objective = Literal["fanout", "balance", "none"]

SWEEPS = 20
"""Times over all layers at most; the search ends by itself after a few."""

KICKS = 20
"""Times that the best found is shaken by random swaps and searched from again."""


def affinity(
    *, load: ArrayLike, coactivations: ArrayLike | None = None, transitions: ArrayLike | None = None, devices: int,
    nodes: int = 1, objective: Objective = "fanout", across: float = 1.0, slack: float = 0.05,
) -> Placement:  # fmt: skip
    """One slot per expert, where its affinities want it.

    Args:
        load: (layers, E) tokens of each expert.
        coactivations: (layers, E, E) tokens that use both experts of a layer; None = do not count.
        transitions: (layers - 1, E, E) tokens that use expert i of a layer and j of the next; None = do not count.
        devices: D, a divisor of E.
        nodes: among which devices are divided evenly.
        objective: what pairs of a layer are wanted for; ``none`` = only those from layer to layer count.
        across: what a pair from layer to layer counts, against one of a layer.
        slack: how much more load than with LPT and swaps the fullest device may get, 0 or more.

    Raises:
        PlanError: what does not fit together.
    """
    weight = check_load(load)
    layers, experts = weight.shape
    check_slots(experts, experts, devices, nodes)
    if objective not in ("fanout", "balance", "none"):
        raise PlanError(f"objective {objective!r} is unknown: choose fanout, balance or none")
    if not slack >= 0:
        raise PlanError(f"slack {slack:g} cannot be: give how much more load a device may get, such as 0.05")
    pair, follow = np.zeros((layers, experts, experts)), np.zeros((max(layers - 1, 0), experts, experts))
    if coactivations is not None and objective != "none":
        pair = np.array(coactivations, np.float64) * (1.0 if objective == "fanout" else -1.0)
    if transitions is not None:
        follow = np.array(transitions, np.float64) * across
    if pair.shape != (layers, experts, experts) or follow.shape != (layers - 1, experts, experts):
        raise PlanError(f"pairs of shape {pair.shape} and {follow.shape} are not those of {layers} x {experts} experts")
    device = packed(weight, devices)
    if transitions is not None:
        device = _aligned(device, follow, devices)
    limits = _largest(device, weight, devices) * (1 + slack)
    _search(device, weight, pair, follow, devices, limits)
    rng, best = np.random.default_rng(0), together(device, pair) + followed(device, follow)
    for _ in range(KICKS if best or pair.any() or follow.any() else 0):
        tried = _kicked(device, weight, devices, limits, rng)
        _search(tried, weight, pair, follow, devices, limits)
        reached = together(tried, pair) + followed(tried, follow)
        if reached > best:
            device, best = tried, reached
    return by_device(device, devices=devices, nodes=nodes)


def together(device: IntArray, table: ArrayLike) -> float:
    """Pairs of a layer on one device, each counted once: device (layers, E), table (layers, E, E) symmetric."""
    same = device[:, :, None] == device[:, None, :]
    return float((np.asarray(table, np.float64) * same).sum() / 2)


def followed(device: IntArray, table: ArrayLike) -> float:
    """Pairs of adjacent layers on one device: device (layers, E), table (layers - 1, E, E)."""
    same = device[:-1, :, None] == device[1:, None, :]
    return float((np.asarray(table, np.float64) * same).sum())


def _largest(device: IntArray, weight: FloatArray, devices: int) -> FloatArray:
    """(layers,) load of the fullest device."""
    totals = [np.bincount(row, weights=load, minlength=devices) for row, load in zip(device, weight, strict=True)]
    return np.asarray(np.max(totals, axis=1), np.float64)


def _kicked(
    device: IntArray, weight: FloatArray, devices: int, limits: FloatArray, rng: np.random.Generator
) -> IntArray:
    """A copy in which some pairs of experts of every layer, drawn at random, are swapped where the limit allows it."""
    copy = device.copy()
    layers, experts = copy.shape
    for layer, (one, other) in enumerate(rng.integers(0, experts, (layers, 2, max(experts // 4, 2)))):
        for a, b in zip(one, other, strict=True):
            copy[layer, [a, b]] = copy[layer, [b, a]]
            if np.bincount(copy[layer], weights=weight[layer], minlength=devices).max() > limits[layer]:
                copy[layer, [a, b]] = copy[layer, [b, a]]
    return copy


def _search(
    device: IntArray, weight: FloatArray, pair: FloatArray, follow: FloatArray, devices: int, limits: FloatArray
) -> None:
    """Improve device (layers, E) in place, layer by layer, until a sweep over all changes nothing; limits (layers,)."""
    from planner.place._loops import swap_experts

    for _ in range(SWEEPS):
        grown = 0.0
        for layer, row in enumerate(device):
            pull = np.zeros((len(row), devices))
            if layer:
                pull += follow[layer - 1].T @ np.eye(devices)[device[layer - 1]]
            if layer + 1 < len(device):
                pull += follow[layer] @ np.eye(devices)[device[layer + 1]]
            total = np.bincount(row, weights=weight[layer], minlength=devices).astype(np.float64)
            beside: FloatArray = pair[layer] @ np.eye(devices)[row]
            grown += swap_experts(row, weight[layer], total, float(limits[layer]), pull, pair[layer], beside)
        if grown <= 0:
            return


def _aligned(device: IntArray, follow: FloatArray, devices: int) -> IntArray:
    """The same sets of experts, on the devices where most of their tokens come from."""
    from planner.place.moetuner import assign_clusters

    eye = np.eye(devices)
    flows = np.stack(
        [eye[first].T @ one @ eye[second] for one, first, second in zip(follow, device[:-1], device[1:], strict=True)]
        or [np.zeros((devices, devices))]
    )[: len(device) - 1]
    order, _, _ = assign_clusters(flows=flows)
    return np.take_along_axis(order, device, 1)
