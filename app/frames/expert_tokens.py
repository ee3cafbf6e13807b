"""The tokens of one expert: which ids it takes, and where in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from app.frames.expert_trace import ExpertBlock, expert_blocks
from app.frames.tokens import decode

TokenKind = Literal["input", "predicted", "next"]

MIN_OCCURRENCES = 10
"""Occurrences that an id needs to be ranked by its lift, as in OLMoE's lists."""

BEFORE, AFTER = 12, 8
"""Tokens of text that are shown around a token."""

SEED = 0


def top_tokens(
    run: store.Run,
    *,
    label: str,
    expert: int,
    tokens: TokenKind = "input",
    by: Literal["count", "lift"] = "lift",
    count: int = 40,
) -> pl.DataFrame:
    """The token ids that the expert takes most, or more than others: one row per id.

    Columns: token_id, text, selections = tokens of the id that use the expert, occurrences of the id, share of the two
    with low and high (95 %, Wilson, as if tokens were independent), lift = share over the expert's share of all tokens.

    tokens: the token itself (input), the one that the model holds most likely to follow (predicted), or the one that
    follows (next). By lift, ids with ``MIN_OCCURRENCES`` are ranked, by the low end of their share. Empty without kept
    token ids.
    """
    seen, taken = _count(run, label, expert, tokens)
    if not taken.any():
        return pl.DataFrame(schema=_TOKENS)
    known = np.flatnonzero((taken > 0) & (seen >= (MIN_OCCURRENCES if by == "lift" else 1)))
    n, c = seen[known].astype(np.float64), taken[known].astype(np.float64)
    low, high = _wilson(c, n)
    order = np.lexsort((known, -(low if by == "lift" else c)))[:count]
    chosen = known[order]
    pieces = run.token_bytes(chosen.tolist())
    overall = taken.sum() / seen.sum()
    return pl.DataFrame(
        {
            "token_id": chosen,
            "text": [shown(pieces.get(token)) for token in chosen.tolist()],
            "selections": taken[chosen],
            "occurrences": seen[chosen],
            "share": (c / n)[order],
            "low": low[order],
            "high": high[order],
            "lift": (c / n)[order] / overall,
        },
        schema=_TOKENS,
    )


def contexts(
    run: store.Run, *, label: str, expert: int, by: Literal["weight", "random"] = "weight", count: int = 12
) -> pl.DataFrame:
    """Some tokens of the expert in their text: sequence, domain, position, weight, before, text, after.

    by: those with the largest gate weight, one of each sequence, or some drawn at random. Empty without kept text.
    """
    rows = []
    domain = dict(run.table("sequence").select("sequence", "domain").iter_rows())
    for sequence, position, weight in _places(run, label, expert, by, count):
        text = run.sequence_text(sequence)
        if text is None or not b"".join(
            text.pieces[position : position + 1]
        ):  # an import that knows the text of other sequences only
            continue
        first, last = max(0, position - BEFORE), position + 1 + AFTER
        # Decoded in parts, so that a character that is cut at an edge stays at its side of it.
        before, after = decode(text.pieces[first:position]), decode(text.pieces[position + 1 : last])
        mine = shown(text.pieces[position])
        rows.append((sequence, domain[sequence], position, weight, "".join(before), mine, "".join(after)))
    frame = pl.DataFrame(rows, schema=_CONTEXTS, orient="row")
    return frame.with_columns(pl.col("before", "after").str.replace_all("\n", "⏎").str.replace_all("\t", "⇥"))


def shown(piece: bytes | None) -> str:
    """A token as text that shows what is in it: spaces, line ends, and the bytes of a part of a character."""
    if piece is None:
        return ""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return " ".join(f"{byte:02X}" for byte in piece)
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return re.sub(r"^ +| +$", lambda spaces: "␣" * len(spaces.group()), text)


def _count(run: store.Run, label: str, expert: int, tokens: TokenKind) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Occurrences of every token id, and those that use the expert, (ids,) each."""
    seen, taken = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for block, ids in _with_ids(run, label, expert, tokens):
        kept = ids >= 0
        size = max(len(seen), int(ids.max(initial=0)) + 1)
        seen = np.bincount(ids[kept], minlength=size) + np.pad(seen, (0, size - len(seen)))
        taken = np.bincount(ids[kept & block.hit], minlength=size) + np.pad(taken, (0, size - len(taken)))
    return seen, taken


def _with_ids(
    run: store.Run, label: str, expert: int, tokens: TokenKind
) -> Iterator[tuple[ExpertBlock, NDArray[np.int32]]]:
    for block in expert_blocks(run, label=label, expert=expert) if run.has_trace and run.has_tokens else ():
        read = run.token_ids(first=int(block.sequences[0]), last=int(block.sequences[-1]))
        yield block, {"input": read.ids, "predicted": read.predicted, "next": read.following}[tokens]


def _wilson(hits: NDArray[np.float64], tries: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % interval of a share (Wilson 1927)."""
    square = 1.96**2
    middle = (hits + square / 2) / (tries + square)
    reach = 1.96 / (tries + square) * np.sqrt(hits * (tries - hits) / tries + square / 4)
    return np.maximum(middle - reach, 0.0), np.minimum(middle + reach, 1.0)


def _places(run: store.Run, label: str, expert: int, by: str, count: int) -> list[tuple[int, int, float]]:
    """(sequence, position, gate weight) of the tokens to show, the first ones first."""
    generator = np.random.default_rng(SEED)
    best: list[tuple[float, int, int, float]] = []
    for block in expert_blocks(run, label=label, expert=expert) if run.has_trace and run.has_tokens else ():
        at = np.flatnonzero(block.hit)
        worth = block.weights[at].astype(np.float64) if by == "weight" else generator.random(len(at))
        row = np.searchsorted(block.offsets, at, side="right") - 1
        order = np.argsort(-worth, kind="stable")
        if by == "weight":  # the first of each sequence
            order = order[np.sort(np.unique(row[order], return_index=True)[1])]
        for index in order[:count]:
            sequence, position = int(block.sequences[row[index]]), int(at[index] - block.offsets[row[index]])
            best.append((float(worth[index]), sequence, position, float(block.weights[at[index]])))
    best.sort(key=lambda one: (-one[0], one[1:]))
    return [(sequence, position, weight) for _, sequence, position, weight in best[:count]]


_TOKENS = {"token_id": pl.Int64, "text": pl.String, "selections": pl.Int64, "occurrences": pl.Int64,
           "share": pl.Float64, "low": pl.Float64, "high": pl.Float64, "lift": pl.Float64}  # fmt: skip
_CONTEXTS = {"sequence": pl.Int64, "domain": pl.String, "position": pl.Int64, "weight": pl.Float64,
             "before": pl.String, "text": pl.String, "after": pl.String}  # fmt: skip
