"""Blocks of a reader, checked and put in order: what passes here can be added up and stored without a second look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import store
from moescope.errors import ImportFileError
from profiler.importers.recording import CountBlock, TraceBlock


@dataclass(frozen=True)
class Arranged:
    """A checked block: ids (layers, tokens, k) int16 in descending weight with -1 at the end, weights float32 (zeros
    where the source has none), sequence, position, generated (tokens,), token_ids or None; notes: check -> (status,
    sentence).
    """

    ids: NDArray[np.int16]
    weights: NDArray[np.float32]
    has_weights: bool
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    generated: NDArray[np.bool_]
    token_ids: NDArray[np.int64] | None
    notes: dict[str, tuple[str, str]] = field(default_factory=dict)


def joined(blocks: Sequence[Arranged]) -> Arranged:
    """Several checked blocks, alike in experts per token and in what they hold, as one."""
    first = blocks[0]
    if len(blocks) == 1:
        return first
    tokens = [one.token_ids for one in blocks if one.token_ids is not None]
    return Arranged(
        np.concatenate([one.ids for one in blocks], axis=1),
        np.concatenate([one.weights for one in blocks], axis=1),
        first.has_weights,
        np.concatenate([one.sequence for one in blocks]),
        np.concatenate([one.position for one in blocks]),
        np.concatenate([one.generated for one in blocks]),
        np.concatenate(tokens) if tokens else None,
    )


def require_alike(block: Arranged, before: Arranged, path: Path) -> None:
    """Refuse a block that does not hold what those before it held.

    Raises:
        ImportFileError: other experts per token, or weights or token ids in some blocks only.
    """
    width, known = block.ids.shape[2], before.ids.shape[2]
    if width != known:
        raise ImportFileError(f"{path}: a token has {width} experts, tokens before had {known}")
    if block.has_weights != before.has_weights:
        raise ImportFileError(f"{path}: parts of it have gate weights and others have none")
    if (block.token_ids is None) != (before.token_ids is None):
        raise ImportFileError(f"{path}: parts of it have token ids and others have none")


def arrange(block: TraceBlock, layers: Sequence[store.LayerInfo], path: Path) -> Arranged:
    """Check a block of tokens and bring each token's experts into descending weight.

    Raises:
        ImportFileError: shapes that do not agree, ids out of range, an expert twice in a token, weights that are none.
    """
    ids, tokens = _checked_ids(block, layers, path)
    notes: dict[str, tuple[str, str]] = {}
    weights = np.zeros(ids.shape, np.float32) if block.weights is None else _checked_weights(block.weights, ids, path)
    missing = ids < 0
    # -1 comes last; where the source keeps weights, larger ones first, ties as they stand.
    key = np.where(missing, np.float32(np.inf), -weights) if block.weights is not None else missing.astype(np.float32)
    if (key[..., 1:] < key[..., :-1]).any():
        order = np.argsort(key, axis=-1, kind="stable")
        ids, weights = np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)
        if block.weights is not None:
            notes["order of experts"] = ("pass", "experts of a token were sorted by descending weight")
    _require_distinct(ids, layers, path)
    return Arranged(
        ids, weights, block.weights is not None, np.asarray(block.sequence, np.int64),
        np.asarray(block.position, np.int64), np.asarray(block.generated, bool),
        None if block.token_ids is None else _checked_tokens(block.token_ids, tokens, path), notes,
    )  # fmt: skip


def arrange_counts(block: CountBlock, layers: Sequence[store.LayerInfo], path: Path) -> NDArray[np.int64]:
    """Check a block of counts; returns it as int64 (spans, layers, experts).

    Raises:
        ImportFileError: another shape, counts below zero, or fractions.
    """
    counts = np.asarray(block.counts)
    wanted = (len(block.spans), len(layers), layers[0].num_experts)
    if counts.shape != wanted:
        raise ImportFileError(f"{path}: counts have shape {counts.shape}, not {wanted} (spans, layers, experts)")
    whole = np.issubdtype(counts.dtype, np.integer)
    if not whole and (not np.isfinite(counts).all() or (counts != np.rint(counts)).any()):
        raise ImportFileError(f"{path}: counts of selections hold fractions or NaN")
    if counts.size and (counts.min() < 0 or counts.max() > 2**62):
        raise ImportFileError(f"{path}: a count of selections is {counts.min()} to {counts.max()}, which cannot be")
    return counts.astype(np.int64)


def _checked_ids(block: TraceBlock, layers: Sequence[store.LayerInfo], path: Path) -> tuple[NDArray[np.int16], int]:
    ids = np.asarray(block.ids)
    if ids.ndim != 3 or ids.shape[0] != len(layers):
        raise ImportFileError(f"{path}: selections have shape {ids.shape}, not ({len(layers)} layers, tokens, experts)")
    tokens, k, experts = ids.shape[1], ids.shape[2], layers[0].num_experts
    for name in ("sequence", "position", "generated"):
        if np.asarray(getattr(block, name)).shape != (tokens,):
            raise ImportFileError(f"{path}: {name} does not have one entry for each of {tokens} tokens")
    if not 1 <= k <= experts:
        raise ImportFileError(f"{path}: {k} experts per token, but a layer has {experts}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ImportFileError(f"{path}: expert ids are {ids.dtype}, not integers")
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < -1 or high >= experts:
        wrong = low if low < -1 else high
        raise ImportFileError(
            f"{path}: expert {wrong} is out of range; {experts} experts are numbered 0 to {experts - 1}, -1 = none"
            " (is --config the model that was recorded?)"
        )
    return ids.astype(np.int16), tokens


def _checked_weights(weights: NDArray[Any], ids: NDArray[np.int16], path: Path) -> NDArray[np.float32]:
    given = np.asarray(weights)
    if given.shape != ids.shape:
        raise ImportFileError(f"{path}: weights have shape {given.shape}, expert ids {ids.shape}")
    if not np.issubdtype(given.dtype, np.floating):
        raise ImportFileError(f"{path}: gate weights are {given.dtype}, not floating point")
    result = given.astype(np.float32)
    result[ids < 0] = 0.0
    if not np.isfinite(result).all() or (result < 0).any():
        raise ImportFileError(f"{path}: a gate weight is negative, infinite or NaN")
    return result


def _checked_tokens(token_ids: NDArray[Any], tokens: int, path: Path) -> NDArray[np.int64]:
    given = np.asarray(token_ids)
    if given.shape != (tokens,) or not np.issubdtype(given.dtype, np.integer):
        raise ImportFileError(f"{path}: token ids are {given.dtype} {given.shape}, not one integer per token")
    if given.size and (int(given.min()) < 0 or int(given.max()) >= 2**32):
        raise ImportFileError(f"{path}: token ids run from {given.min()} to {given.max()}; they are 0 to 2^32 - 1")
    return given.astype(np.int64)


def _require_distinct(ids: NDArray[np.int16], layers: Sequence[store.LayerInfo], path: Path) -> None:
    for axis, layer in enumerate(layers):
        ordered = np.sort(ids[axis], axis=-1)
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if twice.any():
            token, rank = np.argwhere(twice)[0]
            raise ImportFileError(
                f"{path}: layer {layer.layer}, token {token} of a block has expert {ordered[token, rank]} twice"
            )
