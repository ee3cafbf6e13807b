"""Router probabilities mixed with those of like tokens before: P' = lambda P + (1 - lambda) S P.

S weighs the tokens before in the same sequence by the likeness of their router logits: softmax over
cos(centred logits) / temperature. The papers take likeness from hidden states or attention, which no trace holds.
"""

from __future__ import annotations

import numpy as np

from planner.simulate.what_if.blocks import Block, Layer
from planner.simulate.what_if.choosing import before, stored
from planner.simulate.what_if.tally import Tally
from profiler.metrics._arrays import FloatArray

WINDOW = 16
"""Tokens before that are looked at."""

TEMPERATURE = 0.1
"""Of the cosine: the unlike weigh e^-20 of the same."""


def smooth(block: Block, layer: Layer, values: FloatArray) -> Tally:
    """top-k of P' at each lambda, as many experts as before. Figures, as sums over tokens: ``entropy`` of P' in nats;
    selections that the token before makes, too (``shared``), of ``neighbours``; the same ``_before``."""
    from planner.simulate.what_if._smoothing import smoothed

    scores, tried = stored(block), len(values)
    tally, agreeing = before(block, layer, tried)
    load, sums = np.zeros((tried + 1, layer.info.num_experts), np.int64), np.zeros((tried, 4), np.int64)
    kept, entropy, shared = np.zeros(tried + 1), np.zeros(tried + 1), np.zeros((tried + 1, 2), np.int64)
    smoothed(
        np.ascontiguousarray(scores.ids), scores.logits, scores.log_partition, block.own, agreeing, block.sequence,
        values.astype(np.float32), WINDOW, TEMPERATURE, load, sums, kept, entropy, shared,
    )  # fmt: skip
    tally.load, tally.kept = load[:tried], kept[:tried]
    tally.same, tally.kept_own, tally.added, tally.same_agreeing = sums.T
    tally.counts[:] = tally.counts_before
    figures = {"entropy": entropy, "shared": shared[:, 0].astype(np.float64), "neighbours": shared[:, 1].astype(float)}
    for name, found in figures.items():
        tally.figures[name], tally.figures[f"{name}_before"] = found[:tried], np.full(tried, found[tried])
    return tally
