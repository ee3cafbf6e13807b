"""Probes that the text itself holds: words that are known or stand in the context, and results of arithmetic.

LLM-KICK (arXiv 2310.01382) shows that perplexity hides what compression costs, and asks for knowledge with closed and
with open book instead. Its tasks need question sets, a judge and English. These probes are made from the user's own
text in any language: which next tokens were right is known from the pass that measures KL, so they cost nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from profiler.corpus import TokenBatch

FREQUENT = 500
"""The most frequent tokens of the text, which take no knowledge to predict; at most half of its different ones."""

Places = Callable[["NDArray[np.int64]"], "NDArray[np.bool_]"]
"""(tokens,) ids of a sequence -> (tokens,) which of them a probe asks for."""

_RESULT = re.compile(r"\d\s*[-+*/×÷^%]\s*-?\d[^=\n]*=\s*(-?\d+(?:[.,]\d+)*)\s*$", re.MULTILINE)
"""A line that ends in the result of a calculation: digits, a sign, digits, ``=``, the result."""


class Pieces:
    """The text of each token by itself, looked up once.

    Args:
        tokenizer: any; None where there is none, and no piece is known.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self.special = set(getattr(tokenizer, "all_special_ids", ()))

    def of(self, ids: Iterable[int]) -> list[str]:
        """The text of each of these tokens."""
        return [self._one(token) for token in ids]

    def _one(self, token: int) -> str:
        if token not in self._known:
            raw = self._tokenizer.convert_ids_to_tokens(token) or ""
            text = str(self._tokenizer.decode([token]))
            # SentencePiece drops the space before a first word when it decodes; its piece still has the mark.
            self._known[token] = f" {text}" if raw.startswith("▁") and not text.startswith(" ") else text
        return self._known[token]


def frequent_tokens(batches: Iterable[TokenBatch], count: int = FREQUENT) -> set[int]:
    """The most frequent tokens of a text, padding left out; in a short text, at most half of its different tokens."""
    found: Counter[int] = Counter()
    for batch in batches:
        values, times = np.unique(batch.input_ids[batch.attention_mask == 1], return_counts=True)
        found.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    return {token for token, _ in found.most_common(min(count, len(found) // 2))}


def rare_words(pieces: Pieces, frequent: set[int], *, seen: bool) -> Places:
    """First tokens of words outside the frequent ones that stood before in the sequence (open book), or did not."""

    def places(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        _, first = np.unique(ids, return_index=True)
        before = np.ones(len(ids), bool)
        before[first] = False
        rare = ~np.isin(ids, list(frequent | pieces.special))
        return rare & (before == seen) & _word_starts(pieces.of(ids.tolist()))

    return places


def results(pieces: Pieces) -> Places:
    """The tokens that hold the result of a calculation, where a line ends in one: ``6 * 12 = 72``.

    The first line of a sequence is left out: it may be the end of one that was cut.
    """

    def places(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        texts = pieces.of(ids.tolist())
        ends = np.cumsum([len(text) for text in texts])
        starts = ends - np.array([len(text) for text in texts])
        asked = np.zeros(len(ids), bool)
        text = "".join(texts)
        for match in _RESULT.finditer(text, text.find("\n") + 1 or len(text)):
            first, last = match.span(1)
            # A token that reaches back over the "=" has not been asked for the result alone, but it holds its start.
            asked |= (ends > first) & (starts < last)
        return asked

    return places


def hits_per_sequence(
    read: Sequence[tuple[TokenBatch, NDArray[np.bool_], NDArray[np.bool_]]], places: Places
) -> list[dict[str, Any]]:
    """One row per sequence: sequence, domain, items, hits, base_hits.

    Args:
        read: batches, and which next tokens both models had right (batch, length - 1).
        places: what the probe asks for; the first token of a sequence is never asked for.
    """
    rows = []
    for batch, right, base_right in read:
        for row, sequence in enumerate(batch.sequences):
            real = np.flatnonzero(batch.attention_mask[row])
            asked = real[places(batch.input_ids[row, real])]
            asked = asked[asked > real[0]] - 1 if len(real) else asked
            rows.append(
                {
                    "sequence": int(sequence),
                    "domain": batch.domains[row],
                    "items": len(asked),
                    "hits": int(right[row, asked].sum()),
                    "base_hits": int(base_right[row, asked].sum()),
                }
            )
    return rows


def _word_starts(texts: Sequence[str]) -> NDArray[np.bool_]:
    """Which tokens begin a word: a letter after a space, a sign or the start."""
    result, before = np.zeros(len(texts), bool), " "
    for place, text in enumerate(texts):
        begins = text[:1].isspace() or not before[-1:].isalnum()
        result[place] = begins and text.strip()[:1].isalpha()
        before = text or before
    return result
