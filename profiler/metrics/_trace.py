"""What every metric over a trace needs first: checked selections, and a layer's real tokens, one after another."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MetricError

from ._arrays import BoolArray, Ids, IntArray

Item = TypeVar("Item")
Result = TypeVar("Result")


def check_selections(selections: NDArray[Any], num_experts: int) -> Ids:
    """Return ``selections`` as a signed integer array (layers, sequences, tokens, k), or say what is wrong with it."""
    array = np.asarray(selections)
    if array.ndim != 4:
        raise MetricError(f"selections has {array.ndim} axes; it takes 4: (layers, sequences, tokens, k)")
    if not np.issubdtype(array.dtype, np.integer):
        raise MetricError(f"selections holds {array.dtype}; expert ids are integers, -1 = none")
    if num_experts < 1:
        raise MetricError(f"num_experts is {num_experts}; a MoE layer has at least 1 expert")
    if array.shape[3] > num_experts:
        raise MetricError(
            f"selections holds {array.shape[3]} ids per token, but a layer has only {num_experts} experts"
        )
    if array.size == 0:
        raise MetricError(f"selections is empty, shape {array.shape}; there is nothing to measure")
    low, high = int(array.min()), int(array.max())
    if low < -1 or high >= num_experts:
        wrong = low if low < -1 else high
        raise MetricError(
            f"selections holds id {wrong}; with {num_experts} experts ids run from 0 to {num_experts - 1}, -1 = none"
        )
    return array if np.issubdtype(array.dtype, np.signedinteger) else array.astype(np.int32)


def sequence_lengths(selections: Ids) -> IntArray:
    """Number of real tokens per sequence, shape (sequences,): up to the last token that uses an expert in any layer.

    Padding stands only at the end of a sequence. A token in the middle that uses no expert at all counts as a token.
    """
    used = np.zeros((selections.shape[1], selections.shape[2]), dtype=bool)
    for layer in selections:
        used |= (layer >= 0).any(axis=-1)
    tokens = used.shape[1]
    return np.where(used.any(axis=1), tokens - np.argmax(used[:, ::-1], axis=1), 0).astype(np.int64)


@dataclass(frozen=True)
class Trace:
    """Checked selections whose real tokens can be read without padding.

    ``selections`` (layers, sequences, tokens, k); ``lengths`` (sequences,) counts the tokens kept of each sequence,
    ``offsets`` (sequences + 1,) where they begin in ``layer(l)``, ``kept`` (sequences, tokens) marks them.
    """

    selections: Ids
    num_experts: int
    lengths: IntArray
    offsets: IntArray
    kept: BoolArray

    @classmethod
    def of(cls, selections: NDArray[Any], num_experts: int, *, skip_first: bool = False) -> Trace:
        """Check ``selections``; ``skip_first`` leaves out position 0 of every sequence."""
        checked = check_selections(selections, num_experts)
        lengths = sequence_lengths(checked)
        positions = np.arange(checked.shape[2])
        kept = positions < lengths[:, None]
        if skip_first:
            kept &= positions > 0
            lengths = np.maximum(lengths - 1, 0)
        return cls(checked, num_experts, lengths, np.concatenate([[0], np.cumsum(lengths)]), kept)

    @property
    def num_layers(self) -> int:
        return int(self.selections.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.selections.shape[3])

    def layer(self, layer: int) -> Ids:
        """Selections of the kept tokens of one layer, sequence after sequence: (tokens, k)."""
        ids: Ids = self.selections[layer][self.kept]
        return ids


def sequence_runs(offsets: IntArray, tokens: int) -> Iterator[tuple[int, int]]:
    """Split sequences into runs of at most ``tokens`` tokens, or of one longer one: yield low, high (left out)."""
    low, sequences = 0, len(offsets) - 1
    while low < sequences:
        reachable = int(np.searchsorted(offsets, offsets[low] + tokens, side="right")) - 1
        high = min(max(reachable, low + 1), sequences)
        yield low, high
        low = high


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in the order of the items, made by as many threads as there are cores; few wait to be taken."""
    cores = available_cores()
    with ThreadPoolExecutor(cores) as threads:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
