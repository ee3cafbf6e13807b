"""The share of tokens that wait for nothing where only the experts of the token before are at hand: all of their
experts in the layer were used by that token too. What popular experts alone give is said by the shuffled control.
- Formula: free tokens / tokens, where a token is free if its set of experts is contained in the set of the token before
  it in its sequence; the first token of a sequence is not counted
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from profiler.metrics._intervals import interval, resample_weights
from profiler.metrics.metric import Metric

if TYPE_CHECKING:  # profiler.headline imports the registry of metrics; at run time nothing here may import it back
    from profiler.headline.subject import Rows, Subject

CONTROL_TOKENS = 150_000
"""Tokens of whole sequences, drawn at random, on which controls rest."""


def free_token_sums(*, ids: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Free tokens, and tokens that have one before them, of each sequence: (sequences, 2); they add up.

    ids: int (tokens, k) of one layer, -1 = none, sequence after sequence; offsets (sequences + 1,): where each begins.
    """
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    later, earlier = ids[1:], ids[:-1]
    known = (later[:, :, None] == earlier[:, None, :]).any(axis=2) | (later < 0)
    counted = owner[1:] == owner[:-1]
    free = known.all(axis=1) & counted
    sums = [np.bincount(owner[1:], weights=mask, minlength=len(offsets) - 1) for mask in (free, counted)]
    return np.stack(sums, axis=1)


def free_token_rows(subject: Subject) -> Rows:
    """The share in every MoE layer with its interval over sequences, beside shuffled tokens and random experts."""
    if not subject.has_trace or int(subject.lengths.max(initial=0)) < 2:
        return []
    weights = resample_weights(num_sequences=subject.groups.count, num_resamples=1000, seed=0)
    rows: Rows = []
    for axis, layer in enumerate(subject.run.layers):
        place = {"metric": "free_tokens", "layer": layer.layer, "step": layer.step}
        sums = np.zeros((subject.groups.count, 2))
        for block in subject.blocks:
            group = subject.groups.of_block(subject.blocks, block.number)
            np.add.at(sums, group, free_token_sums(ids=subject.ids(axis, block), offsets=block.offsets))
        free, tokens = sums.sum(axis=0)
        drawn = weights @ sums
        low, high = interval(
            estimate=np.asarray(free / tokens), resampled=drawn[:, 0] / np.maximum(drawn[:, 1], 1.0),
            confidence=0.95, rule="percentile",
        )  # fmt: skip
        found = {"value": float(free / tokens), "low": float(low), "high": float(high), "tokens": int(tokens)}
        rows.append({**place, **found})
        sample = subject.sample(CONTROL_TOKENS)
        for control in ("shuffled", "uniform"):
            ids = sample.ids(axis, control=control)
            free, tokens = free_token_sums(ids=ids, offsets=sample.block.offsets).sum(axis=0)
            rows.append({**place, "control": control, "value": float(free / tokens), "tokens": int(tokens)})
    return rows


METRICS = (
    Metric(
        "free_tokens",
        "Free tokens",
        "share",
        "0..1",
        "more tokens need no further expert",
        "ours",
        rows=free_token_rows,
        section=__doc__,
    ),
)
