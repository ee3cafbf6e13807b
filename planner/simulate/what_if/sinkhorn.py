"""The price of balance: the entropic transport plan that gives all experts of a batch the same mass.

Rows of the plan add up to 1, columns to tokens / E; it maximises <plan, logits> + its entropy. Without the columns it
would be the router's softmax.
"""

from __future__ import annotations

import numpy as np

from planner.simulate.what_if.blocks import Block, Layer
from planner.simulate.what_if.choosing import probabilities, stored
from planner.simulate.what_if.tally import Tally, agreement
from profiler.metrics._arrays import FloatArray

TOLERANCE = 1e-7
"""Largest relative error of a column."""

ROUNDS = 500
"""Most scalings of a batch; fifty are usual."""


_LEAST = 1e-280


def balance(block: Block, layer: Layer, values: FloatArray) -> Tally:
    """top-k of the plan of each batch of ``values`` tokens, as many experts as before.

    A last batch of less than half the size joins the one before. Figure ``error_tokens``: error of the columns, summed
    over tokens.
    """
    from planner.simulate.what_if._dense import compare_choice, largest, spread, transport

    scores, own, experts = stored(block), block.own, layer.info.num_experts
    ids = np.ascontiguousarray(scores.ids)
    known = probabilities(scores)
    probability = np.empty((len(ids), experts))
    # A column must have some mass to be scaled, however small.
    spread(ids, np.maximum(known, _LEAST), np.full(len(ids), _LEAST), probability)
    tally = Tally.empty(len(values), ids.shape[1], experts)
    tally.add_before(ids, known, own)
    tally.agreeing = int(agreement(block).sum())
    chosen, column = np.empty((len(ids), int(own.max(initial=1))), np.int16), np.empty(experts)
    errors = np.zeros(len(values))
    for index, value in enumerate(values):
        for first, last in batches(len(ids), int(value)):
            part = slice(first, last)
            error = transport(probability[part], TOLERANCE, ROUNDS, column)
            errors[index] += error * (last - first)
            largest(probability[part] * column, ids[part], own[part], chosen[part])
        sums = np.zeros(3, np.int64)
        tally.kept[index] = compare_choice(chosen, ids, own, probability, tally.load[index], sums)
        tally.same[index], tally.kept_own[index], tally.added[index] = sums
        tally.counts[index] = tally.counts_before
    tally.figures = {"error_tokens": errors}
    return tally


def batches(tokens: int, size: int) -> list[tuple[int, int]]:
    """First and last (left out) of batches of ``size`` tokens."""
    edges = list(range(0, tokens, size))
    if len(edges) > 1 and tokens - edges[-1] < size / 2:
        edges.pop()
    return list(zip(edges, [*edges[1:], tokens], strict=True))
