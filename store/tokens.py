"""Token ids of many sequences at once, beside the selections that a layer made for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenIds:
    """Token ids of some sequences, in the order of :class:`store.LayerSelections`.

    Attributes:
        ids: (tokens,) int32, sequence after sequence; -1 = not kept.
        predicted: (tokens,) int32, the model's most likely next token at each position; -1 = not recorded.
        sequences: (sequences,) their numbers in the run.
        offsets: (sequences + 1,) where each begins in ``ids``.
    """

    ids: NDArray[np.int32]
    predicted: NDArray[np.int32]
    sequences: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def following(self) -> NDArray[np.int32]:
        """(tokens,) the token that really came next; -1 at the end of a sequence."""
        result = np.full_like(self.ids, -1)
        result[:-1] = self.ids[1:]
        ends = self.offsets[1:] - 1
        result[ends[ends >= self.offsets[:-1]]] = -1
        return result


def unpack_tokens(
    *, chunks: pl.DataFrame, sequences: NDArray[np.int64], lengths: NDArray[np.int64], unknown: list[int]
) -> TokenIds:
    """Token ids from rows of table ``sequence_token`` (sequence, start, token_ids, predicted) of these sequences.

    unknown: ids that stand for no token.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    found = {}
    for name in ("token_ids", "predicted"):
        found[name] = np.full(int(offsets[-1]), -1, np.int32)
        rows = chunks.filter(pl.col(name).list.len() > 0)
        if rows.is_empty():
            continue
        counts = rows[name].list.len().to_numpy().astype(np.int64)
        row = np.searchsorted(sequences, rows["sequence"].to_numpy().astype(np.int64))
        first = offsets[row] + rows["start"].to_numpy().astype(np.int64)
        target = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        found[name][target] = rows[name].explode().cast(pl.Int64).fill_null(-1).to_numpy()
    if unknown:
        found["token_ids"][np.isin(found["token_ids"], unknown)] = -1
    return TokenIds(found["token_ids"], found["predicted"], sequences, offsets)
