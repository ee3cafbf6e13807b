"""The trace: which experts every token used, in order, and how strongly; packed for the file, unpacked for metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

CHUNK_TOKENS = 512
"""Tokens per packed row: long enough for DuckDB's list compression, short enough to read one sequence alone."""


@dataclass(frozen=True)
class Trace:
    """Selections and gate weights of every token.

    Attributes:
        ids: (layers, sequences, tokens, k) int16, in descending gate weight; -1 = none (padding, or fewer experts).
        weights: same shape, float32, restored from 8 bits (error at most 1/510 of the chunk's largest); 0 = none.
        layers: (layer, step) of each entry of axis 0.
        sequences: (sequences,) their numbers in the run.
        lengths: (sequences,) real tokens of each.
        domains: the domain of each sequence.
    """

    ids: NDArray[np.int16]
    weights: NDArray[np.float32]
    layers: list[tuple[int, int]]
    sequences: NDArray[np.int64]
    lengths: NDArray[np.int64]
    domains: list[str]

    @property
    def num_tokens(self) -> int:
        """Real tokens over all sequences."""
        return int(self.lengths.sum())


@dataclass(frozen=True)
class LayerSelections:
    """One layer's selections of some sequences, without padding: what metrics read block by block.

    Attributes:
        ids: (tokens, k) int16 in descending gate weight, sequence after sequence; -1 = none.
        weights: same shape, float32; None where they were not asked for.
        sequences: (sequences,) their numbers in the run.
        offsets: (sequences + 1,) where each begins in ``ids``.
        rounding: (tokens,) float32, by what each stored weight may be wrong at most; None without weights.
    """

    ids: NDArray[np.int16]
    weights: NDArray[np.float32] | None
    sequences: NDArray[np.int64]
    offsets: NDArray[np.int64]
    rounding: NDArray[np.float32] | None = None


def none_value(num_experts: int) -> int:
    """The packed id that means "no expert": the largest value of the type that holds ``num_experts`` ids."""
    return 255 if num_experts <= 255 else 65535


def pack_trace(
    *,
    layer: int,
    step: int = 0,
    sequence: NDArray[np.integer],
    position: NDArray[np.integer],
    ids: NDArray[np.integer],
    weights: NDArray[np.floating],
    num_experts: int,
) -> pl.DataFrame:
    """Rows of table ``route_chunk`` for tokens of one layer, in any order.

    Args:
        sequence: (tokens,) sequence number of each token.
        position: (tokens,) its position in the sequence.
        ids: (tokens, k) selections in descending weight, negative = none.
        weights: (tokens, k) gate weights; negative and non-finite ones are stored as 0.
        num_experts: the largest number of experts of any layer of the run; it chooses the type of the ids.

    Returns:
        One row per chunk: at most ``CHUNK_TOKENS`` tokens of one sequence at successive positions.
    """
    in_sequence, at = np.asarray(sequence, np.int64), np.asarray(position, np.int64)
    if not _in_order(in_sequence, at):
        order = np.lexsort((at, in_sequence))
        in_sequence, at, ids, weights = in_sequence[order], at[order], ids[order], weights[order]
    none = none_value(num_experts)
    packed_ids = np.where(ids < 0, none, ids).astype(np.uint8 if none == 255 else np.uint16)
    clean = np.maximum(weights, 0.0, dtype=np.float64 if weights.dtype == np.float64 else np.float32)
    if not np.isfinite(clean).all():
        clean = np.nan_to_num(clean, nan=0.0, posinf=0.0)
    edges = chunk_edges(in_sequence, at)
    bounds = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    scales = np.array([clean[a:b].max(initial=0.0) for a, b in bounds], np.float32)
    # A chunk without weight keeps scale 0; below 1e-30 the factor would overflow, and all weights become 0.
    factors = np.repeat(255 / np.where(scales > 1e-30, scales, np.float32(1)), np.diff(edges))[:, None]
    packed_weights = np.minimum(np.rint(clean * factors), 255).astype(np.uint8)
    id_type = pl.UInt8 if none == 255 else pl.UInt16
    return pl.DataFrame(
        {
            "layer": pl.Series([layer] * len(bounds), dtype=pl.Int32),
            "step": pl.Series([step] * len(bounds), dtype=pl.Int32),
            "sequence": pl.Series(in_sequence[edges[:-1]], dtype=pl.UInt32),
            "start": pl.Series(at[edges[:-1]], dtype=pl.UInt32),
            "width": pl.Series([ids.shape[1]] * len(bounds), dtype=pl.UInt8),
            "scale": pl.Series(scales, dtype=pl.Float32),
            "experts": list_series([packed_ids[a:b] for a, b in bounds], id_type),
            "weights": list_series([packed_weights[a:b] for a, b in bounds], pl.UInt8),
        }
    )


