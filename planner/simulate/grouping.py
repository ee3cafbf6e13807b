"""In which order requests run, so that those with similar experts follow each other and each set loads once.

After Symbolic-MoE (arXiv 2503.05641), which groups questions by the models that it recruits for them, so that each
model loads once and not once per question. Here the sets are the experts of a layer. An order is held against that of
arrival by :func:`set_loads`, by a replay of ``workload.requests(order)``, or by one of batches of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.workload import Workload
from profiler.metrics._arrays import FloatArray, ratio

Bools = NDArray[np.bool_]
Whole = NDArray[np.int64]


def grouped_requests(
    workload: Workload, *, method: str = "nearest", first: int | None = None, experts: int | None = None
) -> Whole:
    """Requests in an order in which similar experts follow each other; for :meth:`Workload.requests`.

    Args:
        workload: whose requests are ordered.
        method: ``nearest``: from the first request on, always the one most like the last, by the cosine of how often
            each (layer, expert) is used. ``sets``: requests of the same set of most used experts stand together, in
            order of first arrival, which is the grouping of Symbolic-MoE. Sets of many layers are hardly ever the same.
        first: only as many passes of each request are looked at, such as its prompt; None = all, which nobody knows
            beforehand.
        experts: per layer, in a set; None = k.

    Raises:
        PlanError: there is no such method, or ``first`` or ``experts`` are no numbers of passes or experts.
    """
    if first is not None and first < 1:
        raise PlanError(f"{first} passes tell nothing about a request: give at least 1")
    if method == "nearest":
        return _by_nearest(_profiles(workload, first))
    if method == "sets":
        sets = expert_sets(workload, experts=experts, first=first).reshape(workload.num_requests, -1)
        _, earliest, group = np.unique(sets, axis=0, return_index=True, return_inverse=True)
        return np.argsort(earliest[group.ravel()], kind="stable").astype(np.int64)
    raise PlanError(f"no way to group requests {method!r}: there are nearest and sets")


def expert_sets(workload: Workload, *, experts: int | None = None, first: int | None = None) -> Bools:
    """(requests, layers, E) most used experts of each request, ``experts`` per layer (None = k), smaller ids first."""
    count = max(workload.top_k) if experts is None else experts
    if not 1 <= count <= workload.num_experts:
        raise PlanError(f"sets of {count} experts per layer: 1 to {workload.num_experts} are possible")
    uses = _profiles(workload, first)
    order = np.argsort(-uses, axis=2, kind="stable")[:, :, :count]
    sets = np.zeros(uses.shape, np.bool_)
    np.put_along_axis(sets, order, True, axis=2)
    return sets & (uses > 0)


def set_loads(sets: Bools, order: Sequence[int] | NDArray[np.integer[Any]]) -> int:
    """Experts loaded when requests run in this order and only the set of the one that runs is held.

    sets: (requests, layers, E), :func:`expert_sets`. A request loads what the one before it did not hold.
    """
    flat = sets.reshape(len(sets), -1)[np.asarray(order, np.int64)]
    return int(flat[0].sum() + (flat[1:] & ~flat[:-1]).sum()) if len(flat) else 0


def _profiles(workload: Workload, first: int | None) -> FloatArray:
    """(requests, layers, E) tokens that use each expert in a request's first passes."""
    uses = np.zeros((workload.num_requests, workload.num_layers, workload.num_experts))
    owner = workload.request_of_pass
    early = np.arange(workload.num_passes) - workload.offsets[owner] < (workload.num_passes if first is None else first)
    for layer in range(workload.num_layers):
        used = (workload.ids[layer] >= 0) & early[:, None]
        who = np.broadcast_to(owner[:, None], used.shape)[used]
        np.add.at(uses, (who, layer, workload.ids[layer][used]), workload.tokens[layer][used])
    return uses


def _by_nearest(profiles: FloatArray) -> Whole:
    """An order from the first on, always to the most similar one that is left; the earlier one on ties."""
    flat = profiles.reshape(len(profiles), -1)
    unit = ratio(flat, np.linalg.norm(flat, axis=1, keepdims=True), empty=0.0)
    left = np.ones(len(unit), np.bool_)
    order = np.zeros(len(unit), np.int64)
    left[0] = False
    for place in range(1, len(unit)):
        near = np.where(left, (unit @ unit[order[place - 1]]).round(12), -1.0)
        order[place] = int(near.argmax())
        left[order[place]] = False
    return order
