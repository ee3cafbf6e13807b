"""Policies that keep what they value most: by recency, by counts, or by the next use. One kernel serves them all."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.policies.job import Job, Served, plain

Matrices = NDArray[np.float64]


def lru(job: Job) -> Served:
    """The expert used longest ago goes. Of one step's experts the later entry counts as used later."""
    if not job.shared:
        return ranked(job, "RECENCY")
    from planner.simulate._lists import replay_lru

    missing, there = job.missing(), job.there()
    replay_lru(
        job.ids(), job.starts(), job.workload.num_experts, job.slots, not job.warm, missing, job.stretch.start, there
    )
    return Served(missing, there, job.slots, job.capacity)


def lfu(job: Job) -> Served:
    """The expert used least goes; all uses so far count, also those before it was last loaded."""
    return ranked(job, "COUNT")


def lfu_in_cache(job: Job) -> Served:
    """The expert used least since it was loaded goes; what it did before is forgotten."""
    return ranked(job, "COUNT_INSIDE")


def weighted(job: Job) -> Served:
    """The expert that fewest tokens have used goes. With one token per pass it is ``lfu``.

    DALI scores experts by the tokens routed to them; how its score ages is not verified: ours counts all so far.
    """
    return ranked(job, "TOKENS")


def mixtral_offloading(job: Job, *, offload_per_layer: int | None = None) -> Served:
    """LRU per layer, as the code of mixtral-offloading: a step's hits count as used first, then what it loads, both in
    ascending id.

    Args:
        offload_per_layer: experts of each layer that do not fit (its demo: 4 of 8); None = as many as the slots leave.

    Raises:
        PlanError: a shared cache, which it does not have, or more than a layer's experts offloaded.
    """
    if job.shared:
        raise PlanError("mixtral_offloading keeps a cache per layer; for one that all layers share ask for 'lru'")
    if offload_per_layer is not None:
        experts = job.workload.num_experts
        if not 0 <= offload_per_layer <= experts:
            raise PlanError(f"offload_per_layer is {offload_per_layer}; a layer has {experts} experts")
        job = replace(job, capacity=np.full_like(job.capacity, experts - offload_per_layer))
    return ranked(job, "RECENCY", hits_first=True)


def edgemoe(job: Job, *, distance: Literal["corrected", "printed"] = "corrected") -> Served:
    """The expert with the fewest uses so far per layer of distance goes.

    EdgeMoE (arXiv 2308.14352) evicts the largest -f / ((S - i + I) mod S), f uses of an expert of layer i, S layers, I
    the current one. As printed the divisor is how far back the layer lies, and 0 for the current one, against the text:
    evict what is rarely used and far from being executed.

    Args:
        distance: ``corrected``: layers until layer i runs again, S for the current one. ``printed``: as above; an
            expert of the current layer, whose score is then infinite, goes only when no other can. In caches per layer
            ``corrected`` is ``lfu``, and ``printed`` is ``lru``.
    """
    layers = job.workload.num_layers
    ahead = np.arange(layers, dtype=np.float64)
    if distance == "corrected":
        return ranked(job, "COUNT", gap=np.where(ahead == 0, layers, ahead))
    if distance != "printed":
        raise PlanError(f"distance is {distance!r}; EdgeMoE takes 'corrected' or 'printed'")
    if not job.shared:
        return ranked(job, "RECENCY")
    return ranked(job, "COUNT", gap=layers - ahead, shift=np.where(ahead == 0, np.inf, 0.0))


def window(job: Job, *, foresight: int | None = None) -> Served:
    """The expert whose next use is farthest goes, as far as the next ``foresight`` passes show it; of those that they
    do not show, the one used longest ago.

    Read-ME (arXiv 2410.19123) knows the routes of its queue before it runs; for other models this draws the value of
    foresight. 0 passes are ``lru``, all of them are ``min_set``.

    Args:
        foresight: passes ahead, counted from the same layer; None = all.

    Raises:
        PlanError: fewer than 0.
    """
    if foresight is not None and foresight < 0:
        raise PlanError(f"foresight is {foresight} passes: give at least 0, or leave it out to know them all")
    return ranked(job, "FORESIGHT", foresight=-1 if foresight is None else foresight)


def min_set(job: Job) -> Served:
    """The fewest loads that any policy can do with: of what the step does not need, the expert used again last goes.

    Belady's rule with the step's experts pinned; optimal where all of them must be there at once. A step that needs
    more than the cache holds keeps those used again first.
    """
    return ranked(job, "FORESIGHT")


def ranked(
    job: Job,
    rule: str,
    *,
    hits_first: bool = False,
    foresight: int = -1,
    gap: NDArray[np.float64] | None = None,
    shift: NDArray[np.float64] | None = None,
    matrix: NDArray[np.int64] | None = None,
    matrices: Matrices | None = None,
) -> Served:
    """Replay one rule of ``_replay.Rule``.

    Args as ``_replay.Settings`` and ``_replay.Work``; gap and shift (layers,), by layers ahead.
    """
    from planner.simulate import _replay

    work, layers = job.workload, job.workload.num_layers
    ids = job.ids()
    kind = _replay.Rule[rule]
    ahead = _replay.next_passes(ids, work.num_experts) if rule == "FORESIGHT" else np.empty((layers, len(ids[0]), 0))
    tokens = work.tokens if rule == "TOKENS" else np.empty((layers, len(ids[0]), 0))
    missing, there = job.missing(), job.there()
    _replay.replay(
        _replay.Work(
            ids, job.starts(), plain(tokens, np.uint16), plain(ahead, np.int32),
            np.zeros(1, np.int64) if matrix is None else matrix,
            np.zeros((1, 1, 1)) if matrices is None else matrices,
        ),
        _replay.Settings(
            int(kind), work.num_experts, job.capacity, job.shared, not job.warm, hits_first, foresight,
            np.tile(np.ones(layers) if gap is None else gap, 2),
            np.tile(np.zeros(layers) if shift is None else shift, 2),
        ),
        missing, job.stretch.start, there,
    )  # fmt: skip
    return Served(missing, there, job.slots, job.capacity)
