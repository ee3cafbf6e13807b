"""Rules that choose by router scores: other numbers of experts than the router's own, more of them included."""

from __future__ import annotations

import numpy as np

from planner.simulate.what_if.blocks import Block, Layer, Scores
from planner.simulate.what_if.tally import Tally, prefix_tally
from profiler.metrics._arrays import FloatArray, IntArray


def top_p(block: Block, layer: Layer, values: FloatArray) -> Tally:
    """The fewest experts whose router probability adds up to more than p: min(E, 1 + #{j: C_j <= p})."""
    scores = stored(block)
    reached = np.minimum(np.cumsum(probabilities(scores), axis=1), 1.0)
    critical = np.zeros_like(reached)
    critical[:, 1:] = -reached[:, :-1]
    whole = scores.ids.shape[1] >= layer.info.num_experts
    return _choose(block, layer, -values, critical, None if whole else -reached[:, -1])


def top_k(block: Block, layer: Layer, values: FloatArray) -> Tally:
    """The k experts with the largest logits."""
    ids = stored(block).ids
    ranks = np.ascontiguousarray(np.broadcast_to(-np.arange(1.0, ids.shape[1] + 1), ids.shape))
    beyond = None if ids.shape[1] >= layer.info.num_experts else np.full(len(ids), -(ids.shape[1] + 1.0))
    return _choose(block, layer, -values, ranks, beyond)


def null_experts(block: Block, layer: Layer, values: FloatArray) -> Tally:
    """Of those chosen, those with a logit above b."""
    critical, missing = chosen_logits(block)
    critical = np.nextafter(critical, -np.inf)
    return prefix_tally(
        ids=block.ids, critical=critical, mass=block.shares, own=block.own, values=values,
        experts=layer.info.num_experts, block=block,
        beyond=np.where(missing, np.where(block.ids >= 0, critical, np.inf).min(1), -np.inf),
    )  # fmt: skip


def stored(block: Block) -> Scores:
    """The scores of a block that was read with them."""
    assert block.scores is not None
    return block.scores


def before(block: Block, layer: Layer, values: int) -> tuple[Tally, IntArray]:
    """A tally in which the choice before is counted, for rules that give each token as many experts as it had; and
    (tokens,) 1 where that is the recorded choice."""
    scores, own = stored(block), block.own
    most = min(int(own.max(initial=1)), scores.ids.shape[1])
    first = Scores(scores.ids[:, :most], scores.logits[:, :most], scores.log_partition)
    tally = Tally.empty(values, most, layer.info.num_experts)
    tally.add_before(first.ids, probabilities(first), own)
    return tally, tally.add_router(block)


_ROUNDED = 1.001
"""A sum of probabilities up to which rounding is let be."""


def probabilities(scores: Scores) -> FloatArray:
    """(tokens, m) softmax over all experts, of those that are stored; 0 = none.

    Logits are stored in 16 bits and their logsumexp is not: where they span so much that the sum would be visibly above
    1, it is 1.
    """
    logits = scores.logits.astype(np.float64) - scores.log_partition.astype(np.float64)[:, None]
    found = np.where(scores.ids >= 0, np.exp(logits), 0.0)
    total = found.sum(axis=1, keepdims=True)
    return found / np.where(total > _ROUNDED, total, 1.0) if (total > _ROUNDED).any() else found


def chosen_logits(block: Block) -> tuple[FloatArray, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """(tokens, k) logit of each chosen expert, or the least stored one where it is lower and not stored; (tokens,)
    whether there is such a one."""
    from planner.simulate.what_if._scores import logits_of

    scores = stored(block)
    found, missing = np.full(block.ids.shape, -np.inf), np.zeros(len(block.ids), bool)
    logits_of(np.ascontiguousarray(block.ids), np.ascontiguousarray(scores.ids), scores.logits, found, missing)
    return found, missing


def _choose(block: Block, layer: Layer, values: FloatArray, critical: FloatArray, beyond: FloatArray | None) -> Tally:
    scores = stored(block)
    return prefix_tally(
        ids=scores.ids, critical=critical, mass=probabilities(scores), own=block.own, values=values, beyond=beyond,
        experts=layer.info.num_experts, block=block,
    )  # fmt: skip
