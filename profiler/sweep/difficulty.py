"""Do harder tokens use more experts? Experts per token against the token's loss under the model as it is; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiler.metrics.divergence import mean_of_items
from profiler.metrics.perplexity import Estimate
from profiler.sweep.correlation import correlation, ranks
from profiler.sweep.estimates import plain

BINS = 10
"""Bins of equally many tokens, by loss."""

Key = tuple[int, int]


def difficulty(
    *,
    losses: NDArray[np.float64],
    active: Mapping[Key, NDArray[np.int16]],
    sequence: NDArray[np.int64],
    domain: NDArray[np.int64],
    domains: Sequence[str],
    bins: int = BINS,
) -> dict[str, Any]:
    """How the number of experts moves with the loss of the token that is predicted at the same position.

    Args:
        losses: (tokens,) under the router's own choice, so that the rule cannot make its own evidence.
        active: per (layer, step) experts of each token under the rule, (tokens,).
        sequence: (tokens,) of which sequence each token is: the unit that was sampled.
        domain: (tokens,) index into ``domains``.
        domains: names.
        bins: of equally many tokens.

    Returns:
        ``bins``: tokens, loss (mean, nats), from, to, active (mean over layers, with its interval) and layers (mean per
        layer); ``correlation``: Spearman's of loss and experts, mean over layers, with its interval; ``layers``: the
        same per layer; ``per_domain``: mean loss, mean experts, correlation within the domain.
    """
    keys = sorted(active)
    each = np.stack([active[key] for key in keys]).astype(np.float64)
    mean, hard = each.mean(0), ranks(losses)
    found: dict[str, Any] = {
        "bins": _bins(losses, hard, each, mean, sequence, bins),
        "correlation": plain(correlation(hard, ranks(mean), sequence=sequence)),
        "layers": [
            {"layer": layer, "step": step, **plain(correlation(hard, ranks(row), sequence=sequence))}
            for (layer, step), row in zip(keys, each, strict=True)
        ],
        "per_domain": {},
    }
    for index, name in enumerate(domains):
        inside = domain == index
        if inside.any():
            apart = correlation(ranks(losses[inside]), ranks(mean[inside]), sequence=sequence[inside])
            found["per_domain"][name] = {
                "tokens": int(inside.sum()),
                "loss": float(losses[inside].mean()),
                "active": plain(_mean(mean[inside], sequence[inside])),
                "correlation": plain(apart),
            }
    return found


def _bins(
    losses: NDArray[np.float64],
    hard: NDArray[np.float64],
    each: NDArray[np.float64],
    mean: NDArray[np.float64],
    sequence: NDArray[np.int64],
    bins: int,
) -> list[dict[str, Any]]:
    """By rank, so that tokens of the same loss stand in one bin; bins that ties leave empty are left out."""
    place = np.minimum((hard - 1) * bins // len(hard), bins - 1).astype(np.int64)
    rows = []
    for number in range(bins):
        inside = place == number
        if not inside.any():
            continue
        rows.append(
            {
                "tokens": int(inside.sum()),
                "loss": float(losses[inside].mean()),
                "from": float(losses[inside].min()),
                "to": float(losses[inside].max()),
                "active": plain(_mean(mean[inside], sequence[inside])),
                "layers": [float(value) for value in each[:, inside].mean(1)],
            }
        )
    return rows


def _mean(values: NDArray[np.float64], sequence: NDArray[np.int64]) -> Estimate:
    """Mean over tokens with its interval over sequences."""
    _, group = np.unique(sequence, return_inverse=True)
    return mean_of_items(sums=np.bincount(group, weights=values), items=np.bincount(group))
