"""Activation matrices: the stored sequence most like the request so far tells what comes (MoE-Infinity, 2401.14361).

A matrix counts how often a sequence used each expert of each layer. After every layer the request's own matrix is held
against the stored ones by the cosine of rows, averaged over layers; the nearest one's next rows are what is fetched.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.simulate.prefetch.predicted import Predicted, checked_width, foreseeable, top_experts
from planner.simulate.workload import Workload

Floats = NDArray[np.float64]

CAPACITY = 1000
"""Matrices that are kept, as MoE-Infinity's ``trace_capacity``."""


def predict(
    workload: Workload,
    *,
    train: Workload,
    ahead: int = 1,
    width: int | None = None,
    across_passes: bool = False,
    capacity: int = CAPACITY,
) -> Predicted:
    """The ``width`` experts of the layer in the stored matrix that is nearest, in the order of :func:`priorities`.

    One layer's experts are ranked among themselves, so the decay over layers changes nothing here; it does where
    several layers compete. Experts that no token of ``train`` used are not foreseen, though 1e-8 ranks them.

    Args:
        workload: what is foreseen.
        train: its requests fill the collection; if there are more than ``capacity``, evenly spaced ones. (MoE-Infinity
            then replaces the most similar ones while it runs.)
        ahead: layers between prediction and use.
        width: experts foreseen per step; None = k.
        across_passes: the last layers of the pass before foresee the first ones, but for a request's first pass.
        capacity: matrices kept.

    Raises:
        PlanError: as :func:`~planner.simulate.prefetch.predicted.checked_width`.
    """
    from planner.simulate._prefetch import match_sequences

    width = checked_width(workload, train, ahead=ahead, width=width, across_passes=across_passes)
    stored = collection(train, capacity=capacity)
    lengths = np.sqrt((stored.astype(np.float64) ** 2).sum(axis=2)).T  # shape: (layers, matrices)
    matched = np.zeros((workload.num_layers, workload.num_passes), np.int32)
    match_sequences(
        workload.ids, workload.tokens, workload.offsets,
        np.ascontiguousarray(stored.transpose(1, 2, 0), np.float32), np.ascontiguousarray(lengths), matched,
    )  # fmt: skip
    used = stored.sum(axis=0) > 0
    ids = np.full((workload.num_layers, workload.num_passes, width), -1, np.int16)
    for layer in range(workload.num_layers):
        best = top_experts(np.where(used[layer], stored[:, layer] + 1e-8, 0.0), width)  # shape: (matrices, width)
        back, at = divmod(layer - ahead, workload.num_layers)
        ids[layer, -back:] = best[matched[at, : workload.num_passes + back]]
    return Predicted("activation_matrix", foreseeable(workload, ids, ahead=ahead, across_passes=across_passes), ahead)


def collection(train: Workload, *, capacity: int = CAPACITY) -> NDArray[np.int64]:
    """(matrices, layers, E) uses of each expert by each sequence, of at most ``capacity`` evenly spaced ones."""
    count = min(capacity, train.num_requests)
    chosen = np.linspace(0, train.num_requests - 1, count).round().astype(np.int64)
    return np.stack([train.requests([one]).counts() for one in chosen])


def priorities(*, current: NDArray[np.int64], stored: NDArray[np.int64], layer: int) -> Floats:
    """MoE-Infinity's order of fetching after layer ``layer`` has run: (layers, E), the highest first.

    Rows of the nearest stored matrix, normalised, times 1 - (j - layer) / (L + 1) for layer j, plus 1e-8; layers before
    ``layer`` have 0. current (L, E), stored (matrices, L, E): uses. The earlier of two matrices equally near is taken.
    """
    cosine = np.einsum("le,nle->nl", current.astype(np.float64), stored.astype(np.float64))
    lengths = np.linalg.norm(current, axis=1) * np.linalg.norm(stored, axis=2)
    cosine = np.divide(cosine, lengths, out=np.zeros_like(cosine), where=lengths > 0)
    total = cosine.sum(axis=1)
    best = stored[int(np.flatnonzero(total >= total.max() - 1e-12)[0])].astype(np.float64)
    sums = best.sum(axis=1, keepdims=True)
    shares = np.divide(best, sums, out=np.zeros_like(best), where=sums > 0)
    later = np.arange(len(best))[:, None] - layer
    return np.where(later >= 0, shares * (1 - later / (len(best) + 1)) + 1e-8, 0.0)
