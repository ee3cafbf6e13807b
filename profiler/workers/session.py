"""A watch over the parts of a corpus: each part's shard is written when the part has ended, and depends on it alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

import store as run_store
from profiler.capture.session import WatchSession
from profiler.inspect.memory import FLUSH_BYTES

PACKED_BYTES = 2
"""Of a selection in a trace that is packed."""


class PartSession(WatchSession):
    """A watch that owns no run: the folder is another process's, and shards are handed to a target.

    Attributes:
        published: whether the last part's shard was not there before.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, directory=Path(), flush_seconds=math.inf, origin="collect", **options)
        self.published = False
        self._packed: list[dict[str, pl.DataFrame]] = []

    @property
    def info(self) -> run_store.RunInfo:
        """What the run says of the model and of how it is watched."""
        return self._info

    @contextmanager
    def part(self, number: int, target: run_store.ShardTarget, shard: int) -> Iterator[None]:
        """While entered, the model is watched; what it showed becomes a shard at the end, or is lost.

        Args:
            number: of the part; the first one carries what is read from the weights.
            target: where shards go.
            shard: number of the part's shard.

        Raises:
            ShardError: the target refuses; nothing of the shard is there.
        """
        self._packed.clear()
        self._recording.begin_part(of_model=number == 0)
        with self._observer.attached():
            yield
        frames: dict[str, list[pl.DataFrame]] = {}
        for drained in (*self._packed, self._drained(final=True)):
            for table, frame in drained.items():
                frames.setdefault(table, []).append(frame)
        self._packed.clear()
        filled = run_store.filled_tables(
            {table: pl.concat(several, how="diagonal_relaxed") for table, several in frames.items()}
        )
        self.published = run_store.publish_shard(target, shard, filled, f"shard {shard} of run {self.name!r}")

    def end_batch(self) -> None:
        """What grows with every token is packed now and then: a third of its size."""
        super().end_batch()
        if self._recording.bytes_held > FLUSH_BYTES:
            frames = self._recording.drain_tokens()
            self._packed.append({table: pl.concat(parts, how="diagonal_relaxed") for table, parts in frames.items()})

    def verdicts(self) -> pl.DataFrame:
        """Table ``check``: about all that this process has seen."""
        return self._check_table()
