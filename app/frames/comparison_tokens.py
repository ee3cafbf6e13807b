"""Two runs compared: the token ids, sequences and single tokens that agree least."""

from __future__ import annotations

import numpy as np
import polars as pl

from app.frames.expert_tokens import shown
from profiler.comparison import Comparison
from profiler.metrics._arrays import ratio

MIN_OCCURRENCES = 10
"""Occurrences that a token id needs to be listed among the most changed ones."""


def sequences(compared: Comparison) -> pl.DataFrame:
    """One row per pair of sequences, those that flip most first: sequence in the first run, other_sequence, domain,
    tokens, overlap and flip_share over its tokens and layers."""
    found = compared.alignment
    counted, overlap, exact = compared.sequences.T
    return (
        pl.DataFrame(
            {
                "sequence": found.pairs[:, 0],
                "other_sequence": found.pairs[:, 1],
                "domain": found.domains,
                "tokens": found.lengths,
                "overlap": ratio(overlap, counted),
                "flip_share": ratio(counted - exact, counted),
            },
            schema=_SEQUENCES,
        )
        .fill_nan(None)
        .sort("flip_share", "sequence", descending=[True, False], nulls_last=True)
    )


def flips(compared: Comparison) -> pl.DataFrame:
    """The single tokens that flip in most layers: sequence in the first run, position, text, flipped = layers where its
    set of experts differs, layers, overlap = mean over them."""
    found, aligned = compared.flips, compared.alignment
    numbers = aligned.pairs[found.pair, 0]
    texts = {number: aligned.first.sequence_text(number) for number in np.unique(numbers).tolist()}
    pieces = [
        None if (text := texts[number]) is None else text.pieces[position]
        for number, position in zip(numbers.tolist(), found.position.tolist(), strict=True)
    ]
    return pl.DataFrame(
        {
            "sequence": numbers,
            "position": found.position,
            "text": [shown(piece) for piece in pieces],
            "flipped": found.flipped,
            "layers": found.counted,
            "overlap": found.overlap,
        },
        schema=_FLIPS,
    )


def changed(compared: Comparison, *, count: int = 100) -> pl.DataFrame:
    """The token ids that agree least, over all layers: token_id, text, occurrences, overlap, exact.

    Ids with ``MIN_OCCURRENCES`` occurrences. Empty where the runs were aligned by position.
    """
    found = compared.changes
    if found is None:
        return pl.DataFrame(schema=_CHANGED)
    often = np.flatnonzero((found.occurrences >= MIN_OCCURRENCES) & (found.counted > 0))
    overlap, exact = (values[often] / found.counted[often] for values in (found.overlap, found.exact))
    order = np.lexsort((found.token_ids[often], overlap))[:count]
    chosen = often[order]
    pieces = compared.alignment.first.token_bytes(found.token_ids[chosen].tolist())
    return pl.DataFrame(
        {
            "token_id": found.token_ids[chosen],
            "text": [shown(pieces.get(token)) for token in found.token_ids[chosen].tolist()],
            "occurrences": found.occurrences[chosen],
            "overlap": overlap[order],
            "exact": exact[order],
        },
        schema=_CHANGED,
    )


_CHANGED = {"token_id": pl.Int64, "text": pl.String, "occurrences": pl.Int64, "overlap": pl.Float64,
            "exact": pl.Float64}  # fmt: skip
_SEQUENCES = {"sequence": pl.Int64, "other_sequence": pl.Int64, "domain": pl.String, "tokens": pl.Int64,
              "overlap": pl.Float64, "flip_share": pl.Float64}  # fmt: skip
_FLIPS = {"sequence": pl.Int64, "position": pl.Int64, "text": pl.String, "flipped": pl.Int64, "layers": pl.Int64,
          "overlap": pl.Float64}  # fmt: skip
