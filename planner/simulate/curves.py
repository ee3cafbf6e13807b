"""Hits of every cache size at once: policies that are stack algorithms, and the best fixed sets.

A policy is a stack algorithm (Mattson et al., 1970) if its cache of C slots always holds the top C of one stack; then
the depth at which each use finds its expert tells for all sizes whether it hits. LRU, LFU that never forgets a count,
and SCH (arXiv 2505.16056) are; LFU that counts while an expert is resident is not and has to be replayed size by size.

Sets: the experts of a step are looked up together, and none is evicted before the step is over. Of experts last used in
the same step, those that the step lists later count as used later. A first use is a miss.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.outcome import Counts, Curve
from planner.simulate.workload import Workload
from profiler.metrics._arrays import IntArray
from profiler.metrics._trace import available_cores

StackPolicy = Literal["lru", "lfu", "sch"]
Ids32 = NDArray[np.int32]
Depths = Callable[[Ids32, IntArray, int, Ids32], None]
"""A kernel: requests (steps, width), first step of every run that starts empty, objects, and depths to write."""

_MOST_REQUESTS = 1 << 31  # priorities of the stack kernels hold times in 31 bits


def curve(
    workload: Workload,
    *,
    policy: StackPolicy,
    segment_length: int | None = None,
    shared: bool = False,
    warm: bool = True,
    overflow: bool = False,
) -> Curve:
    """Hits of a policy at every cache size, per request and layer.

    Args:
        workload: passes in order.
        policy: ``lru``; ``lfu``, by uses since the cache started, which survive eviction; ``sch``, by uses in the
            passes ahead, which no engine knows.
        segment_length: passes after this one that ``sch`` looks at, from 1; None for the others.
        shared: one cache for all layers, served layer after layer; sizes are then 1..L * E.
        warm: the cache goes on from request to request; False: it starts empty at each.
        overflow: also give hits at sizes below the largest step (of a layer; of any, if shared): a step larger than the
            cache leaves those that it lists last, and the others pass through. That is what keeps it a stack algorithm;
            ``replay`` keeps what was there instead, so that its figures differ at these sizes. False: NaN there.

    Raises:
        PlanError: an unknown policy, a segment length that is missing or out of place, or more than 2^31 requests.
    """
    if policy not in get_args(StackPolicy):
        raise PlanError(
            f"policy {policy!r} has no curve of all sizes: use one of {', '.join(get_args(StackPolicy))}, or replay"
            " it at single sizes"
        )
    if policy == "sch" and (segment_length is None or segment_length < 1):
        raise PlanError(f"segment_length is {segment_length}: policy sch looks at 1 or more passes ahead")
    if policy != "sch" and segment_length is not None:
        raise PlanError(f"segment_length is {segment_length}, but policy {policy} looks at no segment: leave it out")
    per_pass = workload.num_layers if shared else 1
    window = (segment_length or 0) * per_pass + 1

    def depths(requests: Ids32, starts: IntArray, objects: int, found: Ids32) -> None:
        from planner.simulate._curves import lru_depths
        from profiler.metrics._stack import Policy, request_depths

        if policy == "lru":
            lru_depths(requests, starts, objects, found)
        else:
            request_depths(requests, starts, objects, int(Policy[policy.upper()]), window, True, found)

    return curve_of_depths(workload, depths, name=policy, shared=shared, warm=warm, whole=not overflow)


def curve_of_depths(
    workload: Workload, depths: Depths, *, name: str, shared: bool, warm: bool, whole: bool, flat: bool = False
) -> Curve:
    """The curve of a kernel that says at which depth each use finds its expert.

    Args:
        workload: as :func:`curve`, and ``shared`` and ``warm``.
        depths: the kernel.
        name: of the curve.
        whole: NaN at sizes that cannot hold the largest step.
        flat: every use is a step of its own.

    Raises:
        PlanError: more than 2^31 requests to one cache.
    """
    layers, passes, width = workload.ids.shape
    caches, per_pass = (1, layers) if shared else (layers, 1)
    if passes * width * per_pass >= _MOST_REQUESTS:
        raise PlanError(
            f"{passes:,} passes of {width} experts are too many for one curve: give at most"
            f" {(_MOST_REQUESTS - 1) // (width * per_pass):,} passes"
        )
    objects = per_pass * workload.num_experts
    steps_per_pass = per_pass * (width if flat else 1)
    ends = workload.offsets * steps_per_pass
    starts = ends if not warm else np.array([0, passes * steps_per_pass], np.int64)
    uses = np.zeros((workload.num_requests, caches), np.int64)
    hits = np.empty((workload.num_requests, caches, objects))

    def fill(cache: int) -> None:
        from profiler.metrics._stack import hit_histograms

        requests = _requests(workload, shared, cache)
        if flat:
            requests = requests.reshape(-1, 1)
        found = np.empty_like(requests)
        depths(requests, starts, objects, found)
        histogram, uses[:, cache] = hit_histograms(found, ends, objects, False)
        np.cumsum(histogram, axis=1, dtype=np.float64, out=hits[:, cache])

    with ThreadPoolExecutor(available_cores()) as threads:
        list(threads.map(fill, range(caches)))
    if whole:
        for cache, size in enumerate(largest_steps(workload, shared=shared)):
            hits[:, cache, : size - 1] = np.nan
    return Curve(name=name, uses=uses, hits=hits, shared=shared)


def largest_steps(workload: Workload, *, shared: bool = False) -> NDArray[np.int64]:
    """Experts that the largest step of each cache needs at once: (layers,); shared: (1,)."""
    most = workload.needed.max(axis=1)
    return np.atleast_1d(most.max()) if shared else most


def overflow_steps(workload: Workload, *, shared: bool = False) -> Counts:
    """Steps that need more than C experts at once: (layers, E), [.., C - 1]; shared: (1, L * E)."""
    needed = workload.needed
    sizes = np.arange(1, workload.num_experts + 1)
    counts = np.stack([len(row) - np.searchsorted(np.sort(row), sizes, side="right") for row in needed])
    if not shared:
        return counts.astype(np.int64)
    more = np.zeros((workload.num_layers - 1) * workload.num_experts, np.int64)  # no layer needs more than its own
    return np.concatenate([counts.sum(axis=0), more])[None]


def popularity(train: Workload, workload: Workload, *, shared: bool = False) -> Curve:
    """Hits of fixed sets: at every size the experts that most steps of ``train`` need. Ties: the lower id stays.

    Per layer the top C of each; ``shared`` = the top N over all layers, which of all fixed sets hits most on ``train``
    (KTransformers' "frequency"). The set is there from the start, so that no first use has to be a miss, and misses
    pass through: a step may need more experts than there are slots.

    Raises:
        PlanError: the two have different layers or numbers of experts.
    """
    if train.layers != workload.layers or train.num_experts != workload.num_experts:
        raise PlanError(
            f"the workload fitted on has {len(train.layers)} layers of {train.num_experts} experts, the one replayed"
            f" {len(workload.layers)} of {workload.num_experts}: take both from one model"
        )
    counts = _counts(train)
    used = np.stack([_counts_by_request(workload, layer) for layer in range(workload.num_layers)], axis=1)
    if shared:
        counts, used = counts.reshape(1, -1), used.reshape(workload.num_requests, 1, -1)
    order = np.argsort(-counts, axis=1, kind="stable")
    hits = np.cumsum(np.take_along_axis(used, order[None], axis=2), axis=2, dtype=np.float64)
    return Curve(name="static", uses=used.sum(axis=2), hits=hits, shared=shared)


def static_bound(workload: Workload, *, shared: bool = False) -> Curve:
    """The best fixed sets in hindsight: :func:`popularity` fitted on the workload itself."""
    return popularity(workload, workload, shared=shared)


def _counts(workload: Workload) -> Counts:
    return np.stack([np.bincount(layer[layer >= 0], minlength=workload.num_experts) for layer in workload.ids])


def _counts_by_request(workload: Workload, layer: int) -> Counts:
    """Steps of each request that need each expert: (requests, E)."""
    ids = workload.ids[layer]
    keys = workload.request_of_pass[:, None] * workload.num_experts + ids
    size = workload.num_requests * workload.num_experts
    return np.bincount(keys[ids >= 0], minlength=size).reshape(-1, workload.num_experts)


def _requests(workload: Workload, shared: bool, cache: int) -> Ids32:
    """Requests to one cache, (steps, width): of a layer, or of all layers of one pass after another."""
    if not shared:
        return np.ascontiguousarray(workload.ids[cache], dtype=np.int32)
    ids = workload.ids.astype(np.int32)
    first = np.arange(workload.num_layers, dtype=np.int32)[:, None, None] * workload.num_experts
    ids = np.where(ids >= 0, ids + first, np.int32(-1))
    return np.ascontiguousarray(ids.transpose(1, 0, 2)).reshape(-1, ids.shape[2])
