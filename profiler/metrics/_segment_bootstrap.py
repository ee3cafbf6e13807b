"""Intervals of SRP: whole sequences are drawn again, and the best threshold is found anew in every resample."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np

from ._arrays import FloatArray, IntArray
from ._intervals import Rule, interval, resample_weights
from ._segments import best_threshold, histogram_blocks
from ._trace import Trace, available_cores

_VALUES = 1 << 16  # resampled histogram values evaluated at once: 512 KiB, inside a core's cache


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
        # f never above the largest seen: thresholds beyond it keep nothing and cannot win
        seen = int(np.flatnonzero(histogram.any(axis=0)).max(initial=0)) + 1
        dense = histogram[:, :seen].astype(np.float64)
        resampled = np.empty((len(self.weights), 2))
        rows = max(1, _VALUES // seen)
        for first in range(0, len(self.weights), rows):
            part = slice(first, first + rows)
            resampled[part, 0], resampled[part, 1], _ = best_threshold(self.weights[part] @ dense, self.length)
        value, size, _ = best_threshold(dense.sum(axis=0), self.length)
        settings = self.settings
        lower, upper = interval(
            estimate=np.array([value, size]),
            resampled=resampled,
            confidence=settings.confidence,
            rule=settings.rule,
        )
        return np.stack([lower, upper], axis=1).ravel()


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
