"""MoE-Infinity: the paper's priority from activation matrices, and what the released engine does instead."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.errors import PlanError
from planner.simulate.policies.job import Job, Served, plain
from planner.simulate.policies.ranked import lfu_in_cache, ranked
from planner.simulate.workload import Workload


def moe_infinity(
    job: Job, *, behaviour: Literal["priority", "released"] = "priority", trace_capacity: int = 1000
) -> Served:
    """The expert goes that the request is least likely to use soon.

    Args:
        behaviour: ``released``: the C++ dispatcher evicts the expert used least since it was loaded (its cache spans
            all layers: replay it shared). ``priority``: uses since the expert was loaded x its share of its layer in
            the activation matrix of the training request most like this one x (1 - d / (L + 1)), d the layers until
            its layer runs, L for the current one.
        trace_capacity: training requests whose matrices are kept, the first ones (the engine's default: 1000).

    ``priority`` follows arXiv 2401.14361 and the scoring code, which no released path calls. There the distance is
    split into an encoder's and a decoder's half, which decoder-only models do not have; ours is the decay of its
    predictor, in a circle. Likeness is its mean cosine over layers, looked up before each pass from what the request
    used so far; before the first pass the mean of all matrices stands in, where the code takes the first one.

    Raises:
        PlanError: ``priority`` without a training workload.
    """
    if behaviour == "released":
        return lfu_in_cache(job)
    if behaviour != "priority":
        raise PlanError(f"behaviour is {behaviour!r}; MoE-Infinity takes 'priority' or 'released'")
    if job.train is None:
        raise PlanError(
            "MoE-Infinity's priority takes activation matrices: give a training workload, of other requests"
        )
    if trace_capacity < 1:
        raise PlanError(f"trace_capacity is {trace_capacity}: give at least 1 matrix")
    counts = activation_matrices(job.train)[:trace_capacity]
    layers = job.workload.num_layers
    ahead = np.arange(layers, dtype=np.float64)
    ahead[0] = layers
    shares = counts / np.maximum(counts.sum(axis=2, keepdims=True), 1)
    shares = np.concatenate([shares, shares.mean(axis=0, keepdims=True)])
    gap, matrix = (layers + 1) / (layers + 1 - ahead), most_alike(job, counts)
    return ranked(job, "ACTIVATION", gap=gap, matrix=matrix, matrices=plain(shares, np.float64))


def activation_matrices(workload: Workload) -> NDArray[np.int64]:
    """(requests, layers, E) tokens of each request that used each expert."""
    result = np.zeros((workload.num_requests, workload.num_layers, workload.num_experts), np.int64)
    owner = workload.request_of_pass
    for layer, (ids, tokens) in enumerate(zip(workload.ids, workload.tokens, strict=True)):
        used = ids >= 0
        np.add.at(result, (np.broadcast_to(owner[:, None], ids.shape)[used], layer, ids[used]), tokens[used])
    return result


def most_alike(job: Job, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(passes,) which of the matrices (matrices, layers, E) is most like what the request used before the pass; at its
    first pass, as many as there are matrices.
    """
    from planner.simulate._activation import most_alike as find

    norms = np.sqrt((counts.astype(np.float64) ** 2).sum(axis=2, keepdims=True))
    unit = np.divide(counts, norms, out=np.zeros(counts.shape), where=norms > 0)
    tokens = plain(job.workload.tokens, np.uint16)
    return find(job.ids(), tokens, job.starts(), plain(unit.transpose(1, 2, 0), np.float64))
