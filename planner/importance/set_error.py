"""What masking any set of experts adds to a layer's output, exactly, from one Gram matrix."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import store
from moescope.errors import PlanError
from planner.importance.statistics import Statistics


def output_gram(
    run: store.Run, *, domain: str | None = None, phase: Literal["prompt", "decode"] | None = None
) -> dict[tuple[int, int], NDArray[np.float64]]:
    """(layer, step) -> A (experts, experts), A_ij = sum over tokens of g_i g_j <f_i, f_j>.

    Raises:
        PlanError: the run was not collected at level activations, or keeps domains pooled while one is wanted.
    """
    statistics = Statistics(run, level="activations", domain=domain, phase=phase)
    return dict(statistics.matrices("expert_pair", "output_products"))


def set_error(gram: NDArray[np.float64], kept: Collection[int]) -> float:
    """Sum over tokens of the squared error of the layer's output when only ``kept`` experts add to it.

    Exact as long as the others are masked: nothing is routed anew and no gate weight changes. It is 1' A 1 over the
    masked experts. The error per token is this over the tokens of ``router_load``.

    Args:
        gram: (experts, experts) of one layer, from :func:`output_gram`.
        kept: numbers of the experts that stay.

    Raises:
        PlanError: a number that is no expert of the layer, or a matrix that is not square.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise PlanError(f"the Gram matrix has shape {gram.shape}; it takes (experts, experts)")
    wrong = sorted(set(kept) - set(range(len(gram))))
    if wrong:
        raise PlanError(f"expert {wrong[0]} is not in this layer: it has experts 0..{len(gram) - 1}")
    masked = np.setdiff1d(np.arange(len(gram)), list(kept))
    return float(gram[np.ix_(masked, masked)].sum())
