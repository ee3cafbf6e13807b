"""The cut of a corpus into parts: runs of whole successive batches, each of which becomes one shard.

The cut depends on the corpus, its options and the tokens of a part alone, never on who works on the parts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moescope.errors import InputError

if TYPE_CHECKING:
    from profiler.corpus import Corpus

PARTS = 64
"""Parts of a corpus where nobody says how large they are, ..."""

FEWEST_TOKENS, MOST_TOKENS = 1 << 13, 1 << 19
"""... with so many tokens each at least, and at most: what a worker holds of a trace grows with its part."""


@dataclass(frozen=True)
class Part:
    """A run of whole batches.

    Attributes:
        number: from 0, in the order of the corpus.
        batches: numbers of the sequences of each batch.
        tokens: of all of them.
    """

    number: int
    batches: tuple[tuple[int, ...], ...]
    tokens: int

    @property
    def sequences(self) -> list[int]:
        """Numbers of all sequences."""
        return [sequence for batch in self.batches for sequence in batch]

    def without(self, done: Collection[int]) -> Part:
        """The same part without sequences that are recorded already; batches that are done are left out."""
        left = (tuple(sequence for sequence in batch if sequence not in done) for batch in self.batches)
        return Part(self.number, tuple(batch for batch in left if batch), self.tokens)


def default_part_tokens(corpus_tokens: int) -> int:
    """Tokens of a part where nobody says."""
    return min(MOST_TOKENS, max(FEWEST_TOKENS, corpus_tokens // PARTS))


def cut(corpus: Corpus, part_tokens: int) -> list[Part]:
    """All parts of a corpus, each of at least so many tokens but for the last.

    Raises:
        InputError: a part without tokens.
    """
    if part_tokens < 1:
        raise InputError(f"--part-tokens is {part_tokens}: give 1 or more")
    lengths = corpus.lengths
    parts: list[Part] = []
    batches: list[tuple[int, ...]] = []
    tokens = 0
    for batch in corpus.plan():
        batches.append(tuple(batch))
        tokens += int(lengths[batch].sum())
        if tokens >= part_tokens:
            parts.append(Part(len(parts), tuple(batches), tokens))
            batches, tokens = [], 0
    if batches:
        parts.append(Part(len(parts), tuple(batches), tokens))
    return parts
