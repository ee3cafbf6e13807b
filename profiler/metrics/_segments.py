"""Windows of a trace: how many of ``m`` consecutive tokens use an expert, as histograms.

For every window of ``m`` consecutive tokens of one sequence (stride 1) and every expert, ``f`` in 0..m counts the
tokens that use the expert. Everything SRP needs is the histogram of ``f``. One step of a window changes the counts of
the experts of two tokens only: the time a count has stood still is added to the histogram when it changes. So the cost
grows with the selections, not with the number of experts or the length of the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ._arrays import FloatArray, Ids, IntArray, ratio
from ._trace import Trace

_BLOCK = 1 << 23  # histogram values that one thread holds at once: 64 MiB


@dataclass(frozen=True)
class SegmentSums:
    """Windows of one segment length m; adds up over blocks of sequences, and over layers where experts do not matter.

    experts (experts, m + 1): windows with f = 0..m, by expert. groups (groups, m + 1): the same by group of sequences,
    summed over experts.
    """

    segment_length: int
    experts: IntArray
    groups: IntArray

    def __add__(self, other: SegmentSums) -> SegmentSums:
        return SegmentSums(self.segment_length, self.experts + other.experts, self.groups + other.groups)


def segment_sums(
    *, ids: Ids, offsets: IntArray, num_experts: int, segment_length: int, group: IntArray, num_groups: int
) -> SegmentSums:
    """Windows of one layer by expert and by group of sequences.

    ids (tokens, k), -1 = none, sequence after sequence; offsets (sequences + 1,): where each begins; group
    (sequences,): the group of each, 0..num_groups - 1.
    """
    from ._windows import count_windows

    experts = np.zeros((1, num_experts, segment_length + 1), np.int64)
    groups = np.zeros((num_groups, segment_length + 1), np.int64)
    rows = np.zeros(len(offsets) - 1, np.int64)
    count_windows(np.ascontiguousarray(ids), offsets, segment_length, 0, rows, group, experts, groups)
    return SegmentSums(segment_length, experts[0], groups)


def window_histograms(
    *, ids: Ids, offsets: IntArray, experts: range, segment_lengths: Sequence[int], per_sequence: bool
) -> list[IntArray]:
    """Histogram of ``f`` over a layer's windows, for each segment length: (sequences, experts, m + 1) int64 each.

    ids (tokens, k): the layer's selections, sequence after sequence; offsets (sequences + 1,): where each sequence
    begins; experts: those to count. Without ``per_sequence`` the sequences are summed and axis 0 has length 1.
    """
    from ._windows import count_windows

    sequences = len(offsets) - 1
    rows = np.arange(sequences) if per_sequence else np.zeros(sequences, np.int64)
    result = []
    for length in segment_lengths:
        histogram = np.zeros((sequences if per_sequence else 1, len(experts), length + 1), np.int64)
        pooled = np.zeros((1, length + 1), np.int64)
        nobody = np.zeros(sequences, np.int64)
        count_windows(np.ascontiguousarray(ids), offsets, length, experts.start, rows, nobody, histogram, pooled)
        result.append(histogram)
    return result


@dataclass(frozen=True)
class Block:
    """Histograms of some experts of one layer, one per segment length: (sequences, len(experts), m + 1)."""

    experts: range
    histograms: list[IntArray]


def histogram_blocks(
    trace: Trace, layer: int, segment_lengths: Sequence[int], *, per_sequence: bool
) -> Iterator[Block]:
    """``window_histograms`` of one layer in blocks of experts small enough to hold."""
    ids = trace.layer(layer)
    per_expert = int(trace.lengths.max())  # the longest sequence is held whole
    if per_sequence:
        per_expert += len(trace.lengths) * sum(length + 1 for length in segment_lengths)
    width = max(1, _BLOCK // per_expert)
    for first in range(0, trace.num_experts, width):
        experts = range(first, min(first + width, trace.num_experts))
        histograms = window_histograms(
            ids=ids,
            offsets=trace.offsets,
            experts=experts,
            segment_lengths=segment_lengths,
            per_sequence=per_sequence,
        )
        yield Block(experts, histograms)


def layer_histograms(trace: Trace, layer: int, segment_lengths: Sequence[int]) -> list[IntArray]:
    """Histograms of one layer over all sequences, one per segment length: (experts, m + 1)."""
    blocks = [block.histograms for block in histogram_blocks(trace, layer, segment_lengths, per_sequence=False)]
    return [np.concatenate(parts, axis=1)[0] for parts in zip(*blocks, strict=True)]


def best_threshold(histogram: IntArray | FloatArray, length: int) -> tuple[FloatArray, FloatArray, IntArray]:
    """The best F1 of a segment router over all thresholds: value, router size, threshold; each of shape (...).

    histogram (..., up to m + 1): weight of the windows with f = 0, 1, ...; length: m. A router that keeps an expert for
    a whole window if and only if f >= threshold keeps P = m x #{f >= threshold} token slots, of which TP = sum of f
    over those windows are really used, out of A = sum of f over all windows. F1 = 2 TP / (P + A); the smallest
    threshold that reaches the maximum is returned; the router size is P / A. Without any use (A = 0) value, size and
    threshold are 0.
    """
    used = histogram * np.arange(histogram.shape[-1])
    true_positives = np.cumsum(used[..., ::-1], axis=-1)[..., ::-1]
    kept = length * np.cumsum(histogram[..., ::-1], axis=-1)[..., ::-1]
    needed = true_positives[..., :1]
    f1 = ratio(2.0 * true_positives, kept + needed, empty=0.0)
    threshold = np.argmax(f1, axis=-1)
    chosen = threshold[..., None]
    value = np.take_along_axis(f1, chosen, axis=-1)[..., 0]
    size = ratio(np.take_along_axis(kept, chosen, axis=-1), needed, empty=0.0)[..., 0]
    return value, size, threshold.astype(np.int64)
