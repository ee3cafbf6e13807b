"""The price of balance: the entropic transport plan that gives all experts of a batch the same mass.

Rows of the plan add up to 1, columns to tokens / E; it maximises <plan, logits> + its entropy. Without the columns it
would be the router's softmax.
"""

from __future__ import annotations

import numpy as np

from planner.simulate.what_if.blocks import Block, Layer
from planner.simulate.what_if.choosing import before, stored
from planner.simulate.what_if.tally import Tally
from profiler.metrics._arrays import FloatArray

TOLERANCE = 1e-7
"""Largest relative error of a column."""

ROUNDS = 500
"""Most scalings of a batch; fifty are usual."""

_LEAST = 1e-280
"""Of a probability: a column must have some mass to be scaled."""


def balance(block: Block, layer: Layer, values: FloatArray) -> Tally:
    """top-k of the plan of each batch of ``values`` tokens, as many experts as before.

    A last batch of less than half the size joins the one before. Figure ``error_tokens``: error of the columns, summed
    over tokens.
    """
    from planner.simulate.what_if._sinkhorn import rechosen, softmax, transport

    scores, own, experts = stored(block), block.own, layer.info.num_experts
    ids, column = np.ascontiguousarray(scores.ids), np.empty(experts)
    tally, agreeing = before(block, layer, len(values))
    errors = np.zeros(len(values))
    for index, value in enumerate(values):
        sums = np.zeros(4, np.int64)
        parts = batches(len(ids), int(value))
        # Of one batch only, so that it stays in the cache of a core.
        rows = np.empty((max(last - first for first, last in parts), experts))
        for first, last in parts:
            part, probability = slice(first, last), rows[: last - first]
            softmax(ids[part], scores.logits[part], scores.log_partition[part], _LEAST, probability)
            errors[index] += transport(probability, TOLERANCE, ROUNDS, column) * (last - first)
            tally.kept[index] += rechosen(
                probability, column, ids[part], own[part], agreeing[part], tally.load[index], sums
            )
        tally.same[index], tally.kept_own[index], tally.added[index], tally.same_agreeing[index] = sums
        tally.counts[index] = tally.counts_before
    tally.figures = {"error_tokens": errors}
    return tally


def batches(tokens: int, size: int) -> list[tuple[int, int]]:
    """First and last (left out) of batches of ``size`` tokens."""
    edges = list(range(0, tokens, size))
    if len(edges) > 1 and tokens - edges[-1] < size / 2:
        edges.pop()
    return list(zip(edges, [*edges[1:], tokens], strict=True))
