"""EPLB, the load balancer that DeepSeek-V3 was served with (arXiv 2412.19437), as its published code computes it.

Hierarchical where groups of experts divide evenly among nodes: groups are packed into nodes, busy experts replicated
inside each node, replicas packed into devices. Otherwise global: the same with one group and one node.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import PlanError
from planner.place.slots import check_groups, check_slots
from profiler.metrics._arrays import IntArray

Weights = NDArray[np.float32]


class Replicas(NamedTuple):
    """What EPLB returns.

    Attributes:
        physical_to_logical: (layers, P) expert in each slot.
        logical_to_physical: (layers, E, P - E + 1) slots of each expert, first replica first; -1 = none.
        logical_count: (layers, E) slots of each expert.
    """

    physical_to_logical: IntArray
    logical_to_physical: IntArray
    logical_count: IntArray


def eplb(*, load: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Replicas:
    """Replicate busy experts and pack all replicas so that devices carry as much.

    Sums and quotients are float32, as in the published code, so that near-ties fall alike. Equal weights are taken in
    ascending order of id.

    Args:
        load: (layers, E) tokens of each expert, at least 0.
        num_replicas: P, slots of a layer.
        num_groups: groups of consecutive experts.
        num_nodes: machines, among which devices are divided evenly.
        num_gpus: D, devices; each gets P / D slots.

    Raises:
        PlanError: what cannot be divided, with the nearest counts that would do.
    """
    weight = check_load(load).astype(np.float32)
    layers, experts = weight.shape
    if num_nodes < 1 or num_groups % num_nodes:
        num_groups = num_nodes = 1
    check_slots(num_replicas, experts, num_gpus, num_nodes)
    check_groups(experts, num_groups)
    size, mine = experts // num_groups, experts // num_nodes

    # groups to nodes: expert e of the model becomes expert moved[e] in the order of nodes
    groups: Weights = weight.reshape(layers, num_groups, size).sum(-1, dtype=np.float32)
    node, rank = balanced_packing(groups, num_nodes)
    place = (node * (num_groups // num_nodes) + rank) * size
    moved = (place[:, :, None] + np.arange(size)).reshape(layers, experts)
    original = np.argsort(moved, axis=1)

    # replicas inside nodes; shape: (layers x nodes, E / nodes)
    inside = np.take_along_axis(weight, original, 1).reshape(-1, mine)
    expert, copy, count = replicate(inside, num_replicas // num_nodes)

    # replicas to devices
    share: Weights = (inside / count.astype(np.float32)).astype(np.float32)
    each = np.take_along_axis(share, expert, 1)
    device, rank = balanced_packing(each, num_gpus // num_nodes)
    slot = np.argsort(device * (num_replicas // num_gpus) + rank, axis=1)
    offset = (np.arange(num_nodes) * mine)[None, :, None]
    chosen = (np.take_along_axis(expert, slot, 1).reshape(layers, num_nodes, -1) + offset).reshape(layers, -1)
    physical = np.take_along_axis(original, chosen, 1)
    copies = np.take_along_axis(copy, slot, 1).reshape(layers, -1)
    counts = np.take_along_axis(count.reshape(layers, -1), moved, 1)
    logical = np.full((layers, experts, num_replicas - experts + 1), -1, np.int64)
    logical[np.arange(layers)[:, None], physical, copies] = np.arange(num_replicas)
    return Replicas(physical, logical, counts)


def balanced_packing(weight: Weights, packs: int) -> tuple[IntArray, IntArray]:
    """The heaviest item first into the lightest pack that is not full; every pack takes as many items.

    weight (rows, items). Returns (rows, items) pack and place in the pack. The first of equally light packs is taken.
    """
    rows, items = weight.shape
    room = items // packs
    if room == 1:  # the published code leaves such items where they are
        return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), np.int64)
    order = np.argsort(-weight, axis=1, kind="stable")
    pack, rank = np.empty((rows, items), np.int64), np.empty((rows, items), np.int64)
    total, held = np.zeros((rows, packs), np.float32), np.zeros((rows, packs), np.int64)
    row = np.arange(rows)
    for item in order.T:
        lightest = np.argmin(np.where(held < room, total, np.float32(np.inf)), axis=1)
        pack[row, item], rank[row, item] = lightest, held[row, lightest]
        total[row, lightest] += weight[row, item]
        held[row, lightest] += 1
    return pack, rank


def replicate(weight: Weights, slots: int) -> tuple[IntArray, IntArray, IntArray]:
    """One replica more, again and again, for the expert whose replicas carry most each.

    weight (rows, E). Returns (rows, slots) expert and number of the replica, and (rows, E) replicas.
    """
    rows, experts = weight.shape
    expert = np.tile(np.arange(slots), (rows, 1))
    copy, count = np.zeros((rows, slots), np.int64), np.ones((rows, experts), np.int64)
    row = np.arange(rows)
    for slot in range(experts, slots):
        busiest = np.argmax(weight / count.astype(np.float32), axis=1)
        expert[:, slot], copy[:, slot] = busiest, count[row, busiest]
        count[row, busiest] += 1
    return expert, copy, count


def check_load(load: ArrayLike) -> NDArray[np.float64]:
    """Loads as an array.

    Raises:
        PlanError: they are not (layers, experts), negative, or not finite.
    """
    array = np.asarray(load, np.float64)
    if array.ndim != 2 or not array.size:
        raise PlanError(f"load of shape {array.shape} cannot be placed: give one row of experts per layer")
    if not np.isfinite(array).all() or array.min() < 0:
        raise PlanError(f"load holds {array[~(array >= 0) | ~np.isfinite(array)][0]}: give counts of tokens, 0 or more")
    return array
