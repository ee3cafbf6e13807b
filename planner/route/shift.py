"""The choice of single tokens when a bias is added to their logits, from the largest logits that are stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int16]
Logits = NDArray[np.float64]


@dataclass(frozen=True)
class Rerouted:
    """What some tokens of one layer choose then.

    Attributes:
        before: (tokens, k) experts with the largest stored logits, -1 = none.
        after: (tokens, k) the same with the bias; in no order.
        changed: (tokens,) whether the sets differ.
        proven: (tokens,) whether no expert whose logit is not stored could be among them.
    """

    before: Ids
    after: Ids
    changed: NDArray[np.bool_]
    proven: NDArray[np.bool_]


def rerouted(ids: Ids, logits: Logits, bias: NDArray[np.float64], *, top_k: int) -> Rerouted:
    """Choose anew.

    Args:
        ids: (tokens, m) experts in descending logit, -1 = none.
        logits: (tokens, m) theirs; what stands beside -1 does not count.
        bias: (E,) added to the logits.
        top_k: experts per token.
    """
    k = min(top_k, ids.shape[1])
    after, least = _largest(ids, logits, bias, k, stable=True)
    before = ids[:, :k]
    changed = (np.sort(before, -1) != np.sort(after, -1)).any(-1)
    stored = (ids >= 0).sum(-1)
    # An expert that is not stored has at most the least stored logit, and at most the largest bias of those experts.
    lowest = np.take_along_axis(logits, np.maximum(stored - 1, 0)[:, None], 1)[:, 0]
    reach = lowest + _largest_unlisted(ids, bias)
    return Rerouted(before, after, changed, (stored >= len(bias)) | (reach < least))


def load(ids: Ids, logits: Logits, bias: NDArray[np.float64], *, top_k: int) -> NDArray[np.int64]:
    """(E,) tokens of each expert with the bias, of experts whose logits are stored; arguments of :func:`rerouted`."""
    chosen, _ = _largest(ids, logits, bias, min(top_k, ids.shape[1]))
    return np.bincount(chosen[chosen >= 0], minlength=len(bias)).astype(np.int64)


def variation(load: NDArray[np.int64]) -> float:
    """Coefficient of variation; 0 of no load."""
    mean = float(load.mean())
    return float(load.std() / mean) if mean else 0.0


def _largest(
    ids: Ids, logits: Logits, bias: NDArray[np.float64], k: int, *, stable: bool = False
) -> tuple[Ids, Logits]:
    """(tokens, k) experts with the largest sums, and (tokens,) the least of these sums; of equal sums, with ``stable``,
    that of the larger logit."""
    shifted = np.where(ids >= 0, logits + bias[np.maximum(ids, 0)], -np.inf)
    order = np.argsort(-shifted, axis=1, kind="stable") if stable else np.argpartition(-shifted, k - 1, axis=1)
    taken = order[:, :k]
    chosen: Ids = np.take_along_axis(ids, taken, axis=1)
    return chosen, np.take_along_axis(shifted, taken, axis=1).min(-1)


def _largest_unlisted(ids: Ids, bias: NDArray[np.float64]) -> NDArray[np.float64]:
    """(tokens,) the largest bias of the experts that a token does not list; -inf where it lists all."""
    found = np.full(len(ids), -np.inf)
    open_rows = np.arange(len(ids))
    for expert in np.argsort(-bias, kind="stable").tolist():
        if not len(open_rows):
            break
        listed = (ids[open_rows] == expert).any(-1)
        found[open_rows[~listed]] = bias[expert]
        open_rows = open_rows[listed]
    return found
