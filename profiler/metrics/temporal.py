"""Repeats: how often a token uses the experts of the token before it.

Source: Mixtral of Experts (arXiv 2401.04088), section 5 and table 5 (first choice, first or second choice). The mean
overlap at any lag is ours: the published rates grow with k, so they compare badly between models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MetricError

from ._arrays import FloatArray, Ids, IntArray, ratio
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
    everyone = np.zeros(len(trace.lengths), np.int64)
    sums = [
        repeat_sums(
            ids=trace.layer(layer), offsets=trace.offsets, num_experts=num_experts, lags=[lag], group=everyone,
            num_groups=1,
        )[0, 0]
        for layer in range(trace.num_layers)
    ]  # fmt: skip
    counted = np.array(sums)
    rates = ratio(counted[:, :3], counted[:, 3:])
    k = trace.top_k
    return RepeatRates(
        lag=lag,
        first_choice=rates[:, 0],
        any_overlap=rates[:, 1],
        mean_overlap=rates[:, 2],
        pairs=counted[:, 3].astype(np.int64),
        first_choice_chance=1.0 / num_experts,
        any_overlap_chance=1.0 - comb(num_experts - k, k) / comb(num_experts, k) if k <= num_experts else 1.0,
        mean_overlap_chance=k / num_experts,
    )


def repeat_sums(
    *, ids: Ids, offsets: IntArray, num_experts: int, lags: Sequence[int], group: IntArray, num_groups: int
) -> FloatArray:
    """Sums over pairs of tokens of one layer, by lag and group of sequences: (lags, groups, 4); they add up.

    The four: pairs with the same first choice; pairs that share an expert; shared experts over the experts of the later
    token; pairs. The first three over the last are the rates of :class:`RepeatRates`.

    ids (tokens, k), -1 = none, sequence after sequence; offsets (sequences + 1,): where each begins; group
    (sequences,).
    """
    from ._repeats import count_repeats

    sums = np.zeros((len(lags), num_groups, 4))
    count_repeats(np.ascontiguousarray(ids), offsets, np.asarray(lags, np.int64), group, num_experts, sums)
    return sums
