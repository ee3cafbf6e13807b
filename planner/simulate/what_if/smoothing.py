"""Router probabilities mixed with those of like tokens before: P' = lambda P + (1 - lambda) S P.

S weighs the tokens before in the same sequence by the likeness of their router logits: softmax over
cos(centred logits) / temperature. The papers take likeness from hidden states or attention, which no trace holds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.simulate.what_if.blocks import Block, Layer, Scores
from planner.simulate.what_if.choosing import probabilities, stored
from planner.simulate.what_if.tally import Tally, agreement
from profiler.metrics._arrays import FloatArray

WINDOW = 16
"""Tokens before that are looked at."""

TEMPERATURE = 0.1
"""Of the cosine: the unlike weigh e^-20 of the same."""

_PART = 2048
"""Tokens whose probabilities stay in the cache of a core."""


def smooth(block: Block, layer: Layer, values: FloatArray) -> Tally:
    """top-k of P' at each lambda, as many experts as before. Figures, as sums over tokens: ``entropy`` of P' in nats;
    selections that the token before makes, too (``shared``), of ``neighbours``; the same ``_before``."""
    from planner.simulate.what_if._dense import compare_choice, largest, neighbours, shared_with_previous

    scores, own, experts = stored(block), block.own, layer.info.num_experts
    ids = np.ascontiguousarray(scores.ids)
    known = probabilities(scores)
    probability, direction = dense(scores, known, experts)
    mixed = np.empty_like(probability)
    neighbours(probability, direction, block.sequence, WINDOW, TEMPERATURE, mixed)
    tally = Tally.empty(len(values), ids.shape[1], experts)
    tally.add_before(ids, known, own)
    tally.agreeing = int(agreement(block).sum())
    chosen = np.empty((len(ids), int(own.max(initial=1))), np.int16)
    figures = {name: np.zeros(len(values)) for name in ("entropy", "shared", "neighbours")}
    for index, value in enumerate(values):
        new = np.float32(value) * probability + np.float32(1 - value) * mixed
        largest(new, ids, own, chosen)
        sums = np.zeros(3, np.int64)
        tally.kept[index] = compare_choice(chosen, ids, own, probability, tally.load[index], sums)
        tally.same[index], tally.kept_own[index], tally.added[index] = sums
        tally.counts[index] = tally.counts_before
        figures["entropy"][index] = entropy(new)
        figures["shared"][index], figures["neighbours"][index] = shared_with_previous(
            chosen, own, block.sequence, experts
        )
    before = np.array([entropy(probability), *shared_with_previous(ids, own, block.sequence, experts)], np.float64)
    for name, found in zip(("entropy_before", "shared_before", "neighbours_before"), before, strict=True):
        figures[name] = np.full(len(values), found)
    tally.figures = figures
    return tally


def dense(scores: Scores, known: FloatArray, experts: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(tokens, E) probabilities, what is not stored spread evenly, and centred logits of norm 1.

    Args:
        known: (tokens, m) probabilities of the stored experts.
    """
    from planner.simulate.what_if._dense import spread

    listed = (scores.ids >= 0).sum(1)
    rest = np.maximum(1 - known.sum(1), 0.0) / np.maximum(experts - listed, 1)
    probability = np.empty((len(known), experts), np.float32)
    ids = np.ascontiguousarray(scores.ids)
    spread(ids, known, rest, probability)
    logits = np.empty_like(probability)
    least = np.where(rest > 0, np.log(np.maximum(rest, 1e-30)), 0.0)
    spread(ids, scores.logits - scores.log_partition[:, None], least.astype(np.float32), logits)
    logits -= logits.mean(axis=1, keepdims=True)
    logits /= np.maximum(np.sqrt(np.einsum("ij,ij->i", logits, logits)), np.float32(1e-20))[:, None]
    return probability, logits


def entropy(probability: NDArray[np.float32]) -> float:
    """Sum over tokens of the entropy in nats."""
    total = 0.0
    for first in range(0, len(probability), _PART):
        part = np.maximum(probability[first : first + _PART], np.float32(1e-30))
        total -= float(np.einsum("ij,ij->", part, np.log(part), dtype=np.float64))
    return total
