"""SRP, segment routing best performance: can one fixed set of experts serve a whole stretch of text?

Source: "Not all models suit expert offloading: on local routing consistency of mixture-of-expert models" (arXiv
2505.16056), section 2.2 and appendix C. The published code stops early when there are fewer sequences than ``m``,
takes only powers of two, and counts in 8 bits (more than 128 experts are corrupt); here any ``m`` and any number of
experts and sequences is exact. Ids are the model's own selections; the published code derives them again from
bfloat16 logits, where ties fall at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MetricError

from ._arrays import FloatArray, IntArray, ratio
from ._intervals import Rule, check_bootstrap
from ._segment_bootstrap import Bootstrap, bootstrap_segments
from ._segments import best_threshold, layer_histograms
from ._trace import Trace, available_cores

Scope = Literal["model", "layer", "expert"]


@dataclass(frozen=True)
class SegmentRouting:
    """SRP of one segment length; arrays of shape () for scope "model", (layers,) or (layers, experts) for the others.

    value: best F1, 0..1. router_size: token slots the best segment router keeps, over those really used (paper:
    rho-hat), from 0. threshold: uses per window from which it keeps an expert, 0..m. activation_ratio: share of
    token slots that use the experts. windows: number of windows per expert; sequences_used: sequences at least
    ``segment_length`` long, the others contribute nothing.
    """

    segment_length: int
    scope: Scope
    value: FloatArray
    router_size: FloatArray
    threshold: IntArray
    activation_ratio: FloatArray
    windows: int
    sequences_used: int

    @property
    def lower_bound(self) -> FloatArray:
        """2a / (1 + a) with a the activation ratio: what keeping every expert all the time reaches."""
        return 2.0 * self.activation_ratio / (1.0 + self.activation_ratio)


@dataclass(frozen=True)
class SegmentRoutingInterval:
    """SRP with a bootstrap interval over sequences; the ends have the shapes of ``estimate.value``."""

    estimate: SegmentRouting
    lower: FloatArray
    upper: FloatArray
    router_size_lower: FloatArray
    router_size_upper: FloatArray
    confidence: float
    rule: Rule
    num_resamples: int


def srp(
    *, selections: NDArray[Any], num_experts: int, segment_length: int, scope: Scope = "model", skip_first: bool = False
) -> SegmentRouting:
    """SRP and its router size for windows of ``segment_length`` tokens.

    Every window of contiguous real tokens of one sequence counts (stride 1, never across sequences). One threshold
    serves the whole group: the expert, the layer (histograms of its experts summed first), or the model. It is not a
    mean of its members' SRPs.

    Args:
        selections: int (layers, sequences, tokens, k), -1 = none, padding at the end of a sequence.
        num_experts: experts per layer.
        segment_length: m, tokens per window, from 1; any number, not only powers of two.
        scope: "model", "layer" or "expert"; says the shape of the result.
        skip_first: leave out position 0 of every sequence, where models often route unlike anywhere else.

    Raises:
        MetricError: selections out of shape or range, segment_length below 1, or no sequence of that length.
    """
    table = srp_table(
        selections=selections,
        num_experts=num_experts,
        segment_lengths=[segment_length],
        scopes=[scope],
        skip_first=skip_first,
    )
    return table[segment_length, scope]


def srp_table(
    *,
    selections: NDArray[Any],
    num_experts: int,
    segment_lengths: Sequence[int] = (4, 16, 64, 256),
    scopes: Sequence[Scope] = ("model", "layer", "expert"),
    skip_first: bool = False,
) -> dict[tuple[int, Scope], SegmentRouting]:
    """``srp`` for several segment lengths and scopes in one pass over the trace, keyed (segment_length, scope).

    Raises:
        MetricError: as ``srp``; a length that no sequence reaches is named.
    """
    trace = Trace.of(selections, num_experts, skip_first=skip_first)
    _check(trace, segment_lengths, scopes)

    with ThreadPoolExecutor(available_cores()) as threads:
        numbers = range(trace.num_layers)
        layers = list(threads.map(lambda layer: layer_histograms(trace, layer, segment_lengths), numbers))
    table: dict[tuple[int, Scope], SegmentRouting] = {}
    for length, histograms in zip(segment_lengths, zip(*layers, strict=True), strict=True):
        for scope in scopes:
            table[length, scope] = _evaluate(trace, np.stack(histograms), length, scope)
    return table


def srp_bootstrap(
    *,
    selections: NDArray[Any],
    num_experts: int,
    segment_length: int,
    scope: Scope = "model",
    skip_first: bool = False,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    rule: Rule = "basic",
    seed: int = 0,
) -> SegmentRoutingInterval:
    """SRP with an interval from resampling whole sequences; the threshold is chosen anew in every resample.

    Args as ``srp``, and:
        rule: "basic" (the published code's, reversed) or "percentile"; docs/metrics.md says how they differ.
        seed: of the resampling; the same seed draws the same sequences at every scope.

    Raises:
        MetricError: as ``srp``; fewer than 2 resamples, or a confidence outside 0..1.
    """
    table = srp_bootstrap_table(
        selections=selections,
        num_experts=num_experts,
        segment_lengths=[segment_length],
        scopes=[scope],
        skip_first=skip_first,
        num_resamples=num_resamples,
        confidence=confidence,
        rule=rule,
        seed=seed,
    )
    return table[segment_length, scope]


def srp_bootstrap_table(
    *,
    selections: NDArray[Any],
    num_experts: int,
    segment_lengths: Sequence[int] = (4, 16, 64, 256),
    scopes: Sequence[Scope] = ("model", "layer", "expert"),
    skip_first: bool = False,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    rule: Rule = "basic",
    seed: int = 0,
) -> dict[tuple[int, Scope], SegmentRoutingInterval]:
    """``srp_bootstrap`` for several segment lengths and scopes in one pass over the trace.

    Raises:
        MetricError: as ``srp_bootstrap``; a length that no sequence reaches is named.
    """
    check_bootstrap(num_resamples=num_resamples, confidence=confidence, rule=rule)
    trace = Trace.of(selections, num_experts, skip_first=skip_first)
    _check(trace, segment_lengths, scopes)
    settings = Bootstrap(num_resamples, confidence, rule, seed)
    table: dict[tuple[int, Scope], SegmentRoutingInterval] = {}
    for length, one in bootstrap_segments(trace, segment_lengths, settings, experts="expert" in scopes).items():
        for scope in scopes:
            estimate = _evaluate(trace, one.histogram, length, scope)
            value_low, value_high, size_low, size_high = one.ends(scope)
            table[length, scope] = SegmentRoutingInterval(
                estimate, value_low, value_high, size_low, size_high, confidence, rule, num_resamples
            )
    return table


def srp_expert_choice(
    *,
    selections: NDArray[Any],
    num_experts: int,
    segment_length: int,
    scope: Literal["model", "layer"] = "layer",
    skip_first: bool = False,
) -> FloatArray:
    """SRP of a layer, (layers,), or of the model, (), when every expert has a threshold of its own.

    The sum over experts of F1 (P + A) over the sum of P + A. Used in the paper's case study only. Not a maximum over
    thresholds, so it may lie on either side of ``srp``.
    """
    experts = srp(
        selections=selections,
        num_experts=num_experts,
        segment_length=segment_length,
        scope="expert",
        skip_first=skip_first,
    )
    if scope not in ("model", "layer"):
        raise MetricError(f"scope is {scope!r}; experts choose for themselves within a 'layer' or the 'model'")
    # (A + P) over m x windows, the same divisor for every expert
    slots = experts.activation_ratio * (1.0 + experts.router_size)
    axis = -1 if scope == "layer" else None
    weighted, total = (experts.value * slots).sum(axis=axis), slots.sum(axis=axis)
    return ratio(weighted, total, empty=0.0)


def srp_uniform(*, num_experts: int, top_k: float, segment_length: int) -> SegmentRouting:
    """The exact SRP of independent, uniformly random routing, f ~ Binomial(m, k/E): the reading of no consistency.

    top_k may be fractional where tokens use different numbers of experts: then the mean. ``windows`` is 0: nothing
    was counted.
    """
    if segment_length < 1:
        raise MetricError(f"segment_length is {segment_length}; a segment has at least 1 token")
    if not 0 < top_k <= num_experts:
        raise MetricError(f"top_k is {top_k} with {num_experts} experts; it lies above 0 and at most num_experts")
    from scipy.stats import binom

    share = np.asarray(top_k / num_experts, dtype=np.float64)
    histogram = np.asarray(binom.pmf(np.arange(segment_length + 1), segment_length, share), dtype=np.float64)
    value, size, threshold = best_threshold(histogram, segment_length)
    return SegmentRouting(segment_length, "model", value, size, threshold, share, windows=0, sequences_used=0)


def _evaluate(trace: Trace, histogram: IntArray, length: int, scope: Scope) -> SegmentRouting:
    """SRP by scope from the histograms (layers, experts, m + 1)."""
    windows = int(histogram[0, 0].sum())
    members = {"model": histogram.shape[0] * histogram.shape[1], "layer": histogram.shape[1], "expert": 1}[scope]
    grouped = {"model": histogram.sum(axis=(0, 1)), "layer": histogram.sum(axis=1), "expert": histogram}[scope]
    value, size, threshold = best_threshold(grouped, length)
    used = grouped @ np.arange(length + 1)
    share = np.asarray(used / (length * windows * members), dtype=np.float64)
    sequences = int((trace.lengths >= length).sum())
    return SegmentRouting(length, scope, value, size, threshold, share, windows, sequences)


def _check(trace: Trace, lengths: Sequence[int], scopes: Sequence[Scope]) -> None:
    """Refuse segment lengths that no sequence reaches, and unknown scopes."""
    longest = int(trace.lengths.max())
    for length in lengths:
        if length < 1:
            raise MetricError(f"segment_length is {length}; a segment has at least 1 token")
        if length > longest:
            raise MetricError(f"segment_length is {length}, but the longest sequence has {longest} tokens: take less")
    for scope in scopes:
        if scope not in get_args(Scope):
            raise MetricError(f"scope is {scope!r}; choose one of {', '.join(get_args(Scope))}")
