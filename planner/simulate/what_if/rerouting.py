"""A vector on the router's logits: as many experts as before, those with the largest sums."""

from __future__ import annotations

import numpy as np

from planner.simulate.what_if.blocks import Block, Layer
from planner.simulate.what_if.choosing import probabilities, stored
from planner.simulate.what_if.tally import Tally
from profiler.metrics._arrays import FloatArray


def bias(block: Block, layer: Layer, values: FloatArray, *, delta: FloatArray) -> Tally:
    """top-k of logits + value x delta, among the stored logits.

    An expert that is not stored has at most the least stored logit. Where that plus the largest vector entry of those
    experts stays below the last one taken, the answer is proven.

    Args:
        delta: (E,) the vector.
    """
    from planner.simulate.what_if._rerouting import reroute

    scores, own = stored(block), block.own
    mass = probabilities(scores)
    tally = Tally.empty(len(values), scores.ids.shape[1], layer.info.num_experts)
    tally.add_before(scores.ids, mass, own)
    agreeing = tally.add_router(block)
    order = np.argsort(-delta, kind="stable")
    logits = scores.logits.astype(np.float64)
    for index, value in enumerate(values):
        shift = value * delta
        descending = np.ascontiguousarray(order if value >= 0 else order[::-1])
        sums = np.zeros(5, np.int64)  # see the kernel
        tally.kept[index] = reroute(
            np.ascontiguousarray(scores.ids), logits, mass, own, agreeing, shift, descending, tally.load[index], sums
        )
        tally.same[index], tally.kept_own[index], tally.added[index], tally.unknown[index] = sums[:4]
        tally.same_agreeing[index] = sums[4]
        tally.counts[index] = tally.counts_before
    return tally
