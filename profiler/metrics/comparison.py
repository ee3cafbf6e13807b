"""Two runs on the same tokens: how far they select the same experts, where they do not, and what that moves.

Source of the overlap, as router saturation of a checkpoint against the last one: OLMoE (arXiv 2409.02060), section 5.1.
The other figures are standard set comparisons; the baselines and the margins from gate weights are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MetricError

from ._arrays import BoolArray, FloatArray, Ids, IntArray, ratio
from ._intervals import Resamples, check_bootstrap, interval, jackknife

AGREEMENTS = ("overlap", "exact", "first_choice", "jaccard")
"""What is summed over tokens, in the order of the columns of :func:`agreement_sums`; tokens stand behind them."""

SHARES = np.linspace(0.0, 1.0, 21)
"""Edges of histograms of shares."""

LOGITS = np.concatenate([[0.0], 2.0 ** np.arange(-9, 4), [np.inf]])
"""Edges of histograms of margins between logits: doubling, for flips gather at the smallest."""

MARGINS = {"boundary_margin": LOGITS, "left_weight": SHARES, "weight_gap": SHARES}
"""What is counted of tokens that flip, with the edges of its histogram; the first one also of those that do not."""


@dataclass(frozen=True)
class TokenAgreement:
    """How far two selections agree, token by token; all (tokens,) unless said otherwise.

    counted: whether both use an expert there; the figures of other tokens are 0. overlap: shared experts over the
    experts of the larger selection. exact: the same set. first_choice: the same expert in front. jaccard: shared
    experts over those that either uses. kept: (tokens, k) which experts of the first selection the second has too.
    """

    counted: BoolArray
    overlap: FloatArray
    exact: BoolArray
    first_choice: BoolArray
    jaccard: FloatArray
    kept: BoolArray

    @property
    def flipped(self) -> BoolArray:
        """(tokens,) counted tokens whose sets differ."""
        return self.counted & ~self.exact


def token_agreement(*, first: Ids, second: Ids) -> TokenAgreement:
    """Agreement of two selections of the same tokens.

    first, second: int (tokens, k), in descending weight, each expert at most once in a row, -1 = none; k may differ.

    Raises:
        MetricError: the selections are not of the same number of tokens.
    """
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        raise MetricError(f"selections are {first.shape} and {second.shape}; both are (tokens, k) of the same tokens")
    kept = np.zeros(first.shape, bool)
    for column in second.T:
        kept |= first == column[:, None]
    kept &= first >= 0
    used, other = (first >= 0).sum(1), (second >= 0).sum(1)
    shared = kept.sum(1)
    counted = (used > 0) & (other > 0)
    kept[~counted] = False
    return TokenAgreement(
        counted=counted,
        overlap=ratio(shared, np.where(counted, np.maximum(used, other), 0), empty=0.0),
        exact=counted & (shared == used) & (shared == other),
        first_choice=counted & (first[:, 0] == second[:, 0]),
        jaccard=ratio(shared, np.where(counted, used + other - shared, 0), empty=0.0),
        kept=kept,
    )


def agreement_sums(*, tokens: TokenAgreement, group: IntArray, num_groups: int) -> FloatArray:
    """Sums over tokens by group, (groups, 5): the four of :data:`AGREEMENTS`, and the tokens counted. They add up.

    group (tokens,): group of each token.
    """
    columns = [*(getattr(tokens, name) for name in AGREEMENTS), tokens.counted]
    return np.stack([np.bincount(group, weights=column, minlength=num_groups) for column in columns], axis=1)


def load_sums(*, ids: Ids, group: IntArray, num_groups: int, num_experts: int) -> IntArray:
    """Selections of each expert by group, (groups, experts). ids (tokens, k), -1 = none; group (tokens,)."""
    cells = group[:, None] * num_experts + ids
    counts = np.bincount(cells[ids >= 0], minlength=num_groups * num_experts)
    result: IntArray = counts.astype(np.int64).reshape(num_groups, num_experts)
    return result


@dataclass(frozen=True)
class Intervals:
    """A figure with the ends of its interval over sequences; the ends are NaN below two groups of sequences."""

    value: FloatArray
    low: FloatArray
    high: FloatArray


def agreement(
    *, sums: FloatArray, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Intervals]:
    """Mean agreement by name, with percentile intervals from drawing groups of sequences anew.

    sums: (groups, 5) or (groups, layers, 5) as :func:`agreement_sums`; all layers are drawn together.
    """
    check_bootstrap(num_resamples=num_resamples, confidence=confidence, rule="percentile")
    total = sums.sum(0)
    value = ratio(total[..., :-1], total[..., -1:])
    low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
    if len(sums) > 1:
        drawn = Resamples.of(len(sums), num_resamples=num_resamples, seed=seed, max_groups=len(sums)).sums(sums)
        means = np.where(total[..., -1:] > 0, ratio(drawn[..., :-1], drawn[..., -1:], empty=0.0), np.nan)
        low, high = interval(estimate=value, resampled=means, confidence=confidence, rule="percentile")
    return {
        name: Intervals(value[..., index], low[..., index], high[..., index]) for index, name in enumerate(AGREEMENTS)
    }


def chance_overlap(*, top_k: tuple[float, float], num_experts: int) -> float:
    """Overlap of two independent, uniformly random selections: k / E, of two sizes the smaller over E."""
    return min(top_k) / num_experts


def chance_agreement(*, top_k: tuple[int, int], sizes: tuple[IntArray, IntArray]) -> tuple[float, float]:
    """Overlap, and share of equal first choices, of two independent, uniformly random selections, where experts go by
    names: what became one goes by one name.

    Args:
        top_k: experts that each run selects.
        sizes: for each run (names,) how many of its experts go by each name. With one each: k / E and 1 / E.
    """
    taken = [_reached(size, k) for size, k in zip(sizes, top_k, strict=True)]
    firsts = [size / max(int(size.sum()), 1) for size in sizes]
    most = max(float(one.sum()) for one in taken)
    return float(taken[0] @ taken[1]) / most if most else float("nan"), float(firsts[0] @ firsts[1])


def _reached(size: IntArray, top_k: int) -> FloatArray:
    """(names,) chance that one of the experts of a name is among ``top_k`` random ones of all."""
    experts, missed = int(size.sum()), np.ones(len(size))
    for drawn in range(min(top_k, experts)):
        missed *= np.clip(experts - size - drawn, 0, None) / (experts - drawn)
    return np.asarray(1.0 - missed)


def popularity_overlap(*, first: IntArray, second: IntArray, tokens: int) -> float:
    """Overlap that the experts' popularity alone gives: each token of one run beside any token of the other.

    first, second: (experts,) selections of each expert over the same ``tokens`` tokens. Exact where every token uses
    the same number of experts: the expectation under shuffling the tokens of one run. NaN without tokens.
    """
    largest = max(int(first.sum()), int(second.sum()))
    product = float(first.astype(np.float64) @ second.astype(np.float64))
    return product / (float(tokens) * largest) if tokens and largest else float("nan")


@dataclass(frozen=True)
class LoadDifference:
    """How differently two runs load the experts of a layer.

    total_variation: share of the selections that would have to move, 0..1, with a jackknife interval over groups of
    sequences. difference: (experts,) share of the second run's selections minus that of the first.
    """

    total_variation: Intervals
    difference: FloatArray


def load_difference(*, first: IntArray, second: IntArray, confidence: float = 0.95) -> LoadDifference:
    """Load of the second run against the first, from selections by group: (groups, experts) each."""
    totals = first.sum(0), second.sum(0)
    moved = np.asarray(_total_variation(*totals))
    without = _total_variation(totals[0] - first, totals[1] - second)
    defined = without[np.isfinite(without)]
    low, high = jackknife(estimate=moved, without=defined, confidence=confidence)
    return LoadDifference(
        Intervals(moved, np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)), _shares(totals[1]) - _shares(totals[0])
    )


def _shares(counts: NDArray[Any]) -> FloatArray:
    return ratio(counts, counts.sum(-1, keepdims=True))


def _total_variation(first: NDArray[Any], second: NDArray[Any]) -> FloatArray:
    moved: FloatArray = 0.5 * np.abs(_shares(second) - _shares(first)).sum(-1)
    return moved


def left_weight(*, ids: Ids, weights: NDArray[np.floating[Any]], kept: BoolArray) -> FloatArray:
    """(tokens,) share of a token's gate weight that lay on experts which the other run does not select: 0..1.

    kept (tokens, k): of :class:`TokenAgreement`. NaN for tokens without weight.
    """
    held = np.where(ids >= 0, weights, 0.0).astype(np.float64)
    return ratio(np.where(kept, 0.0, held).sum(1), held.sum(1))


def weight_gap(
    *, first: Ids, first_weights: NDArray[np.floating[Any]], second: Ids, second_weights: NDArray[np.floating[Any]]
) -> FloatArray:
    """(tokens,) how differently the experts that left and those that came weigh: 0..1.

    The share of gate weight that left in the first run against the share that came in the second: near 0 the router
    saw a tie that rounding decides, near 1 it changed its mind. NaN for tokens without weight in either run.
    """
    left = left_weight(ids=first, weights=first_weights, kept=token_agreement(first=first, second=second).kept)
    came = left_weight(ids=second, weights=second_weights, kept=token_agreement(first=second, second=first).kept)
    gap: FloatArray = np.abs(left - came)
    return gap


def boundary_margin(*, ids: Ids, logits: NDArray[np.floating[Any]]) -> FloatArray:
    """(tokens,) logit of the last expert taken minus that of the next, from 0: what a change has to overcome.

    ids (tokens, k): the selection, -1 = none; logits (tokens, m): the largest router logits in descending order. NaN
    where no further logit is known. As in :mod:`profiler.metrics.confidence`, a hint only for routers that choose by
    other than their logits.
    """
    used = (ids >= 0).sum(1)
    rows = np.flatnonzero((used > 0) & (used < logits.shape[1]))
    result = np.full(len(ids), np.nan)
    result[rows] = logits[rows, used[rows] - 1].astype(np.float64) - logits[rows, used[rows]]
    return result


def histogram(*, values: FloatArray, edges: FloatArray) -> IntArray:
    """(bins,) how many values lie between each two of the rising edges, the lower one included; NaN is left out.

    Values beyond the edges count in the first and the last bin.
    """
    place = np.searchsorted(edges[1:-1], values[~np.isnan(values)], side="right")
    counts: IntArray = np.bincount(place, minlength=len(edges) - 1).astype(np.int64)
    return counts


def router_saturation(*, selections: Ids, final: Ids) -> FloatArray:
    """(layers,) share of the last checkpoint's experts that an earlier one selects already, mean over tokens: 0..1.

    selections, final: int (layers, tokens, k) of the same tokens, -1 = none. Source: OLMoE, section 5.1.
    """
    result = np.full(len(final), np.nan)
    for layer in range(len(final)):
        tokens = token_agreement(first=selections[layer], second=final[layer])
        result[layer] = float(ratio(tokens.overlap.sum(), tokens.counted.sum()))
    return result
