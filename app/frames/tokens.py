"""Tokens: the text of one sequence and the experts that each token used. Reads that sequence only."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import numpy as np
import polars as pl

import store
from app.frames.axes import parse_layer
from app.frames.token_routes import Routes

TOKENS = {"position": pl.Int64, "token_id": pl.Int64, "text": pl.String, "special": pl.Boolean}
SPLIT = "\u2026"
"""Stands for a token that holds only a part of a character; the character stands at the token that completes it."""

PART = 768
"""Tokens that are shown at once; longer sequences are shown in parts."""

_ALL = 2**32 - 1 - 8
_PIECES = 3  # tokens that a character may begin before the one that completes it


def sequences(run: store.Run, *, domain: str | None = None) -> pl.DataFrame:
    """Sequences with a trace, of one domain or of all, by number: sequence, domain, source, tokens, prompt_tokens."""
    table = run.table("sequence").sort("sequence").join(run.traced_sequences, on="sequence", how="semi")
    if domain is not None:
        table = table.filter(pl.col("domain") == domain)
    return table.select("sequence", "domain", "source", "tokens", "prompt_tokens")


def sequence_tokens(run: store.Run, sequence: int, first: int = 0, last: int | None = None) -> pl.DataFrame:
    """One row per token of a sequence, or of its tokens ``first`` to ``last``: position, token_id, text, special.
    Without kept text, positions only.

    Bytes are decoded incrementally: where a character is split over tokens, all but the last read ``SPLIT``.
    """
    end = _ALL if last is None else last
    text = run.sequence_text(sequence, first=max(first - _PIECES, 0), last=end + _PIECES)
    if text is None:
        table = run.table("sequence").filter(pl.col("sequence") == sequence)
        positions = range(first, min(end + 1, int(table["tokens"][0])) if len(table) else first)
        columns = {
            "position": positions,
            "token_id": [None] * len(positions),
            "text": [None] * len(positions),
            "special": [None] * len(positions),
        }
        return pl.DataFrame(columns, schema=TOKENS)
    start = max(first - _PIECES, 0)
    whole = pl.DataFrame(
        {
            "position": np.arange(start, start + len(text.token_ids)),
            "token_id": text.token_ids,
            "text": decode(text.pieces),
            "special": text.special,
        },
        schema=TOKENS,
    )
    return whole.filter(pl.col("position").is_between(first, end))


def decode(pieces: Sequence[bytes]) -> list[str]:
    """The text that each token adds, from the UTF-8 bytes of each; bytes that are no UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for index, piece in enumerate(pieces):
        added = decoder.decode(piece, final=index == len(pieces) - 1)
        texts.append(added if added or not piece else SPLIT)
    return texts


def routes(run: store.Run, sequence: int, first: int = 0, last: int | None = None, label: str | None = None) -> Routes:
    """The experts of the tokens ``first`` to ``last`` of one sequence, in all layers or in those of one decoder layer;
    none where there is no trace."""
    layers = None if label is None else [parse_layer(label)[0]]
    trace = run.stretch(sequence, first=first, last=_ALL if last is None else last, layers=layers)
    if not len(trace.sequences):
        none = (len(trace.layers), 0, 0)
        return Routes(first, trace.layers, np.zeros(none, np.int16), np.zeros(none, np.float32))
    return Routes(first, trace.layers, trace.ids[:, 0], trace.weights[:, 0])


def token_routes(run: store.Run, sequence: int, first: int = 0, last: int | None = None) -> pl.DataFrame:
    """One row per token, MoE layer and rank of one sequence: position, layer, step, label, rank, expert, weight.

    rank 0 has the largest gate weight; weight is restored from 8 bits.
    """
    return routes(run, sequence, first, last).frame()


def route_table(route: pl.DataFrame) -> pl.DataFrame:
    """The route of one token (rows of :func:`token_routes`), one row per layer: each expert with its weight."""
    text = pl.col("expert").cast(pl.String) + pl.format(" ({})", pl.col("weight").round(3)).alias("text")
    named = route.with_columns(text.alias("text"), pl.format("{}. expert (weight)", pl.col("rank") + 1).alias("column"))
    wide = named.pivot(on="column", index="label", values="text", maintain_order=True)
    return wide.rename({"label": "layer"})
