"""The largest router scores of every token, in order; packed for the file, unpacked for metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from store.trace import chunk_edges, list_series

NONE = 65535
"""The packed id that means "no expert"."""

_STEPS = 65535


@dataclass(frozen=True)
class RouterScores:
    """The largest router logits of every token of the sequences that have any.

    Attributes:
        ids: (layers, sequences, tokens, m) int32, in descending logit; -1 = none (padding, or logits that were no
            finite numbers).
        logits: same shape, float32, restored from 16 bits (error at most 1/131070 of the chunk's range); NaN = none.
        log_partition: (layers, sequences, tokens) float32, logsumexp of all logits of the token; NaN = none.
        layers: (layer, step) of each entry of axis 0.
        sequences: (sequences,) their numbers in the run.
        lengths: (sequences,) real tokens of each.
        domains: the domain of each sequence.
    """

    ids: NDArray[np.int32]
    logits: NDArray[np.float32]
    log_partition: NDArray[np.float32]
    layers: list[tuple[int, int]]
    sequences: NDArray[np.int64]
    lengths: NDArray[np.int64]
    domains: list[str]


@dataclass(frozen=True)
class LayerScores:
    """One layer's largest router logits of the sequences that have any, without padding.

    Attributes:
        ids: (tokens, m) int16 in descending logit, sequence after sequence; -1 = none.
        logits: same shape, float32; NaN = none.
        log_partition: (tokens,) float32, logsumexp of all logits of the token; NaN = none.
        sequences: (sequences,) their numbers in the run.
        offsets: (sequences + 1,) where each begins in ``ids``.
    """

    ids: NDArray[np.int16]
    logits: NDArray[np.float32]
    log_partition: NDArray[np.float32]
    sequences: NDArray[np.int64]
    offsets: NDArray[np.int64]


def pack_scores(
    *,
    layer: int,
    step: int = 0,
    sequence: NDArray[np.integer],
    position: NDArray[np.integer],
    ids: NDArray[np.integer],
    logits: NDArray[np.floating],
    log_partition: NDArray[np.floating],
) -> pl.DataFrame:
    """Rows of table ``score_chunk`` for tokens of one layer, in any order.

    Args:
        sequence: (tokens,) sequence number of each token.
        position: (tokens,) its position in the sequence.
        ids: (tokens, m) experts in descending logit, :data:`NONE` = none.
        logits: (tokens, m) their logits; what stands beside :data:`NONE` does not count.
        log_partition: (tokens,) logsumexp of all logits of the token.

    Returns:
        One row per chunk: at most ``CHUNK_TOKENS`` tokens of one sequence at successive positions.
    """
    order = np.lexsort((position, sequence))
    in_sequence, at = np.asarray(sequence, np.int64)[order], np.asarray(position, np.int64)[order]
    ids, totals = ids[order].astype(np.uint16), log_partition[order].astype(np.float32)
    values = np.where(ids == NONE, np.nan, logits[order].astype(np.float64))
    edges = chunk_edges(in_sequence, at)
    bounds = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    ranges = [_range(values[a:b]) for a, b in bounds]
    return pl.DataFrame(
        {
            "layer": pl.Series([layer] * len(bounds), dtype=pl.Int32),
            "step": pl.Series([step] * len(bounds), dtype=pl.Int32),
            "sequence": pl.Series(in_sequence[edges[:-1]], dtype=pl.UInt32),
            "start": pl.Series(at[edges[:-1]], dtype=pl.UInt32),
            "width": pl.Series([ids.shape[1]] * len(bounds), dtype=pl.UInt8),
            "low": pl.Series([low for low, _ in ranges], dtype=pl.Float32),
            "high": pl.Series([high for _, high in ranges], dtype=pl.Float32),
            "experts": list_series([ids[a:b] for a, b in bounds], pl.UInt16),
            "scores": list_series(
                [_steps(values[a:b], *limits) for (a, b), limits in zip(bounds, ranges, strict=True)], pl.UInt16
            ),
            "log_partition": list_series([totals[a:b] for a, b in bounds], pl.Float32),
        }
    )


def unpack_scores(
    *,
    chunks: pl.DataFrame,
    layers: Sequence[tuple[int, int]],
    sequences: NDArray[np.int64],
    lengths: NDArray[np.int64],
    domains: list[str],
) -> RouterScores:
    """The scores from rows of table ``score_chunk``; rows of other layers or sequences must have been left out."""
    tokens = int(lengths.max(initial=0))
    shape = (len(layers), len(sequences), tokens)
    ids, logits, log_partition = _nothing((*shape, _widest(chunks)), np.int32)
    place = {pair: index for index, pair in enumerate(layers)}
    for (layer, step), part in chunks.group_by(["layer", "step"], maintain_order=True):
        axis = place[int(layer), int(step)]
        into = (ids[axis].reshape(-1, ids.shape[-1]), logits[axis].reshape(-1, ids.shape[-1]))
        _place(part, sequences, np.arange(len(sequences)) * tokens, *into, log_partition[axis].reshape(-1))
    return RouterScores(ids, logits, log_partition, list(layers), sequences, lengths, domains)


def unpack_layer_scores(
    *, chunks: pl.DataFrame, sequences: NDArray[np.int64], lengths: NDArray[np.int64]
) -> LayerScores:
    """One layer's scores from its rows of ``score_chunk``; rows of other sequences must have been left out."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids, logits, log_partition = _nothing((int(offsets[-1]), _widest(chunks)), np.int16)
    _place(chunks, sequences, offsets[:-1], ids, logits, log_partition)
    return LayerScores(ids, logits, log_partition, sequences, offsets)


def _widest(chunks: pl.DataFrame) -> int:
    return int(chunks["width"].max() or 0) if len(chunks) else 0  # type: ignore[arg-type]


def _nothing(shape: tuple[int, ...], kind: type[np.integer]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Ids, logits and logsumexp of tokens of which nothing is known."""
    return np.full(shape, -1, kind), np.full(shape, np.nan, np.float32), np.full(shape[:-1], np.nan, np.float32)


def _place(
    chunks: pl.DataFrame,
    sequences: NDArray[np.int64],
    begins: NDArray[np.int64],
    ids: NDArray[Any],
    logits: NDArray[np.float32],
    log_partition: NDArray[np.float32],
) -> None:
    """Write the chunks of one layer to (tokens, m) and (tokens,) arrays; each sequence begins at ``begins`` there."""
    widths = chunks["width"].unique().to_list()
    for m in widths:
        part = chunks if len(widths) == 1 else chunks.filter(pl.col("width") == m)
        counts = part["log_partition"].list.len().to_numpy().astype(np.int64)
        row = np.searchsorted(sequences, part["sequence"].to_numpy().astype(np.int64))
        first = begins[row] + part["start"].to_numpy().astype(np.int64)
        target = _rows(first, counts)
        # 65535, which is none, is -1 in 16 bits with a sign.
        packed = part["experts"].explode().to_numpy().view(np.int16).reshape(-1, m)
        low, high = (part[name].to_numpy() for name in ("low", "high"))
        # Straight to their place where they stand in order: these arrays are large.
        restored = logits[target, :m] if isinstance(target, slice) else np.empty(packed.shape, np.float32)
        steps = part["scores"].explode().to_numpy().reshape(-1, m)
        factor = np.repeat((high - low) / np.float32(_STEPS), counts)[:, None]
        np.multiply(steps, factor, out=restored, dtype=np.float32)
        restored += np.repeat(low, counts)[:, None]
        if packed.min(initial=0) < 0:
            restored[packed < 0] = np.nan
        ids[target, :m] = packed
        if not isinstance(target, slice):
            logits[target, :m] = restored
        log_partition[target] = part["log_partition"].explode().to_numpy()


def _rows(first: NDArray[np.int64], counts: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """The rows that chunks of ``counts`` tokens fill, each from ``first`` on; as a slice where they stand in order."""
    ends = first + counts
    if len(first) and (first[1:] == ends[:-1]).all():
        return slice(int(first[0]), int(ends[-1]))
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    """The smallest and the largest logit of a chunk, as they are stored; 0, 0 where there is none."""
    known = values[np.isfinite(values)]
    return (float(np.float32(known.min())), float(np.float32(known.max()))) if len(known) else (0.0, 0.0)


def _steps(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint16]:
    span = high - low if high > low else 1.0
    steps = np.rint(np.nan_to_num((values - low) / span) * _STEPS)
    return steps.clip(0, _STEPS).astype(np.uint16).reshape(-1)
