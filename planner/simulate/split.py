"""How many slots each layer's cache gets of a budget for all: exactly, or as Fate is said to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.allocation import allocate
from planner.simulate.outcome import Curve
from planner.simulate.policies.lists import shallow_first
from profiler.metrics._arrays import FloatArray

Slots = NDArray[np.int64]


def split(
    curves: Curve, *, slots: int, floors: Sequence[int] | None = None, ceilings: Sequence[int] | None = None
) -> Slots:
    """Slots per layer with the fewest misses in all: (layers,), which sum to ``slots``.

    Exact for any curve, by dynamic programming over the layers; where all curves are concave (fixed sets, and mostly
    the bounds) it is what a greedy choice gives. LRU curves are not concave. Ties: later layers get fewer.

    Fit it on requests that are not those it is judged on.

    Args:
        curves: hits per layer and size, over all requests.
        slots: of all layers together.
        floors: (layers,) fewest slots of each; None = the smallest size that holds every step of the layer (of fixed
            sets, whose misses pass through: 0).
        ceilings: (layers,) most slots of each; None = E.

    Raises:
        PlanError: a curve of a shared cache, floors or ceilings that no cache can have, or slots outside their sums.
    """
    if curves.shared:
        raise PlanError(f"curve {curves.name} is of one cache that all layers share: there is nothing to split")
    hits = curves.hits.sum(axis=0)  # shape: (layers, sizes)
    layers, sizes = hits.shape
    smallest = np.isnan(hits).sum(axis=1) + 1
    if curves.name == "static":
        smallest = np.zeros(layers, np.int64)
    low = _limits(floors, smallest, layers, "floors")
    high = _limits(ceilings, np.full(layers, sizes), layers, "ceilings")
    _check(low, high, smallest, sizes, slots)
    hits = np.concatenate([np.zeros((layers, 1)), np.nan_to_num(hits)], axis=1)
    # slots beyond the floors are what the layers share out; a layer's cost is what it misses with so many of them
    costs = [-hits[layer, low[layer] : high[layer] + 1] for layer in range(layers)]
    spare = slots - int(low.sum())
    if np.all([np.diff(cost, n=2).min(initial=0) >= 0 for cost in costs]):
        return low + _greedy(costs, spare)
    return low + np.array(allocate(costs, spare), np.int64)


def fate_split(*, num_layers: int, num_experts: int, top_k: Sequence[int], slots: int) -> Slots:
    """Shallow layers first: (layers,) slots; E to layers 0, 1, 2, ... while at least k are left for each other.

    Fate (arXiv 2502.12224) gives most of the cache to shallow layers, whose experts are harder to predict; its exact
    quotas are not verified, so this is the plain reading. :func:`split` with the same floors never misses more on the
    text it was fitted on.

    Raises:
        PlanError: slots below the sum of ``top_k``, or above L * E.
    """
    floors = np.asarray(top_k, np.int64)
    if not floors.sum() <= slots <= num_layers * num_experts:
        raise PlanError(
            f"{slots} slots cannot be split over {num_layers} layers of {num_experts} experts: give {floors.sum()} to"
            f" {num_layers * num_experts}"
        )
    return shallow_first(slots, floors, num_experts)


def equal_split(*, num_layers: int, slots: int) -> Slots:
    """The same number everywhere, (layers,); what does not divide goes to the first layers."""
    each, more = divmod(slots, num_layers)
    return np.full(num_layers, each, np.int64) + (np.arange(num_layers) < more)


def split_hits(curves: Curve, layer_slots: Slots) -> FloatArray:
    """(requests,) hits with so many slots in each layer, (layers,): 0 slots hit 0; NaN where a step does not fit."""
    chosen = np.asarray(layer_slots, np.int64)
    picked = np.take_along_axis(curves.hits, np.maximum(chosen - 1, 0)[None, :, None], axis=2)[..., 0]
    total: FloatArray = np.where(chosen > 0, picked, 0.0).sum(axis=1)
    return total


def _greedy(costs: Sequence[FloatArray], spare: int) -> Slots:
    """The largest gains first, of equal ones those of earlier layers, as ``allocate`` does. Costs are convex."""
    gains = np.concatenate([-np.diff(cost) for cost in costs])
    owner = np.repeat(np.arange(len(costs)), [len(cost) - 1 for cost in costs])
    order = np.lexsort((owner, -gains))[:spare]
    return np.bincount(owner[order], minlength=len(costs)).astype(np.int64)


def _limits(given: Sequence[int] | None, default: Slots, layers: int, name: str) -> Slots:
    found = np.asarray(default if given is None else given, np.int64)
    if found.shape != (layers,):
        raise PlanError(f"{name} are {found.size} numbers; the curve has {layers} layers")
    return found


def _check(low: Slots, high: Slots, smallest: Slots, sizes: int, slots: int) -> None:
    for layer, (least, most, needed) in enumerate(zip(low, high, smallest, strict=True)):
        if least < needed:
            raise PlanError(f"floor {least} of layer {layer} is below the {needed} experts that one of its steps needs")
        if not least <= most <= sizes:
            raise PlanError(f"layer {layer} cannot have {least} to {most} slots: it has {sizes} experts")
    if not low.sum() <= slots <= high.sum():
        raise PlanError(f"{slots} slots cannot be split over the layers: give {low.sum()} to {high.sum()}")
