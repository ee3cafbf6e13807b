"""A few sequences of a long trace, found through the index: what is read of the file does not grow with the trace.

Scanned, sequences that lie far apart touch nearly every page of a table. Through the index each is found alone, in all
layers at once; whoever asks layer by layer asks for the same sequences again, so the last few answers are kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import polars as pl

from moescope import memory
from store.connection import Parameters

SHARE = 8
"""At most one in so many sequences is read through the index; of more, a scan is the shorter way."""

MOST = 128
"""Sequences that are asked for one by one at most: each takes some milliseconds."""

KEPT_BYTES = 48 << 20
"""Of rows that are kept."""

Query = Callable[[str, Parameters], pl.DataFrame]


class Sparse:
    """Rows of the packed trace by sequence; used from any thread.

    Args:
        query: of the run.
        sequences: that the run holds.
        sequence_bytes: of the rows of one of them, about.
    """

    def __init__(self, query: Query, *, sequences: int, sequence_bytes: int) -> None:
        self._query, self._sequences, self._sequence_bytes = query, sequences, sequence_bytes
        self._kept: OrderedDict[tuple[int, ...], pl.DataFrame] = OrderedDict()
        self._lock = threading.Lock()

    def suits(self, sequences: Sequence[int]) -> bool:
        """Whether so few are wanted that the index is the shorter way, and that they can be kept."""
        few = 0 < len(sequences) <= min(MOST, self._sequences // SHARE)
        return few and len(sequences) * self._sequence_bytes <= self._room()

    def chunks(self, sequences: Sequence[int]) -> pl.DataFrame:
        """The packed trace of these sequences in all layers, by layer, step, sequence and start."""
        key = tuple(sorted(set(sequences)))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            # One by one: a second condition would keep DuckDB from using the index.
            each = [self._query("select * from route_chunk where sequence = ?", [number]) for number in key]
            found = pl.concat(each).sort("layer", "step", "sequence", "start")
            self._kept[key] = found
            while len(self._kept) > 1 and sum(one.estimated_size() for one in self._kept.values()) > self._room():
                self._kept.popitem(last=False)
            return found

    def _room(self) -> int:
        return memory.share(0.1, KEPT_BYTES)
