"""Controls: a trace with one property destroyed, so that a figure's cause shows.

A verdict about local routing needs all three beside it: what survives shuffling inside sequences is due to each text's
topic, what survives shuffling over all is due to popular experts, and uniformly random experts must read "no".
Every control keeps the shape, the padding, and how many experts each token uses. (A token that uses no expert in any
layer becomes padding when a shuffle puts it at the end.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import Ids
from ._trace import check_selections, sequence_lengths


def shuffle_within_sequences(*, selections: NDArray[Any], num_experts: int, seed: int) -> Ids:
    """The tokens of each sequence in random order; all layers of a token stay together.

    selections: int (layers, sequences, tokens, k), -1 = none; the result has the same shape and type.
    """
    checked = check_selections(selections, num_experts)
    lengths = sequence_lengths(checked)
    generator = np.random.default_rng(seed)
    keys = generator.random((checked.shape[1], checked.shape[2]))
    keys[np.arange(checked.shape[2]) >= lengths[:, None]] = 2.0  # padding stays at the end, whatever its order
    order = np.argsort(keys, axis=1)
    return np.take_along_axis(checked, order[None, :, :, None], axis=2)


def shuffle_across_sequences(*, selections: NDArray[Any], num_experts: int, seed: int) -> Ids:
    """The tokens of all sequences in random order; the sequences keep their lengths, a token's layers stay together."""
    checked = check_selections(selections, num_experts)
    kept = np.arange(checked.shape[2]) < sequence_lengths(checked)[:, None]
    order = np.random.default_rng(seed).permutation(int(kept.sum()))
    result = np.full_like(checked, -1)
    for layer in range(len(checked)):
        result[layer][kept] = checked[layer][kept][order]
    return result


def uniform_experts(*, selections: NDArray[Any], num_experts: int, seed: int) -> Ids:
    """Every token uses as many experts as before, all distinct, drawn uniformly and independently of everything."""
    checked = check_selections(selections, num_experts)
    generator = np.random.default_rng(seed)
    result = np.full_like(checked, -1)
    for layer, ids in zip(result, checked, strict=True):
        used = ids >= 0
        tokens = used.any(axis=-1)
        drawn = _distinct(generator, int(tokens.sum()), ids.shape[-1], num_experts)
        layer[tokens] = np.where(used[tokens], drawn, -1)
    return result


def uniform_tokens(ids: NDArray[Any], num_experts: int, *, seed: int | Sequence[int]) -> NDArray[Any]:
    """``uniform_experts`` of one layer without padding: ids (tokens, k), -1 = none; same shape and type."""
    generator = np.random.default_rng(seed)
    drawn = _distinct(generator, len(ids), ids.shape[1], num_experts)
    return np.where(ids >= 0, drawn, -1).astype(ids.dtype)


def _distinct(generator: np.random.Generator, tokens: int, k: int, num_experts: int) -> NDArray[np.int64]:
    """k distinct experts for each of ``tokens`` tokens, in random order: (tokens, k). Floyd's sampling, shuffled."""
    drawn = np.full((tokens, k), -1, dtype=np.int64)
    for rank, last in enumerate(range(num_experts - k, num_experts)):
        candidate = generator.integers(0, last + 1, size=tokens)
        taken = (drawn[:, :rank] == candidate[:, None]).any(axis=1)
        drawn[:, rank] = np.where(taken, last, candidate)
    return generator.permuted(drawn, axis=1)
