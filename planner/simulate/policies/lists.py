"""ARC, and Fate's cache, which gives the first layers most slots and evicts by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.policies.job import Job, Served
from planner.simulate.policies.ranked import lru


def arc(job: Job) -> Served:
    """Experts used once and experts used again share the slots by which of both was evicted too early (FAST 2003).

    The experts of a step are requested one after another, in the order of its entries, and none of them is evicted
    before the step is over.
    """
    from planner.simulate._lists import replay_arc

    missing, there = job.missing(), job.there()
    replay_arc(
        job.ids(), job.starts(), job.workload.num_experts, job.capacity, job.shared, not job.warm, missing,
        job.stretch.start, there,
    )  # fmt: skip
    return Served(missing, there, job.slots, job.capacity)


def fate(job: Job, *, floor: int | None = None, eviction: Literal["arc", "lru"] = "arc") -> Served:
    """Caches per layer, the first layers' as large as possible.

    Fate (arXiv 2502.12224) gives most slots to shallow layers, whose experts its gate foresees less well, and evicts by
    ARC. Its quotas are not verified; ours fill layer after layer to E slots while ``floor`` is left for each of the
    others. What its prefetching gives is not in here.

    The slots are divided anew: of ``layer_slots`` the sum counts.

    Args:
        floor: slots that every layer keeps; None = its k.
        eviction: ``arc`` or ``lru``.

    Raises:
        PlanError: a shared cache, or fewer slots than the floors take.
    """
    if job.shared:
        raise PlanError("fate splits its slots over the layers: replay it with caches per layer")
    if eviction not in ("arc", "lru"):
        raise PlanError(f"eviction is {eviction!r}; fate takes 'arc' or 'lru'")
    floors = np.array(job.workload.top_k if floor is None else [floor] * job.workload.num_layers, np.int64)
    split = replace(job, capacity=shallow_first(job.slots, floors, job.workload.num_experts))
    return arc(split) if eviction == "arc" else lru(split)


def shallow_first(slots: int, floors: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """(layers,) slots: each layer its floor, and the rest to the first layers, E at most.

    Raises:
        PlanError: ``slots`` is less than the floors together.
    """
    floors = np.clip(floors, 0, num_experts)
    rest = slots - int(floors.sum())
    if rest < 0:
        raise PlanError(
            f"{slots} slots are fewer than the {floors.sum()} that one token needs in {len(floors)} layers; give at"
            " least as many"
        )
    capacity = floors.copy()
    for layer in range(len(floors)):
        more = min(rest, num_experts - int(floors[layer]))
        capacity[layer] += more
        rest -= more
    return capacity
