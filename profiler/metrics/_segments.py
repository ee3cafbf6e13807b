"""Windows of a trace: how many of ``m`` consecutive tokens use an expert, as histograms.

For every window of ``m`` consecutive tokens of one sequence (stride 1) and every expert, ``f`` in 0..m counts the
tokens that use the expert. Everything SRP needs is the histogram of ``f``. A cumulative sum over tokens gives ``f`` for
any ``m`` by one subtraction; sequences are taken in runs so that the working set stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ._arrays import FloatArray, Ids, IntArray, ratio
from ._trace import Trace, sequence_runs

_RUN = 1 << 18  # elements (tokens x experts) of one cumulative sum: 2 MiB, about a core's second-level cache
_BLOCK = 1 << 23  # cumulative and histogram values that one thread holds at once: 64 MiB


def window_histograms(
    *, ids: Ids, offsets: IntArray, experts: range, segment_lengths: Sequence[int], per_sequence: bool
) -> list[IntArray]:
    """Histogram of ``f`` over a layer's windows, for each segment length: (sequences, experts, m + 1) int64 each.

    ids (tokens, k): the layer's selections, sequence after sequence; offsets (sequences + 1,): where each sequence
    begins; experts: those to count. Without ``per_sequence`` the sequences are summed and axis 0 has length 1.
    """
    sequences = len(offsets) - 1 if per_sequence else 1
    result = [np.zeros((sequences, len(experts), length + 1), dtype=np.int64) for length in segment_lengths]
    for low, high, cumulative in _cumulative_runs(ids, offsets, experts):
        for histogram, length in zip(result, segment_lengths, strict=True):
            starts, sequence = _window_starts(offsets[low : high + 1], length)
            bins = cumulative[starts + length]
            bins -= cumulative[starts]
            bins += np.arange(len(experts)) * (length + 1)
            part = histogram[low:high] if per_sequence else histogram
            if per_sequence:
                bins += (sequence * part[0].size)[:, None]
            part += np.bincount(bins.ravel(), minlength=part.size).reshape(part.shape)
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


def _cumulative_runs(ids: Ids, offsets: IntArray, experts: range) -> Iterator[tuple[int, int, IntArray]]:
    """Yield (low, high, cumulative) for runs of whole sequences low..high-1; cumulative (tokens + 1, experts) counts
    the uses of each expert before each token of the run.
    """
    for low, high in sequence_runs(offsets, max(1, _RUN // len(experts))):
        run = ids[offsets[low] : offsets[high]]
        mine = (run >= experts.start) & (run < experts.stop)
        used = np.zeros((len(run) + 1, len(experts)), dtype=np.int64)
        used[np.nonzero(mine)[0] + 1, run[mine].astype(np.int64) - experts.start] = 1
        yield low, high, np.cumsum(used, axis=0, out=used)


def _window_starts(offsets: IntArray, length: int) -> tuple[IntArray, IntArray]:
    """First token of every window, and its sequence, both counted from the start of the first sequence."""
    windows = np.maximum(np.diff(offsets) - length + 1, 0)
    sequence = np.repeat(np.arange(len(windows)), windows)
    before = np.cumsum(windows) - windows
    return np.arange(windows.sum()) - before[sequence] + (offsets[:-1] - offsets[0])[sequence], sequence
