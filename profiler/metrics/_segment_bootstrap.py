"""Intervals of SRP: whole sequences are drawn again, and the best threshold is found anew in every resample."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np

from ._arrays import FloatArray, IntArray, ratio
from ._intervals import Rule, interval, resample_weights
from ._segments import best_threshold, histogram_blocks
from ._trace import Trace, available_cores


@dataclass(frozen=True)
class Bootstrap:
    """Settings of a bootstrap."""

    num_resamples: int
    confidence: float
    rule: Rule
    seed: int


class SegmentBootstrap:
    """Histograms and interval ends of one segment length, filled layer by layer.

    histogram (layers, experts, m + 1): windows; ``ends(scope)`` gives the intervals.
    """

    def __init__(self, trace: Trace, length: int, settings: Bootstrap, *, experts: bool) -> None:
        self.length, self.settings, self.each_expert = length, settings, experts
        self.used = trace.lengths >= length  # shorter sequences have no window; they are not drawn either
        sequences = int(self.used.sum())
        self.weights = resample_weights(
            num_sequences=sequences, num_resamples=settings.num_resamples, seed=settings.seed
        )
        self.histogram = np.zeros((trace.num_layers, trace.num_experts, length + 1), dtype=np.int64)
        self.expert_ends = np.full((4, trace.num_layers, trace.num_experts), np.nan)
        self.layer_ends = np.full((4, trace.num_layers), np.nan)
        self.model = np.zeros((sequences, length + 1), dtype=np.int64)
        self.lock = Lock()

    def add_experts(self, layer: int, experts: range, block: IntArray) -> IntArray:
        """Take the windows of some experts, (sequences, experts, m + 1); return their sum over the experts."""
        drawn = block[self.used]
        self.histogram[layer, experts.start : experts.stop] = drawn.sum(axis=0)
        if self.each_expert:
            for index, expert in enumerate(experts):
                self.expert_ends[:, layer, expert] = self._ends(drawn[:, index])
        pooled: IntArray = drawn.sum(axis=1)
        return pooled

    def add_layer(self, layer: int, pooled: IntArray) -> None:
        """Take the windows of a layer summed over its experts, (sequences, m + 1)."""
        self.layer_ends[:, layer] = self._ends(pooled)
        with self.lock:
            self.model += pooled

    def ends(self, scope: str) -> FloatArray:
        """Lower and upper of the value, lower and upper of the router size: (4, ...) by scope."""
        if scope == "model":
            return self._ends(self.model)
        return self.layer_ends if scope == "layer" else self.expert_ends

    def _ends(self, histogram: IntArray) -> FloatArray:
        """The four interval ends of one group; histogram (sequences, m + 1)."""
        value, size, threshold = best_threshold(histogram.sum(axis=0), self.length)
        lower, upper = interval(
            estimate=np.array([value, size]),
            resampled=_resampled_best(self.weights, histogram, self.length, int(threshold)),
            confidence=self.settings.confidence,
            rule=self.settings.rule,
        )
        return np.stack([lower, upper], axis=1).ravel()


def group_interval(
    *, histogram: IntArray, segment_length: int, settings: Bootstrap
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """SRP and router size of windows by group of sequences, (groups, m + 1): estimate, lower, upper, each (2,).

    Groups without a window are not drawn. NaN where there is no window at all.
    """
    drawn = histogram[histogram.any(axis=1)]
    if not len(drawn):
        return (np.full(2, np.nan),) * 3
    weights = resample_weights(num_sequences=len(drawn), num_resamples=settings.num_resamples, seed=settings.seed)
    value, size, threshold = best_threshold(drawn.sum(axis=0), segment_length)
    estimate = np.array([value, size])
    resampled = _resampled_best(weights, drawn, segment_length, int(threshold))
    lower, upper = interval(estimate=estimate, resampled=resampled, confidence=settings.confidence, rule=settings.rule)
    return estimate, lower, upper


def _resampled_best(weights: FloatArray, histogram: IntArray, length: int, threshold: int) -> FloatArray:
    """``best_threshold`` of every resample: value and router size, (resamples, 2).

    weights (resamples, sequences), histogram (sequences, m + 1). Trying every threshold would take m + 1 columns of the
    products below. But to beat a value v, the threshold to take is ceil(m v / 2): windows with 2 f >= m v raise F1
    above v, the others lower it. So value and threshold improve each other until they stand still (Dinkelbach's
    method), from the estimate's threshold on in a handful of steps that touch a handful of thresholds.
    """
    used = np.cumsum((histogram * np.arange(length + 1))[:, ::-1], axis=1)[:, ::-1].astype(np.float64)
    kept = length * np.cumsum(histogram[:, ::-1], axis=1)[:, ::-1].astype(np.float64)
    needed = weights @ used[:, 0]
    thresholds = np.full(len(weights), threshold)
    everyone = np.arange(len(weights))
    for _ in range(length + 2):  # they rise from the second step on
        touched, place = np.unique(thresholds, return_inverse=True)
        slots = (weights @ kept[:, touched])[everyone, place]
        value = ratio(2.0 * (weights @ used[:, touched])[everyone, place], slots + needed, empty=0.0)
        # m v / 2 that is a whole number but for rounding must not push the threshold up
        better = np.ceil(length * value / 2.0 - 1e-9).astype(np.int64)
        if (better == thresholds).all():
            break
        thresholds = better
    return np.stack([value, ratio(slots, needed, empty=0.0)], axis=1)


def bootstrap_segments(
    trace: Trace, lengths: Sequence[int], settings: Bootstrap, *, experts: bool
) -> dict[int, SegmentBootstrap]:
    """One pass over the trace for every segment length; ``experts``: find the ends of every single expert too."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    bootstraps = {length: SegmentBootstrap(trace, length, settings, experts=experts) for length in lengths}

    def add_layer(layer: int) -> None:
        pooled = {length: np.zeros_like(one.model) for length, one in bootstraps.items()}
        for block in histogram_blocks(trace, layer, lengths, per_sequence=True):
            for length, histogram in zip(lengths, block.histograms, strict=True):
                pooled[length] += bootstraps[length].add_experts(layer, block.experts, histogram)
        for length, one in bootstraps.items():
            one.add_layer(layer, pooled[length])

    # the products are small and many: threads of ours over layers, not threads of BLAS inside each
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(available_cores()) as threads:
        list(threads.map(add_layer, range(trace.num_layers)))
    return bootstraps