def _in_order(sequence: NDArray[np.int64], position: NDArray[np.int64]) -> bool:
    """Whether tokens stand sequence by sequence at rising positions, as importers hand them over."""
    steps = np.diff(sequence)
    return bool(((steps > 0) | ((steps == 0) & (np.diff(position) > 0))).all())


def list_series(parts: Sequence[NDArray[Any]], kind: type[pl.DataType]) -> pl.Series:
    """A series of lists; polars would make arrays of parts that are equally long, which fit no others."""
    return pl.Series([part.reshape(-1) for part in parts], dtype=pl.List(kind)).cast(pl.List(kind))


def unpack_trace(
    *,
    chunks: pl.DataFrame,
    layers: Sequence[tuple[int, int]],
    sequences: NDArray[np.int64],
    lengths: NDArray[np.int64],
    domains: list[str],
    num_experts: int,
) -> Trace:
    """The trace from rows of table ``route_chunk``; rows of other layers or sequences must have been left out."""
    width = int(chunks["width"].max() or 0) if len(chunks) else 0  # type: ignore[arg-type]
    tokens = int(lengths.max(initial=0))
    shape = (len(layers), len(sequences), tokens, width)
    ids = np.full(shape, -1, np.int16)
    weights = np.zeros(shape, np.float32)
    place = {pair: index for index, pair in enumerate(layers)}
    for (layer, step, k), part in chunks.group_by(["layer", "step", "width"], maintain_order=True):
        axis = place[(int(layer), int(step))]
        _place(part, int(k), num_experts, sequences, tokens, ids[axis], weights[axis])
    return Trace(ids, weights, list(layers), sequences, lengths, domains)


def unpack_layer(
    *,
    chunks: pl.DataFrame,
    sequences: NDArray[np.int64],
    lengths: NDArray[np.int64],
    num_experts: int,
    top_k: int,
) -> LayerSelections:
    """One layer's selections from its rows of ``route_chunk`` (sequence, start, width, scale, experts, and weights if
    they are wanted). Tokens without a row have no expert.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    widest = max(top_k, int(chunks["width"].max() or 0) if len(chunks) else 0)  # type: ignore[arg-type]
    ids = np.full((int(offsets[-1]), widest), -1, np.int16)
    weights = np.zeros(ids.shape, np.float32) if "weights" in chunks.columns else None
    rounding = None if weights is None else np.zeros(len(ids), np.float32)
    for (k,), part in chunks.group_by(["width"], maintain_order=True):
        width = int(k)
        counts = part["experts"].list.len().to_numpy().astype(np.int64) // width
        row = np.searchsorted(sequences, part["sequence"].to_numpy().astype(np.int64))
        first = offsets[row] + part["start"].to_numpy().astype(np.int64)
        target = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        flat = part["experts"].explode().to_numpy().reshape(-1, width)
        ids[target, :width] = np.where(flat == none_value(num_experts), np.int16(-1), flat.astype(np.int16))
        if weights is not None and rounding is not None:
            size = np.repeat(part["scale"].to_numpy(), counts) / np.float32(255)
            weights[target, :width] = part["weights"].explode().to_numpy().reshape(-1, width) * size[:, None]
            rounding[target] = size / 2
    return LayerSelections(ids, weights, sequences, offsets, rounding)


def _place(
    part: pl.DataFrame,
    k: int,
    num_experts: int,
    sequences: NDArray[np.int64],
    tokens: int,
    ids: NDArray[np.int16],
    weights: NDArray[np.float32],
) -> None:
    """Write the chunks of one layer, all of width k, into its (sequences, tokens, k) arrays."""
    counts = part["experts"].list.len().to_numpy().astype(np.int64) // k
    row = np.searchsorted(sequences, part["sequence"].to_numpy().astype(np.int64))
    first = row * tokens + part["start"].to_numpy().astype(np.int64)
    before = np.cumsum(counts) - counts
    target = np.repeat(first - before, counts) + np.arange(counts.sum())
    flat = part["experts"].explode().to_numpy().astype(np.int32).reshape(-1, k)
    ids.reshape(-1, ids.shape[-1])[target, :k] = np.where(flat == none_value(num_experts), -1, flat)
    scale = np.repeat(part["scale"].to_numpy(), counts)[:, None]
    quantised = part["weights"].explode().to_numpy().reshape(-1, k)
    weights.reshape(-1, weights.shape[-1])[target, :k] = quantised * (scale / np.float32(255))


def chunk_edges(sequence: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
    """(chunks + 1,) bounds of runs of one sequence at successive positions, at most ``CHUNK_TOKENS`` long."""
    count = len(sequence)
    if count == 0:
        return np.zeros(1, np.int64)
    broken = (np.diff(sequence) != 0) | (np.diff(position) != 1)
    starts = np.concatenate([[0], np.flatnonzero(broken) + 1])
    run = np.arange(count) - np.repeat(starts, np.diff(np.append(starts, count)))
    return np.append(np.flatnonzero(run % CHUNK_TOKENS == 0), count)
