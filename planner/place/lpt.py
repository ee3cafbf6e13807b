"""Longest processing time first (Graham 1969) with as many items in every bin, then swaps until none helps.

Swapping an item of the fullest bin against a lighter one elsewhere takes LPT to within 1e-4 of the mean where there are
some dozens of items per bin, in milliseconds; integer programming does not get there in seconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from planner.place.rebalance import balanced_packing, check_load, replicate
from planner.place.slots import Placement, by_device, check_slots
from profiler.metrics._arrays import FloatArray, IntArray


def lpt(*, load: ArrayLike, devices: int, nodes: int = 1, redundant: int = 0) -> Placement:
    """Experts to devices by LPT and swaps; with redundant slots, busy experts are replicated first as EPLB does.

    Args:
        load: (layers, E) tokens of each expert, at least 0.
        devices: D.
        nodes: only checked; swaps pay no heed to nodes.
        redundant: slots beyond one per expert.

    Raises:
        PlanError: what cannot be divided, with the nearest counts that would do.
    """
    weight = check_load(load)
    experts = weight.shape[1]
    check_slots(experts + redundant, experts, devices, nodes)
    if not redundant:
        return by_device(packed(weight, devices), devices=devices, nodes=nodes)
    expert, _, count = replicate(weight.astype(np.float32), experts + redundant)
    each = np.take_along_axis(weight / count, expert, 1)
    slot = np.argsort(packed(each, devices), axis=1, kind="stable")
    return Placement(np.take_along_axis(expert, slot, 1), experts, devices, nodes)


def packed(weight: FloatArray, bins: int) -> IntArray:
    """(rows, items) the bin of each item, as many in each.

    weight (rows, items), at least 0. LPT, then :func:`swapped`; rows are independent.
    """
    start, _ = balanced_packing(weight.astype(np.float32), bins)
    return np.stack([swapped(row, first, bins) for row, first in zip(weight, start, strict=True)])


def swapped(weight: FloatArray, start: IntArray, bins: int, *, rounds: int = 10_000) -> IntArray:
    """Swap an item of the fullest bin with one elsewhere as long as the fuller of the two bins becomes less full.

    The swap that leaves the fuller of its two bins emptiest is taken; of several, the one of smallest ids.

    Args:
        weight: (items,), at least 0.
        start: (items,) bins, not changed.
        bins: their number.
        rounds: swaps at most.
    """
    bin_of = start.copy()
    total = np.bincount(bin_of, weights=weight, minlength=bins)
    for _ in range(rounds):
        fullest = int(np.argmax(total))
        inside, outside = np.flatnonzero(bin_of == fullest), np.flatnonzero(bin_of != fullest)
        if not len(outside):
            break
        change = weight[inside][:, None] - weight[outside][None, :]
        fuller = np.maximum(total[fullest] - change, total[bin_of[outside]][None, :] + change)
        best = int(np.argmin(fuller))
        if fuller.flat[best] >= total[fullest] * (1 - 1e-12):  # no gain beyond rounding
            break
        one, other = inside[best // len(outside)], outside[best % len(outside)]
        bin_of[one], bin_of[other] = bin_of[other], bin_of[one]
        total = np.bincount(bin_of, weights=weight, minlength=bins)
    return bin_of


def least_maximum(weight: FloatArray, bins: int) -> float:
    """What the fullest bin holds at least: the mean, and the heaviest item with the lightest that must join it.

    weight (items,), as many in each bin.
    """
    ordered = np.sort(weight)
    beside = len(weight) // bins - 1
    return float(max(weight.sum() / bins, ordered[-1] + ordered[:beside].sum()))
