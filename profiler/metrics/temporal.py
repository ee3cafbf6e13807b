"""Repeats: how often a token uses the experts of the token before it.

Source: Mixtral of Experts (arXiv 2401.04088), section 5 and table 5 (first choice, first or second choice). The mean
overlap at any lag is ours: the published rates grow with k, so they compare badly between models.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MetricError

from ._arrays import FloatArray, Ids
from ._trace import Trace


@dataclass(frozen=True)
class RepeatRates:
    """Per layer, (layers,), each 0..1; NaN where no pair counts. Chance values are those of uniformly random routing.

    first_choice: pairs of tokens with the same first choice. any_overlap: pairs that share at least one expert.
    mean_overlap: shared experts over the experts of the later token, averaged. pairs: (layers,) pairs counted.
    """

    lag: int
    first_choice: FloatArray
    any_overlap: FloatArray
    mean_overlap: FloatArray
    pairs: NDArray[np.int64]
    first_choice_chance: float
    any_overlap_chance: float
    mean_overlap_chance: float


def repeat_rates(*, selections: NDArray[Any], num_experts: int, lag: int = 1) -> RepeatRates:
    """Repeat rates between tokens ``lag`` apart inside a sequence.

    selections: int (layers, sequences, tokens, k) in descending weight, -1 = none. Pairs in which a token uses no
    expert are left out.

    Raises:
        MetricError: selections out of shape or range, lag below 1, or no sequence longer than ``lag``.
    """
    trace = Trace.of(selections, num_experts)
    longest = int(trace.lengths.max())
    if not 1 <= lag < longest:
        raise MetricError(
            f"lag is {lag}; the longest sequence has {longest} tokens, so it lies between 1 and {longest - 1}"
        )
    both = trace.kept[:, lag:]  # padding stands at the end: the earlier token of a kept one is kept
    rates = np.array([_layer_rates(layer[:, :-lag][both], layer[:, lag:][both]) for layer in trace.selections])
    k = trace.top_k
    return RepeatRates(
        lag=lag,
        first_choice=rates[:, 0],
        any_overlap=rates[:, 1],
        mean_overlap=rates[:, 2],
        pairs=rates[:, 3].astype(np.int64),
        first_choice_chance=1.0 / num_experts,
        any_overlap_chance=1.0 - comb(num_experts - k, k) / comb(num_experts, k) if k <= num_experts else 1.0,
        mean_overlap_chance=k / num_experts,
    )


def _layer_rates(earlier: Ids, later: Ids) -> tuple[float, float, float, float]:
    """The three rates and the number of pairs; earlier, later (pairs, k)."""
    routed = (earlier >= 0).any(axis=1) & (later >= 0).any(axis=1)
    before, after = earlier[routed], later[routed]
    if not len(before):
        return np.nan, np.nan, np.nan, 0.0
    shared = np.zeros(len(before), dtype=np.int64)
    for rank in range(after.shape[1]):  # k comparisons of (pairs, k): no (pairs, k, k) array
        one = after[:, rank : rank + 1]
        shared += ((before == one) & (one >= 0)).any(axis=1)
    overlap = shared / (after >= 0).sum(axis=1)
    return float((before[:, 0] == after[:, 0]).mean()), float((shared > 0).mean()), float(overlap.mean()), len(before)
