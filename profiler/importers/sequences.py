"""The sequences of an import: what has been seen of each, and their tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moescope.errors import ImportFileError
from profiler.importers.blocks import Arranged
from profiler.importers.recording import SequenceLabel
from store.trace import chunk_edges, list_series

MAX_SEQUENCES = 1 << 26


@dataclass
class SequenceBook:
    """Counts tokens per sequence and holds the labels; refuses positions that are missing or come twice.

    Args:
        labels: filled by the reader, at the latest before a sequence's first block.
        domain: of sequences without a label.
    """

    labels: dict[int, SequenceLabel]
    domain: str
    tokens: int = 0
    has_text: bool = False
    _next: dict[int, int] = field(default_factory=dict)
    _prompt: dict[int, int] = field(default_factory=dict)
    _seen_ids: set[int] = field(default_factory=set)

    def add(self, block: Arranged, path: Path) -> tuple[list[tuple[str, str]], NDArray[np.int64]]:
        """Count a block's tokens; returns its (domain, phase) groups and each token's index among them.

        Raises:
            ImportFileError: a sequence does not go on where it stopped.
        """
        groups: dict[tuple[str, str], int] = {}
        group = np.zeros(len(block.sequence), np.int64)
        edges = np.append(np.flatnonzero(np.diff(block.sequence, prepend=-1)), len(block.sequence))
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            number, first = int(block.sequence[low]), int(block.position[low])
            expected = self._next.get(number, 0)
            steps = np.diff(block.position[low:high])
            if not 0 <= number < MAX_SEQUENCES or first != expected or (steps != 1).any():
                raise ImportFileError(
                    f"{path}: sequence {number} stands at token {first} where token {expected} is due, or skips tokens;"
                    " positions count from 0 without gaps (tokens that are not known are rows of -1)"
                )
            self._next[number] = first + high - low
            self._prompt[number] = self._prompt.get(number, 0) + int((~block.generated[low:high]).sum())
            domain = self.labels[number].domain if number in self.labels else self.domain
            for phase, flag in (("prompt", False), ("decode", True)):
                mine = block.generated[low:high] == flag
                if mine.any():
                    group[low:high][mine] = groups.setdefault((domain, phase), len(groups))
        self.tokens += len(block.sequence)
        return list(groups), group

    def text_frame(self, block: Arranged) -> pl.DataFrame | None:
        """Rows of table ``sequence_token``; None where the block has no token ids."""
        if block.token_ids is None:
            return None
        self.has_text = True
        self._seen_ids.update(np.unique(block.token_ids).tolist())
        edges = chunk_edges(block.sequence, block.position)
        parts = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
        ids = block.token_ids.astype(np.uint32)
        return pl.DataFrame(
            {
                "sequence": pl.Series(block.sequence[edges[:-1]], dtype=pl.UInt32),
                "start": pl.Series(block.position[edges[:-1]], dtype=pl.UInt32),
                "token_ids": list_series([ids[low:high] for low, high in parts], pl.UInt32),
                "special": list_series([np.zeros(high - low, bool) for low, high in parts], pl.Boolean),
            }
        )

    def frames(self, vocabulary: dict[int, bytes]) -> dict[str, pl.DataFrame]:
        """Tables ``sequence`` and ``vocabulary``."""
        numbers = sorted(self._next)
        frames = {}
        if numbers:
            known = [self.labels.get(number, SequenceLabel(self.domain)) for number in numbers]
            frames["sequence"] = pl.DataFrame(
                {
                    "sequence": numbers,
                    "domain": [label.domain for label in known],
                    "source": [label.source for label in known],
                    "tokens": [self._next[number] for number in numbers],
                    "prompt_tokens": [self._prompt[number] for number in numbers],
                }
            )
        if self._seen_ids:
            ids = sorted(self._seen_ids)
            frames["vocabulary"] = pl.DataFrame({"token_id": ids, "bytes": [vocabulary.get(token) for token in ids]})
        return frames
